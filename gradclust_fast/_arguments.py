"""Checks of arguments that several public names share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int: NumPy's integers count, bools and floats do not. Without ``least`` it must fit 64 bits."""
    try:
        plain = operator.index(value)
    except TypeError:
        plain = None
    if plain is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and plain < least:
        raise ValueError(f"{name} must be at least {least}, got {plain}")
    if least is None and not -(2**63) <= plain < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {plain}")
    return plain


def check_index(index: Any, N: int) -> Tensor:
    """Data-set indices as a tensor of integers; raises for those outside 0..N−1."""
    index = torch.as_tensor(index)
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(f"index must be of integers (data-set indices), got {index.dtype}")
    capturing = index.is_cuda and torch.cuda.is_current_stream_capturing()  # nothing can wait for the device then
    if index.numel() and not capturing:
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= N:
            raise IndexError(
                f"index {low if low < 0 else high} is outside the {N} examples of the strata; pass the indices that "
                f"DataLoader(gf.with_indices(dataset)) yields"
            )
    return index


def check_finite(what: str, values: Tensor, index: Tensor) -> None:
    """values [b] or [b, R]: raises naming the data-set indices of rows with NaN or Inf."""
    finite = values.detach().isfinite()
    finite = finite.reshape(len(index), -1).all(1).cpu()
    if not finite.all():
        bad = index[~finite].sort().values.tolist()
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise ValueError(
            f"{what} of {len(bad)} example(s) is not finite: index {shown}; remove or repair these examples, or lower "
            f"the learning rate if the model has diverged"
        )
