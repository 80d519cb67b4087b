"""Random ±scale matrices made by the CUDA kernel, bit for bit those of ``reference.sign_product.sign_matrix``."""

from __future__ import annotations

import torch

from .. import _native
from .._dispatch import current_backend
from . import _cuda


def refuses(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the CUDA kernel does not make this matrix, or None."""
    if dtype not in (torch.float32, torch.float64):
        return f"the CUDA kernel writes float32 and float64, not {dtype}"
    if current_backend() not in ("auto", "cuda"):
        return f"backend {current_backend()!r} was forced"
    return _cuda.refuses(torch.empty(0, device=device))


def random_signs_cuda(
    rows: int,
    cols: int,
    key: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    scale: float = 1.0,
    transposed: bool = False,
) -> torch.Tensor:
    """[rows, cols] of ±scale, or its contiguous transpose [cols, rows]."""
    out = torch.empty((cols, rows) if transposed else (rows, cols), dtype=dtype, device=device)
    _cuda.launch(
        "random_signs_cuda", device, out.data_ptr(), _native.DTYPES[dtype], rows, cols, *key, scale, transposed
    )
    return out
