"""Two-sided projections of per-example gradients of a linear layer."""

from __future__ import annotations

import torch

from .common import project_act, upcast


def grad_sketch(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> torch.Tensor:
    """leftᵀ G_b right as (grad left)ᵀ (act right): both factors are projected before they meet."""
    act, grad = upcast(act), upcast(grad)  # [B, T, I], [B, T, O]
    rows = grad if left is None else grad @ left.to(grad.dtype)  # [B, T, P]
    columns = project_act(act, right, bias)  # [B, T, Q]
    return rows.mT @ columns
