"""First and second moments of per-example gradients of a linear layer."""

from __future__ import annotations

import torch

from .common import upcast

CHUNK = 1 << 24
"""Elements of G held at a time."""


def grad_moments(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_b G_b and Σ_b G_b∘G_b; a few G_b exist at a time, or none when each has one position."""
    act, grad = upcast(act), upcast(grad)  # [B, T, I], [B, T, O]
    B, T, O = grad.shape
    if bias:
        act = torch.cat([act, act.new_ones(B, T, 1)], 2)
    I = act.shape[2]
    first = grad.reshape(B * T, O).mT @ act.reshape(B * T, I)
    if T == 1:
        return first, grad[:, 0].square().mT @ act[:, 0].square()
    second = torch.zeros_like(first)
    step = max(1, CHUNK // max(1, O * I))
    for a, d in zip(act.split(step), grad.split(step)):
        second += (d.mT @ a).square().sum(0)
    return first, second
