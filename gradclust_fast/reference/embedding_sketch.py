"""Two-sided projections of per-example gradients of an embedding table."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .embedding_common import flat, table_rows


def embedding_sketch(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    """leftᵀ G_b right = Σ_t left[index[b, t]] ⊗ (rightᵀ grad[b, t]): only the rows of left that are used are read."""
    if left is None:
        example, row, values = table_rows(index, grad, num_embeddings, padding_idx)
        values = values if right is None else values @ right.to(values.dtype)
        out = values.new_zeros(index.shape[0], num_embeddings, values.shape[1])
        out[example, row] = values
        return out
    index, grad = flat(index, grad, num_embeddings, padding_idx)
    columns = grad if right is None else grad @ right.to(grad.dtype)  # [B, T, Q]
    return F.embedding(index, left).to(grad.dtype).mT @ columns
