"""Inner products of the per-example gradients of a convolution with low-rank centres."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .conv_common import batches, elements, filtered, gradient_columns, group_rows, windows


def conv_dot(
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """⟨G_b, C_k⟩: the centres as filters, multiplied and summed over positions; through G_b where that is cheaper."""
    geometry = (kernel_size, stride, padding, dilation)
    B, O, C, T = act.shape[0], grad.shape[1], act.shape[1] // groups, grad.shape[2:].numel()
    kernel, K = math.prod(kernel_size), center_grad.shape[0]
    rows = group_rows(grad, groups)  # [B, groups, O/groups, T]
    rank = center_grad.shape[1] if center_grad.dim() == 3 else 1
    D = center_grad.to(rows.dtype).reshape(K, rank, O)
    A = center_act.to(rows.dtype).reshape(K, rank, C * kernel + bias)  # [K, r, I (+ 1)]
    out = rows.new_zeros(B, K)
    if T * K * rank * (groups * C * kernel + O) <= O * C * kernel * (T + K):
        mixers = D.reshape(K * rank, groups, O // groups).transpose(0, 1)  # [groups, K·r, O/groups]
        filters = A.flatten(0, 1)
        for part in batches(act, grad, 2 * groups * K * rank * T):
            products = (mixers @ rows[part]) * filtered(act[part], filters, *geometry, groups, bias)
            out[part] = products.sum((1, 3)).unflatten(1, (K, rank)).sum(2)
        return out
    for index, element in enumerate(elements(kernel_size)):
        centres = torch.einsum("kro,krc->koc", D, A[..., index : C * kernel : kernel])  # the element's columns of C_k
        for part in batches(act, grad, act.shape[1] * T + O * C):
            view = windows(act[part], grad.shape[2:], *geometry)
            out[part] += gradient_columns(view, rows[part], element).flatten(1) @ centres.flatten(1).mT
    return out + rows.sum(3).flatten(1) @ (D * A[..., -1:]).sum(1).mT if bias else out
