"""Inner products of per-example gradients of an embedding table with factored centres."""

from __future__ import annotations

import torch

from .embedding_common import flat


def embedding_dot(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    """⟨G_b, C_k⟩ = Σ_t Σ_r center_index[k, r, index[b, t]] (grad[b, t]·center_grad[k, r])."""
    index, grad = flat(index, grad, num_embeddings, padding_idx)
    B, T, D = grad.shape
    K = center_index.shape[0]
    rank = center_index.shape[1] if center_index.dim() == 3 else 1
    rows = center_index.reshape(K * rank, num_embeddings)[:, index.flatten()].to(grad.dtype)  # [K·r, B·T]
    product = rows * (center_grad.reshape(K * rank, D).to(grad.dtype) @ grad.reshape(B * T, D).mT)
    return product.reshape(K, rank, B, T).sum((1, 3)).mT.contiguous()
