"""Two-sided projections of the per-example gradients of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .conv_common import batches, elements, filtered, gradient_columns, group_rows, windows


def conv_sketch(
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """leftᵀ G_b right: right's columns are filters of the image, left mixes grad's channels, then a sum over positions.

    G_b's rows come in groups: without left they are stacked, with left their projections add up.
    """
    geometry = (kernel_size, stride, padding, dilation)
    B, O, C, T = act.shape[0], grad.shape[1], act.shape[1] // groups, grad.shape[2:].numel()
    rows = group_rows(grad, groups)  # [B, groups, O/groups, T]
    if left is not None:
        rows = left.to(rows.dtype).reshape(groups, O // groups, left.shape[1]).mT @ rows  # [B, groups, P, T]
    P = rows.shape[2]
    if right is not None:
        filters = right.to(rows.dtype).mT  # [Q, I (+ 1)]
        out = rows.new_zeros(B, groups, P, filters.shape[0])
        for part in batches(act, grad, groups * filters.shape[0] * T):
            out[part] = rows[part] @ filtered(act[part], filters, *geometry, groups, bias).mT
    else:
        kernel = math.prod(kernel_size)
        out = rows.new_zeros(B, groups, P, C * kernel + bias)
        for part in batches(act, grad, act.shape[1] * T + groups * P * C):
            view = windows(act[part], grad.shape[2:], *geometry)
            for index, element in enumerate(elements(kernel_size)):
                out[part, ..., index : C * kernel : kernel] = gradient_columns(view, rows[part], element)
        if bias:
            out[..., -1] = rows.sum(3)
    return out.reshape(B, O, out.shape[3]) if left is None else out.sum(1)
