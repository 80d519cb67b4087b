"""Pairwise inner products of the per-example gradients of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .conv_common import elements, gradient_columns, group_rows, windows


def conv_gram(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """⟨G_b, G_c⟩: one kernel element's columns of every G_b at a time, or by pairs of positions where there are few."""
    geometry = (kernel_size, stride, padding, dilation)
    B, C, O = act.shape[0], act.shape[1] // groups, grad.shape[1] // groups
    out_size, T = grad.shape[2:], grad.shape[2:].numel()
    I = C * math.prod(kernel_size)
    rows = group_rows(grad, groups)  # [B, groups, O, T]
    total = rows.sum(3).flatten(1)  # [B, groups·O]
    out = total @ total.mT if bias else rows.new_zeros(B, B)
    if B == 0 or T == 0:
        return out
    if T * T * B * (I + O) <= I * O * (T + B):
        patches = windows(act, out_size, *geometry).reshape(B, groups, I, T)
        for group in range(groups):
            out += _by_positions(patches[:, group].mT, rows[:, group].mT)
        return out
    view = windows(act, out_size, *geometry)
    for element in elements(kernel_size):
        for some in rows.split(max(1, (1 << 22) // max(1, B * groups * C)), dim=2):  # bounded workspace
            G = gradient_columns(view, some, element).flatten(1)  # [B, groups·o·C]
            out += G @ G.mT
    return out


def _by_positions(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Σ_{s,t} (act_b[s]·act_c[t])(grad_b[s]·grad_c[t]) of act [B, T, I] and grad [B, T, O].

    With more than one position, act is centred over its example's positions: G_b = Σ_t grad[t](act[t] − ā)ᵀ + s āᵀ
    with s = Σ_t grad[t] is again a sum of outer products, one more, and near-constant activations do not cancel.
    """
    B, T = act.shape[:2]
    if T > 1:
        mean = act.mean(1, keepdim=True)
        act, grad = torch.cat([act - mean, mean], 1), torch.cat([grad, grad.sum(1, keepdim=True)], 1)
        T += 1
    act, grad = act.flatten(0, 1), grad.flatten(0, 1)
    step = T * max(1, (1 << 22) // (T * T * B))  # whole examples, bounded workspace
    return torch.cat(
        [
            ((a @ act.mT) * (d @ grad.mT)).reshape(-1, T, B, T).sum((1, 3))
            for a, d in zip(act.split(step), grad.split(step))
        ]
    )
