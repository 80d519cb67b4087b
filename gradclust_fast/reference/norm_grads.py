"""Per-example gradients of a normalisation layer's weight and bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def norm_grads(
    input: torch.Tensor, grad: torch.Tensor, groups: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_t grad∘x̂ and Σ_t grad, with x̂ made again in the accumulator's precision."""
    if input.dtype != torch.float64:
        input, grad = input.float(), grad.float()
    B = input.shape[0]
    if groups:
        C, S = input.shape[1], input.shape[2:].numel()
        if S == 0 or B == 0:
            return (grad.new_zeros(B, C), grad.new_zeros(B, C))
        x = input.reshape(B, C, S)
        normalised = torch.group_norm(x, groups, None, None, eps)
        grad = grad.reshape(B, C, S)
        return (grad * normalised).sum(2), grad.sum(2)
    T, D = input.shape[1:-1].numel(), input.shape[-1]
    x, grad = input.reshape(B, T, D), grad.reshape(B, T, D)
    if x.numel() == 0:
        return grad.new_zeros(B, D), grad.new_zeros(B, D)
    normalised = F.rms_norm(x, (D,), None, eps) if rms else F.layer_norm(x, (D,), None, None, eps)
    return (grad * normalised).sum(1), grad.sum(1)
