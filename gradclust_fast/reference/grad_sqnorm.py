"""Per-example squared gradient norms of a linear layer."""

from __future__ import annotations

import torch

from .common import sums, upcast


def grad_sqnorm(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    """‖G_b‖² without storing G_b: the centred Gram sum, or G_b itself where that is cheaper.

    Both factors are centred, ``G = D̃ᵀÃ + s āᵀ`` with ``s = Σ_t D[t]``, so that near-constant ones keep their digits,
    and scaled by powers of two, so that no square leaves the range although the norm does not.
    """
    act, act_exponent = _scaled(upcast(act))  # [B, T, I]
    grad, grad_exponent = _scaled(upcast(grad))  # [B, T, O]
    T, I, O = act.shape[1], act.shape[2], grad.shape[2]
    total, grad_mean = sums(grad)  # [B, 1, O]
    if T == 1:
        sqnorm = act.square().sum((1, 2)) * grad.square().sum((1, 2))
    else:
        _, mean = sums(act)  # [B, 1, I]
        act, grad = act - mean, grad - grad_mean
        if T * (I + O) <= 2 * I * O:
            gram = (act @ act.mT) * (grad @ grad.mT)  # [B, T, T]
            cross = (grad @ total.mT) * (act @ mean.mT)  # [B, T, 1]
            ends = total.square().sum((1, 2)) * mean.square().sum((1, 2))
            sqnorm = gram.sum((1, 2)) + 2 * cross.sum((1, 2)) + ends
        else:
            sqnorm = (grad.mT @ act + total.mT @ mean).square().sum((1, 2))
    sqnorm = torch.ldexp(torch.ldexp(sqnorm, act_exponent + grad_exponent), act_exponent + grad_exponent)
    if not bias:
        return sqnorm
    return sqnorm + torch.ldexp(torch.ldexp(total.square().sum((1, 2)), grad_exponent), grad_exponent)


def _scaled(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, F] → rows · 2^−e and e [B], that of an example's largest magnitude; 0 where something is not finite."""
    if not rows.numel():
        return rows, torch.zeros(rows.shape[0], dtype=torch.int32, device=rows.device)
    _, exponent = torch.frexp(rows.abs().amax((1, 2)))
    exponent = torch.where(rows.isfinite().all(2).all(1), exponent, 0).clamp(-126, 126)  # a factor in float32's range
    return torch.ldexp(rows, -exponent[:, None, None]), exponent
