"""Several quantities of the same per-example gradients of a linear layer."""

from __future__ import annotations

import torch

from .grad_dot import grad_dot
from .grad_sketch import grad_sketch
from .grad_sqnorm import grad_sqnorm


def grad_quantities(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> list[torch.Tensor]:
    """Those asked for, in the order sqnorm, sketch, dot."""
    out = []
    if sqnorm:
        out.append(grad_sqnorm(act, grad, bias))
    if left is not None or right is not None:
        out.append(grad_sketch(act, grad, left, right, bias))
    if center_grad is not None and center_act is not None:
        out.append(grad_dot(act, grad, center_grad, center_act, bias))
    return out
