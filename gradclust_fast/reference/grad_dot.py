"""Inner products of per-example gradients of a linear layer with factored centres."""

from __future__ import annotations

import torch

from .common import project_act, upcast


def grad_dot(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> torch.Tensor:
    """⟨G_b, C_k⟩ = Σ_t Σ_r (grad[b, t]·center_grad[k, r]) (act[b, t]·center_act[k, r])."""
    act, grad = upcast(act), upcast(grad)  # [B, T, I], [B, T, O]
    K = center_grad.shape[0]
    left = center_grad.flatten(0, -2).mT.to(grad.dtype)  # [O, K·r]
    right = center_act.flatten(0, -2).mT  # [I (+ 1), K·r]
    product = (grad @ left) * project_act(act, right, bias)  # [B, T, K·r]
    rank = center_grad.shape[1] if center_grad.dim() == 3 else 1
    return product.sum(1).reshape(act.shape[0], K, rank).sum(2)
