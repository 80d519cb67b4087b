"""What the embedding ops share: argument checks, the table's rows as the kernels take them, when C++ runs."""

from __future__ import annotations

import torch

from .. import _native
from . import _cuda
from ._checks import as_rows, check_auxiliary, check_floats, shape
from ._triton import triton_loses, triton_refuses

INDICES = (torch.int64, torch.int32)


def check_embedding(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> None:
    """index [B, *] and grad [B, *, D] of a table of ``num_embeddings`` rows; values are for :func:`check_range`."""
    if index.dtype not in INDICES:
        raise TypeError(f"index must be int64 or int32, got {index.dtype}; use index.long()")
    check_floats("grad", grad)
    if index.dim() < 1:
        raise ValueError(f"index must be [B, *], got {shape(index)}; add the batch dimension with unsqueeze(0)")
    if grad.shape[:-1] != index.shape or grad.dim() != index.dim() + 1:
        raise ValueError(
            f"grad must be [B, *, D] with [B, *] = {shape(index)} (from index), got {shape(grad)}; pass the gradient "
            f"of the embedding's output for these indices"
        )
    if grad.device != index.device:
        raise ValueError(f"grad must be on {index.device} like index, got {grad.device}; move one of them")
    if num_embeddings < 0:
        raise ValueError(f"num_embeddings must be at least 0, got {num_embeddings}; pass the table's number of rows")
    if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must lie in [{-num_embeddings}, {num_embeddings}), got {padding_idx}; pass a row of the "
            f"table, counted from its end where negative, or None"
        )


def check_range(index: torch.Tensor, num_embeddings: int) -> None:
    """Every index in [0, num_embeddings).

    Waits for the device. Nothing can wait while a CUDA graph is captured; the gathers' own asserts hold there.
    """
    if index.numel() == 0 or index.is_meta or (index.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    low, high = (int(bound) for bound in torch.aminmax(index))
    if low < 0 or high >= num_embeddings:
        bad = ((index < 0) | (index >= num_embeddings)).nonzero()[0].tolist()
        raise ValueError(
            f"index must lie in [0, {num_embeddings}), got index[{', '.join(map(str, bad))}] = "
            f"{int(index[tuple(bad)])}; raise num_embeddings, or repair the data"
        )


def check_side(name: str, side: torch.Tensor | None, size: int, source: str, grad: torch.Tensor) -> None:
    """A sketch's side [size, ·]; None is the identity."""
    if side is None:
        return
    if side.dim() != 2 or side.shape[0] != size:
        letter = "P" if name == "left" else "Q"
        raise ValueError(
            f"{name} must be [{size}, {letter}] ({source}), got {shape(side)}; one column per sketch dimension, or "
            f"None for the identity"
        )
    check_auxiliary(name, side, grad, "grad")


def padding_row(num_embeddings: int, padding_idx: int | None) -> int:
    """The row that gets no gradient, counted from 0; −1 for none."""
    return -1 if padding_idx is None else padding_idx % num_embeddings


def positions(index: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """index [B, T] int64 and grad [B, T, D] with feature stride 1: views where the strides allow it."""
    grad = as_rows(grad)
    return index.reshape(grad.shape[0], grad.shape[1]).long(), grad


def cpu_refuses(index: torch.Tensor, *_: object) -> str | None:
    """Why the C++ kernels cannot run on an op's arguments, or None."""
    if index.device.type != "cpu":
        return f"the C++ kernel needs CPU tensors, got {index.device}"
    return _native.cpu_unavailable()


def cuda_products_refuse(index: torch.Tensor, grad: torch.Tensor, *widths: int) -> str | None:
    """Why the CUDA kernel of sketches and inner products cannot make a result of these sides, or None."""
    if index.numel() >= 2**31 or max(widths) > 2**21:
        return "the CUDA kernel takes fewer than 2³¹ positions and at most 2²¹ columns"
    return _cuda.refuses(index)


def cuda_products_lose(index: torch.Tensor, *_: object) -> str | None:
    """By design, not by a measurement: a block works on 64 positions of one example."""
    positions = index[:1].numel()
    return f"with {positions} positions an example most of a block would be idle" if positions < 16 else None


def triton_table_refuses(index: torch.Tensor, grad: torch.Tensor, *_: object) -> str | None:
    """Why the Triton kernels cannot run on an op's arguments, or None."""
    return triton_refuses(grad)


def triton_table_loses(index: torch.Tensor, grad: torch.Tensor, *_: object) -> str | None:
    return triton_loses(grad)
