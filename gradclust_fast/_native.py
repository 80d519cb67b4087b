"""Loads the native module once, and keeps the reason when it cannot be loaded.

Only ``ops/`` calls the module; everything that crosses the boundary is an address, an extent or a stride.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch  # before _C, so that both share one OpenMP thread pool

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/types.h: DType

_NOT_BUILT = (
    "the native kernels were not built (GRADCLUST_NATIVE=0, or an install without a compiler); "
    "install a C++17 compiler and run `pip install --force-reinstall --no-deps gradclust_fast`"
)


STALE = (
    "the native module was built from other sources than those beside it (csrc has changed since); build it anew: "
    "`pip install -e .` in the source tree"
)


def stamp_of(csrc: Path) -> str:
    """What CMakeLists.txt compiles in as ``_C.stamp``: a digest of the names and contents of all files in csrc."""
    files = {
        path.relative_to(csrc).as_posix(): path
        for path in csrc.rglob("*")
        if path.suffix in (".cpp", ".h", ".cu", ".cuh")
    }
    listing = (f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for name, path in sorted(files.items()))
    return hashlib.sha256("".join(listing).encode()).hexdigest()


def _load() -> tuple[Any, str | None]:
    name = f"{__package__}._C"
    if importlib.util.find_spec(name) is None:
        return None, _NOT_BUILT
    try:
        module = importlib.import_module(name)
        built_from = getattr(module, "stamp", None)
        csrc = Path(__file__).resolve().parent.parent / "csrc"
        # An installed package has no sources beside it, and came in one piece.
        if built_from is None or ((csrc / "bindings.cpp").is_file() and built_from != stamp_of(csrc)):
            return None, STALE
        return module, None
    except ImportError as error:
        if "GRADCLUST_CPU_ISA" in str(error):  # the user asked for it, so nothing slower may take its place
            raise ValueError(f"{error}; set it to one that this processor has, or unset it") from None
        return None, f"the native module was found but cannot be loaded: {error}"


_C: Any
_C, unavailable = _load()
"""The module and ``None``, or ``None`` and the reason."""


_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def num_threads() -> int:
    """Threads for a C++ kernel: torch's setting of this thread; 1 in a forked child, where OpenMP's pool is gone."""
    return 1 if _in_forked_child else torch.get_num_threads()


def cpu_unavailable() -> str | None:
    return unavailable


def bf16_dots() -> bool:
    """Whether the C++ kernels multiply pairs of bf16 in one instruction (AVX-512 BF16)."""
    return _C is not None and _C.bf16_dots


def cuda_unavailable() -> str | None:
    """Why CUDA kernels cannot run here, or None."""
    if _C is None:
        return unavailable
    if not _C.cuda:
        return f"the CUDA kernels were not built: {_C.cuda_reason}; put nvcc on PATH and reinstall"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


class BuildInfo(dict):
    """What was built and what was not, and why. Prints as a short table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in self.items())


def build_info() -> BuildInfo:
    """What this installation of gradclust_fast can run: native module, instruction set, CUDA, Triton.

    Returns:
        A dict that prints as a table. Each ``... unavailable`` entry is ``None`` or the reason as a sentence.

    Example:
        >>> import gradclust_fast as gf
        >>> info = gf.build_info()
        >>> sorted(info)[:2]
        ['C++ kernels', 'CUDA kernels']
    """
    from . import __version__

    info = BuildInfo({"gradclust_fast": __version__, "torch": torch.__version__, "Python": platform.python_version()})
    if _C is None:
        info["C++ kernels"] = f"unavailable: {unavailable}"
    else:
        info["C++ kernels"] = (
            f"{_C.isa}{' with bf16 dot products' * _C.bf16_dots}, {_C.compiler}, OpenMP {'on' if _C.openmp else 'off'}"
        )
    reason = cuda_unavailable()
    if _C is not None and _C.cuda:
        built = f"built for {_C.cuda_archs} ({_C.cuda_reason})"
        info["CUDA kernels"] = built if reason is None else f"{built}; cannot run: {reason}"
    else:
        info["CUDA kernels"] = f"unavailable: {reason}"
    info["Triton kernels"] = _triton_info()
    return info


def _triton_info() -> str:
    from .triton_kernels import _support

    return _support.info()


def linear(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> tuple[int, ...]:
    """csrc/tuples.h:LinearTuple of act [B, T, I] and grad [B, T, O], both with feature stride 1."""
    B, T, I = act.shape
    return (
        act.data_ptr(), grad.data_ptr(), DTYPES[act.dtype], B, T, I, grad.shape[2],
        act.stride(0), act.stride(1), grad.stride(0), grad.stride(1), int(bias),
    )  # fmt: skip


def embedding(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding: int) -> tuple[int, ...]:
    """csrc/tuples.h:EmbeddingTuple of index [B, T] int64 and grad [B, T, D] feature stride 1; padding −1: none."""
    return (
        index.data_ptr(), grad.data_ptr(), DTYPES[grad.dtype], *grad.shape, num_embeddings, padding,
        *index.stride(), *grad.stride()[:2],
    )  # fmt: skip


def norm(input: torch.Tensor, grad: torch.Tensor, groups: int) -> tuple[int, ...]:
    """csrc/tuples.h:NormTuple of input and grad [B, T, D], or [B, C, S] with groups, both with last stride 1."""
    return (
        input.data_ptr(), grad.data_ptr(), DTYPES[input.dtype], *input.shape, groups,
        *input.stride()[:2], *grad.stride()[:2],
    )  # fmt: skip


def rows(points: torch.Tensor) -> tuple[int, ...]:
    """csrc/tuples.h:RowsTuple of points [N, R] with feature stride 1."""
    return points.data_ptr(), DTYPES[points.dtype], *points.shape, points.stride(0)


def signs(vectors: torch.Tensor, dim: int, key0: int, key1: int, transposed: bool) -> tuple[int, ...]:
    """csrc/tuples.h:SignTuple of vectors [B, D] with last stride 1."""
    stride = vectors.stride(0)
    return vectors.data_ptr(), DTYPES[vectors.dtype], *vectors.shape, stride, dim, key0, key1, int(transposed)


def with_workspace(function: Any, *args: Any, threads: int) -> None:
    """Calls a native function that first tells how many bytes it needs, then works in them."""
    workspace = torch.empty(max(1, function(*args, 0, threads)), dtype=torch.uint8)
    function(*args, workspace.data_ptr(), threads)


def conv(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[int, ...]:
    """csrc/tuples.h:ConvTuple of act [B, C, *size] and grad [B, O, *out], any strides; always three dimensions."""
    missing = 3 - len(kernel_size)
    one, zero = (1,) * missing, (0,) * missing
    a, g = act.stride(), grad.stride()
    return (
        act.data_ptr(), grad.data_ptr(), DTYPES[act.dtype], act.shape[0], act.shape[1], grad.shape[1], groups,
        int(bias), *one, *act.shape[2:], *one, *grad.shape[2:], *one, *kernel_size, *one, *stride, *zero,
        *padding[::2], *one, *dilation, *a[:2], *zero, *a[2:], *g[:2], *zero, *g[2:],
    )  # fmt: skip
