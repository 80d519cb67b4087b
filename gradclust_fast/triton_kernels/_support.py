"""What every Triton launcher needs and what needs no Triton: availability, target, precision, workspace, launch."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

OLDEST_CAPABILITY = (8, 0)
OLDEST_TRITON = (3, 6)


@dataclass(frozen=True)
class Target:
    """What a configuration may depend on, beside shape and dtype."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def interpreter(self) -> bool:
        return self.capability == (0, 0)


INTERPRETER = Target((0, 0), 4)
"""The smallest tiles: they cost the interpreter least, and small shapes then have several."""


@dataclass
class Launch:
    """A launch that was recorded instead of made."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


@dataclass
class Recording:
    target: Target
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None
_interpreter_lock = threading.Lock()  # the interpreter keeps its state in module globals


def interpreted() -> bool:
    """Whether Triton runs, or would run, its kernels in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be used, or None."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton (torch's CUDA builds for Linux bring it along)"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        least = ".".join(map(str, OLDEST_TRITON))
        return f"the Triton kernels need Triton {least} or newer, this is {triton.__version__}; upgrade torch or triton"
    return None


@functools.cache
def _gpu_unavailable(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA GPUs, and this torch is built for AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        name, least = torch.cuda.get_device_name(device), ".".join(map(str, OLDEST_CAPABILITY))
        found = ".".join(map(str, capability))
        return f"the Triton kernels need compute capability {least} or newer, {name} has {found}"
    return None


def unavailable(device: torch.device) -> str | None:
    """Why no Triton kernel can run on tensors of this device, or None."""
    if device.type == "meta" and _recording is not None:
        return None
    if device.type == "cuda":
        return missing() or (None if interpreted() else _gpu_unavailable(device))
    if device.type == "cpu" and interpreted():
        return missing()
    hint = "; TRITON_INTERPRET=1 runs them on CPU tensors, slowly, for tests" if device.type == "cpu" else ""
    return f"the Triton kernels need CUDA tensors, got {device}{hint}"


def info() -> str:
    """One line for ``gf.build_info()``."""
    reason = missing()
    if reason is not None:
        return f"unavailable: {reason}"
    found = f"Triton {sys.modules['triton'].__version__}"
    if interpreted():
        return f"{found}, in its interpreter"
    if not torch.cuda.is_available():
        return f"unavailable: {found} is there, but torch sees no CUDA device"
    reason = _gpu_unavailable(torch.device("cuda", torch.cuda.current_device()))
    return f"unavailable: {reason}" if reason else found


@functools.cache
def _gpu_target(device: torch.device) -> Target:
    facts = torch.cuda.get_device_properties(device)
    return Target((facts.major, facts.minor), facts.multi_processor_count)


def target(device: torch.device) -> Target:
    """What to choose a configuration for: the tensor's GPU, the interpreter, or what a recording asks for."""
    if _recording is not None:
        return _recording.target
    return INTERPRETER if interpreted() else _gpu_target(device)


def float32_precision() -> str:
    """Triton's ``input_precision`` for float32 products, from torch's setting.

    ``"highest"`` (torch's default) is ``"ieee"``: float32 throughout, without tensor cores. ``"high"``, also what
    ``allow_tf32 = True`` sets, is ``"tf32x3"``: three tf32 products, about float32's accuracy. ``"medium"`` is
    ``"tf32"``, as is ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` in torch's newer interface.
    """
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name one once its newer interface, one setting a backend, was used
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[setting]


@functools.cache
def _prepare_interpreter() -> None:
    """Patches Triton's language for its interpreter once, not at every launch and call of a device function.

    That is most of the time on small tensors. Loop bounds are mended too: they are arrays of one element there, of
    which NumPy 2.4 no longer makes an int.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    scope = patch(SimpleNamespace(__globals__={"language": language, "core": language.core}))
    language.tensor.__index__ = lambda self: self.handle.data.item()
    kept = SimpleNamespace(restore=lambda: None, scope=scope)
    interpreter._patch_lang = lambda function: kept
    checks = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(checks, sanitize_overflow=False)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)`` on the device's current stream; nothing for an empty grid.

    No argument is read back, so nothing waits for the GPU and the launch can be captured in a CUDA graph.
    """
    if 0 in grid:
        return
    if _recording is not None:
        _recording.launches.append(Launch(kernel, grid, args, meta))
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if interpreted():
            with _interpreter_lock, np.errstate(all="ignore"):  # a GPU says nothing of NaN either
                _prepare_interpreter()
                kernel[grid](*args, **meta)
        else:
            kernel[grid](*args, **meta)


@contextmanager
def recording(capability: tuple[int, int], multiprocessors: int) -> Iterator[list[Launch]]:
    """Launchers run on meta tensors, and their launches are listed instead of made: for ahead-of-time compilation.

    Example:
        >>> with recording((9, 0), 132) as launches, gf.backend("triton"):
        ...     _ = gf.ops.grad_sqnorm(torch.empty(8, 4, device="meta"), torch.empty(8, 3, device="meta"))
    """
    global _recording
    _recording = Recording(Target(capability, multiprocessors))
    try:
        yield _recording.launches
    finally:
        _recording = None


def unit(*strides: int) -> int:
    """16 where it divides every stride, else 1: kernels take strides in this unit, as a ``constexpr``.

    Triton must know that rows start at multiples of 16 elements to load 16 bytes at once, and would otherwise learn it
    by specialising on each stride, which recompiles when B or T changes.
    """
    return 16 if all(stride % 16 == 0 for stride in strides) else 1


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def power_of_two(size: int, least: int = 16, most: int | None = None) -> int:
    """The smallest power of two that holds ``size``, within the bounds; 16 is the least side of a Triton product."""
    power = max(least, 1 << max(0, size - 1).bit_length())
    return power if most is None else min(power, most)
