"""Weight gradient of a linear layer, and the squared norms of the per-example gradients it is the sum of."""

from __future__ import annotations

import torch

from .common import upcast
from .grad_sqnorm import grad_sqnorm


def grad_weight_sqnorm(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_b G_b in ``dtype`` (None: the accumulator's) and ‖G_b‖²."""
    rows, d = upcast(act), upcast(grad)  # [B, T, I], [B, T, O]
    if bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    weight_grad = d.flatten(0, 1).mT @ rows.flatten(0, 1)
    return weight_grad.to(dtype or d.dtype), grad_sqnorm(act, grad, bias)
