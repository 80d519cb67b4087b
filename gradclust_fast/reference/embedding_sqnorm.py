"""Per-example squared gradient norms of an embedding table."""

from __future__ import annotations

import torch

from .embedding_common import add_rows, table_rows


def embedding_sqnorm(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    """‖G_b‖² = Σ_v ‖Σ_{t: index = v} grad[b, t]‖²: positions that share a row are added before they are squared."""
    example, _, values = table_rows(index, grad, num_embeddings, padding_idx)
    return add_rows(values.new_zeros(index.shape[0]), example, values.square().sum(1))
