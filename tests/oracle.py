"""The float64 oracle: per-example gradients by a loop over single examples, as literally as possible."""

from __future__ import annotations

import torch


def linear_grads(act: torch.Tensor, grad: torch.Tensor, bias: bool = False) -> torch.Tensor:
    """G_b of act [B, *, I], grad [B, *, O]: [B, O, I], or [B, O, I + 1] with the bias gradient as the last column."""
    rows = []
    for a, d in zip(act.double().cpu(), grad.double().cpu()):
        a, d = a.reshape(-1, act.shape[-1]), d.reshape(-1, grad.shape[-1])
        G = d.new_zeros(d.shape[1], a.shape[1] + bias)  # [O, I (+ 1)]
        for t in range(a.shape[0]):
            G += torch.outer(d[t], torch.cat([a[t], a.new_ones(1)]) if bias else a[t])
        rows.append(G)
    if not rows:
        return torch.zeros(0, grad.shape[-1], act.shape[-1] + bias, dtype=torch.float64)
    return torch.stack(rows)
