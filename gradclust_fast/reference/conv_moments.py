"""Sums over the batch of the per-example gradients of a convolution and of their squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .conv_common import batches, elements, gradient_columns, group_rows, windows


def conv_moments(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_b G_b, Σ_b G_b∘G_b), one kernel element's columns of a few examples at a time."""
    C, O, T = act.shape[1] // groups, grad.shape[1], grad.shape[2:].numel()
    kernel = math.prod(kernel_size)
    rows = group_rows(grad, groups)  # [B, groups, O/groups, T]
    first, second = (rows.new_zeros(groups, O // groups, C, kernel) for _ in range(2))
    for part in batches(act, grad, act.shape[1] * T + O * C):
        view = windows(act[part], grad.shape[2:], kernel_size, stride, padding, dilation)
        for index, element in enumerate(elements(kernel_size)):
            G = gradient_columns(view, rows[part], element)
            first[..., index] += G.sum(0)
            second[..., index] += G.square().sum(0)
    first, second = first.reshape(O, C * kernel), second.reshape(O, C * kernel)
    if not bias:
        return first, second
    total = rows.sum(3).reshape(-1, O, 1)  # [B, O, 1]
    return torch.cat([first, total.sum(0)], 1), torch.cat([second, total.square().sum(0)], 1)
