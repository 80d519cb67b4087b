"""``sign_product``: vectors times a random matrix of signs that is made where it is used and never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .. import _native, reference
from .._arguments import integer
from .._dispatch import Op, current_backend
from . import _cuda
from ._checks import accumulator, check_floats, shape
from ._point_checks import cpu_refuses, threads_for, with_unit_stride

_WORDS = 2**32
BLOCK = 128
"""Signs that one counter of the generator gives."""


def sign_product(
    vectors: torch.Tensor, dim: int, key: Sequence[int], scale: float = 1.0, transposed: bool = False
) -> torch.Tensor:
    """``scale · vectors Sᵀ`` with a random matrix S [R, D] of ±1, made on the way: the dense stage of a sketch.

    Entries of S are bits of the counter-based generator Philox4x32-10 at counters made of their row and column, so S is
    the same on every device and backend, a larger ``dim`` adds columns to the result and a longer vector adds terms.

    Args:
        vectors: [B, D].
        dim: R, how many numbers are kept of each vector: at least 1 and below 2³².
        key: the generator's two 32-bit words; other words give an independent matrix.
        scale: multiplies the signs; with ``1 / sqrt(dim)`` the products keep inner products in expectation.
        transposed: ``scale · vectors S`` with S [D, R] instead, the generator's rows being the vectors' entries (fewer
            than 2³²): the first stage of a long vector's sketch. Other signs than without it.

    Returns:
        [B, R], float64 for float64 vectors, else float32, in the vectors' units times the scale's. A NaN stays in its
        own row.

    Raises:
        ValueError, TypeError: a shape, dtype or number that does not fit.

    Source:
        Random signs: Achlioptas 2003, "Database-friendly random projections". Generator: Salmon et al. 2011, "Parallel
        random numbers: as easy as 1, 2, 3". The guide's "sketching" page.

    Example:
        >>> vectors = torch.eye(3)  # each picks a column of S
        >>> short, long = (gf.ops.sign_product(vectors, dim, key=(1, 2)) for dim in (4, 6))
        >>> torch.equal(short, long[:, :4]), long.abs().unique().tolist()
        (True, [1.0])
    """
    return _op.call(*_prepare(vectors, dim, key, scale, transposed))


def _prepare(
    vectors: torch.Tensor, dim: int, key: Sequence[int], scale: float, transposed: bool
) -> tuple[torch.Tensor, int, int, int, float, bool]:
    if not isinstance(key, Sequence) or isinstance(key, str) or len(key) != 2:
        raise TypeError(f"key must be two integers, got {key!r}; pass the generator's two 32-bit words")
    return vectors, dim, integer("key", key[0]), integer("key", key[1]), scale, transposed


def _check(vectors: torch.Tensor, dim: int, key0: int, key1: int, scale: float, transposed: bool) -> None:
    check_floats("vectors", vectors)
    if vectors.dim() != 2:
        raise ValueError(f"vectors must be [B, D], got {shape(vectors)}; flatten each into one row")
    if dim < 1 or dim >= _WORDS:
        raise ValueError(f"dim must be at least 1 and below 2³², got {dim}; the generator counts rows in 32 bits")
    if transposed and vectors.shape[1] >= _WORDS:
        raise ValueError(f"vectors must be shorter than 2³² with transposed=True, got {shape(vectors)}; cut them")
    if not (0 <= key0 < _WORDS and 0 <= key1 < _WORDS):
        raise ValueError(f"key must be two integers in [0, 2³²), got ({key0}, {key1}); cut a longer one in two")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; pass e.g. 1 / sqrt(dim)")


def _fake(vectors: torch.Tensor, dim: int, *_: object) -> torch.Tensor:
    return vectors.new_empty(vectors.shape[0], dim, dtype=accumulator(vectors.dtype))  # [B, R]


_op = Op(
    "sign_product(Tensor vectors, SymInt dim, int key0, int key1, float scale, bool transposed) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.sign_product.sign_product,
    prepare=_prepare,
)


def generated(
    vectors: torch.Tensor, dim: int, key: tuple[int, int], scale: float, transposed: bool = False
) -> torch.Tensor | None:
    """The product by a kernel that makes the signs about as fast as it multiplies, or None: take a stored matrix.

    That is the better way where no kernel runs and for autograd, since PyTorch takes a thousand times longer to make
    the matrix than to multiply with it, and for vectors shorter than one block of the generator, whose matrix is small
    and several times faster to multiply with (bench/kernels/bench_sign_product.py).
    """
    if vectors.requires_grad or vectors.shape[1] < BLOCK or current_backend() not in ("auto", "cpu", "cuda"):
        return None
    kernel = _op.kernels.get("cuda" if current_backend() == "cuda" or vectors.is_cuda else "cpu")
    if kernel is None or kernel.refuses(vectors, dim, *key, scale, transposed):
        return None
    return _op.run(vectors, dim, *key, scale, transposed)


@_op.kernel(
    "cpu", refuses=cpu_refuses, route=lambda *_: "signs of a panel of outputs in L1 cache, for 128 rows at a time"
)
def sign_product_cpu(
    vectors: torch.Tensor, dim: int, key0: int, key1: int, scale: float, transposed: bool
) -> torch.Tensor:
    out = _fake(vectors, dim)
    vectors = with_unit_stride(vectors)
    signs = _native.signs(vectors, dim, key0, key1, transposed)
    _native._C.sign_product_cpu(signs, scale, out.data_ptr(), threads_for(vectors.numel() * dim))
    return out


def pieces() -> int:
    """bfloat16 numbers that stand for a float32 on tensor cores, by torch's setting of float32 products.

    ``"highest"`` (torch's default) takes three, whose sum is the float32 number itself; ``"high"`` two and ``"medium"``
    one, as torch documents these settings.
    """
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to name one once its newer interface, one setting a backend, was used
        return 2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 3
    return {"highest": 3, "high": 2, "medium": 1}[setting]


TILE = 32, 64
"""Rows and outputs of the CUDA kernel's smallest tile (csrc/cuda/sign_product.cu)."""


def _cuda_refuses(vectors: torch.Tensor, dim: int, *_: object) -> str | None:
    rows, outputs = TILE
    if -(-vectors.shape[0] // rows) * -(-dim // outputs) >= 2**31:
        return f"the CUDA kernel takes fewer than 2³¹ tiles of {rows} × {outputs} results"
    return _cuda.refuses(vectors)


@_op.kernel(
    "cuda",
    refuses=_cuda_refuses,
    route=lambda *_: "signs made in registers for tensor cores, exact products, added in float32 or float64",
)
def sign_product_cuda(
    vectors: torch.Tensor, dim: int, key0: int, key1: int, scale: float, transposed: bool
) -> torch.Tensor:
    out = _fake(vectors, dim)
    if vectors.shape[0] == 0:
        return out
    vectors = with_unit_stride(vectors)
    parts = pieces() if vectors.dtype == torch.float32 else 3
    signs = _native.signs(vectors, dim, key0, key1, transposed)
    _cuda.launch("sign_product_cuda", vectors.device, signs, scale, parts, out.data_ptr())
    return out
