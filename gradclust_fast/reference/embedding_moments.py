"""First and second moments of per-example gradients of an embedding table."""

from __future__ import annotations

import torch

from .embedding_common import add_rows, table_rows


def embedding_moments(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_b G_b and Σ_b G_b∘G_b [V, D]; a row that no position points to is zero."""
    _, row, values = table_rows(index, grad, num_embeddings, padding_idx)
    first, second = (values.new_zeros(num_embeddings, values.shape[1]) for _ in range(2))
    return add_rows(first, row, values), add_rows(second, row, values.square())
