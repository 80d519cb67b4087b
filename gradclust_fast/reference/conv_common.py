"""Shared by the conv references: the padded image seen through the kernel, never unfolded for a whole batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def accumulate_dtype(tensor: torch.Tensor) -> torch.Tensor:
    """float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def batches(act: torch.Tensor, grad: torch.Tensor, workspace: int) -> Iterator[slice]:
    """Slices of the batch whose workspace, so many numbers an example, stays small; none where every sum is empty."""
    if grad.shape[2:].numel() == 0:
        return
    budget = 1 << 22 if act.device.type == "cpu" else 1 << 26  # 16 MiB of float32; a GPU needs more to be full
    step = max(1, budget // max(1, workspace))
    for start in range(0, act.shape[0], step):
        yield slice(start, start + step)


def group_rows(grad: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, O, *out] → [B, groups, O/groups, T] in the accumulator's dtype."""
    T = grad.shape[2:].numel()
    return accumulate_dtype(grad).reshape(grad.shape[0], groups, grad.shape[1] // groups, T)


def windows(
    act: torch.Tensor,
    out_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """View [B, C, *kernel_size, *out_size] of the padded image: what each kernel element sees. Nothing is unfolded."""
    image = pad(accumulate_dtype(act), padding)
    steps = image.stride()[2:]
    return image.as_strided(
        (*image.shape[:2], *kernel_size, *out_size),
        (
            *image.stride()[:2],
            *(d * step for d, step in zip(dilation, steps)),
            *(s * step for s, step in zip(stride, steps)),
        ),
    )


def pad(act: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    """Zeros before and after each spatial dimension."""
    if not any(padding):
        return act
    return F.pad(act, [p for i in range(len(padding) - 2, -1, -2) for p in padding[i : i + 2]])


def elements(kernel_size: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of the kernel's elements, in the order of the columns of G_b."""
    return list(product(*map(range, kernel_size)))


def gradient_columns(windows: torch.Tensor, rows: torch.Tensor, element: tuple[int, ...]) -> torch.Tensor:
    """G_b's columns of one kernel element [B, groups, n, C_in/groups], from rows [B, groups, n, T].

    Column c·prod(kernel) + δ of G_b is entry (δ, c): one kernel element at a time, nothing is unfolded.
    """
    B, groups, _, T = rows.shape
    seen = windows
    for index in element:
        seen = seen.select(2, index)
    return rows @ seen.reshape(B, groups, windows.shape[1] // groups, T).mT


def filtered(
    act: torch.Tensor,
    filters: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """Every position's patch times ``filters`` [n, I (+ 1)], as a convolution: [B, groups, n, T]."""
    n, channels = filters.shape[0], act.shape[1] // groups
    if n == 0:  # torch refuses a convolution without filters
        one = filters.new_zeros(1, filters.shape[1])
        return filtered(act, one, kernel_size, stride, padding, dilation, groups, bias)[:, :, :0]
    if channels == 0:  # torch would return nothing, not even the constant
        act, channels = act.new_zeros(act.shape[0], groups, *act.shape[2:]), 1
        filters = torch.cat([filters.new_zeros(n, math.prod(kernel_size)), filters], 1)
    constant = filters[:, -1].repeat(groups) if bias else None
    weight = (filters[:, :-1] if bias else filters).reshape(n, channels, *kernel_size)
    weight = weight.repeat(groups, *[1] * (weight.dim() - 1))
    image = accumulate_dtype(act)
    before, after = list(padding[::2]), list(padding[1::2])
    if before != after:
        image, before = pad(image, padding), [0] * len(before)
    conv = CONV[len(kernel_size)]
    out = conv(image, weight, constant, list(stride), before, list(dilation), groups)
    return out.reshape(act.shape[0], groups, n, out.shape[2:].numel())


def weight_gradient(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    """Σ_b G_b [O, I (+ 1)] in the factors' dtype, by the convolution that a backward computes."""
    O, C = grad.shape[1], act.shape[1] // groups
    total = grad.sum([0, *range(2, grad.dim())])[:, None]  # [O, 1]
    weight = act.new_empty(1).expand(O, C, *kernel_size)  # for its shape
    if weight.numel() == 0 or act.numel() == 0 or grad.numel() == 0:
        found = total.new_zeros(O, weight.shape[1:].numel())
    else:
        before = list(padding[::2])
        if before != list(padding[1::2]):
            act, before = pad(act, padding), [0] * len(before)
        found = torch.ops.aten.convolution_backward(
            *(grad, act, weight, None, list(stride), before, list(dilation)),
            *(False, [0] * len(before), groups, [False, True, False]),
        )[1].flatten(1)
    return torch.cat([found, total], 1) if bias else found
