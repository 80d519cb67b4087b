"""Per-example squared gradient norms of a linear layer."""

from __future__ import annotations

import torch

from .common import upcast


def grad_sqnorm(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    """‖G_b‖² without storing G_b: the centred Gram sum, or G_b itself where that is cheaper."""
    act, grad = upcast(act), upcast(grad)  # [B, T, I], [B, T, O]
    T, I, O = act.shape[1], act.shape[2], grad.shape[2]
    total = grad.sum(1)  # [B, O]
    if T == 1:
        sqnorm = act.square().sum((1, 2)) * grad.square().sum((1, 2))
    elif T > 1 and T * (I + O) <= 2 * I * O:
        mean = act.mean(1, keepdim=True)  # [B, 1, I]
        centred = act - mean
        gram = (centred @ centred.mT) * (grad @ grad.mT)  # [B, T, T]
        cross = (grad @ total.unsqueeze(2)).squeeze(2) * (centred @ mean.mT).squeeze(2)  # [B, T]
        sqnorm = gram.sum((1, 2)) + 2 * cross.sum(1) + total.square().sum(1) * mean.square().sum((1, 2))
    else:
        sqnorm = (grad.mT @ act).square().sum((1, 2))
    return sqnorm + total.square().sum(1) if bias else sqnorm
