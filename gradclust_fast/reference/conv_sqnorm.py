"""Per-example squared gradient norms of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .conv_common import batches, elements, gradient_columns, group_rows, windows
from .grad_sqnorm import grad_sqnorm


def conv_sqnorm(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """‖G_b‖²: one kernel element's columns of G_b at a time, or the Gram sum of the patches where that is cheaper."""
    B, C, O = act.shape[0], act.shape[1] // groups, grad.shape[1] // groups
    out_size, T = grad.shape[2:], grad.shape[2:].numel()
    I = C * math.prod(kernel_size)
    gram = T * (I + O) <= 2 * I * O
    rows = group_rows(grad, groups)  # [B, groups, O, T]
    out = rows.new_zeros(B)
    for part in batches(act, grad, groups * (T * (I + T) if gram else T * C + O * C)):
        view = windows(act[part], out_size, kernel_size, stride, padding, dilation)
        if gram:
            patches = view.reshape(-1, I, T).mT  # [b·groups, T, I]
            sqnorm = grad_sqnorm(patches, rows[part].reshape(-1, O, T).mT, False)
            out[part] = sqnorm.reshape(-1, groups).sum(1)
        else:
            for element in elements(kernel_size):
                out[part] += gradient_columns(view, rows[part], element).square().sum((1, 2, 3))
    return out + rows.sum(3).square().sum((1, 2)) if bias else out
