"""Shared by the reference paths of the embedding ops: nothing here is as large as the table."""

from __future__ import annotations

import torch

from .common import upcast


def flat(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """index [B, T] int64, grad [B, T, D] in the accumulator's dtype; what the padding row would get is zero."""
    grad = upcast(grad)
    index = index.reshape(grad.shape[0], grad.shape[1]).long()
    if padding_idx is not None:  # a NaN there is nobody's gradient
        grad = grad.masked_fill((index == padding_idx % num_embeddings).unsqueeze(2), 0)
    return index, grad


def table_rows(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of all G_b that a position points to: (example [U], table row [U], its gradient [U, D]), by example."""
    index, grad = flat(index, grad, num_embeddings, padding_idx)
    B, D = grad.shape[0], grad.shape[2]
    used, row = None, index
    if B * num_embeddings >= 2**63:
        used, row = torch.unique(index, return_inverse=True)
    V = max(1, num_embeddings if used is None else used.numel())
    keys, segment = torch.unique(torch.arange(B, device=index.device).unsqueeze(1) * V + row, return_inverse=True)
    values = add_rows(grad.new_zeros(keys.numel(), D), segment.flatten(), grad.flatten(0, 1))
    return keys // V, keys % V if used is None else used[keys % V], values


def add_rows(out: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``out[index] += values`` with the same bits every time: index_add_ on a GPU uses atomics, index_put_ sorts."""
    if out.device.type == "cpu":
        return out.index_add_(0, index, values)
    return out.index_put_((index,), values, accumulate=True)
