"""Per-example gradients of a normalisation layer's weight and bias.

Not measured on a GPU yet. Memory-bound: one kernel reads the input for the means and deviations of rows (or of an
example's groups of channels), a second one the input and the gradient for the sums; x̂ is made in registers. A program
owns its outputs: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _support
from ._support import blocks, launch, power_of_two, unit


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t"])
def norm_grads_row_statistics_kernel(
    input_ptr, mean_ptr, scale_ptr, N, T, D, stride_b, stride_t, eps, UNIT: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean, scale [N = B·T]: what is taken off a row of D features and what it is multiplied by."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < N)[:, None]
    from_ptr = input_ptr + (row // T)[:, None] * (stride_b * UNIT) + (row % T)[:, None] * (stride_t * UNIT)
    feature = tl.arange(0, BLOCK)
    mean = tl.zeros((ROWS,), tl.float32)
    if not RMS:
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for begin in range(0, D, BLOCK):
            at = begin + feature
            sums += tl.load(from_ptr + at[None, :], mask=live & (at < D)[None, :], other=0.0).to(tl.float32)
        mean = tl.sum(sums, 1) / D
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, D, BLOCK):
        at = begin + feature
        mask = live & (at < D)[None, :]
        x = tl.load(from_ptr + at[None, :], mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        squares += tl.where(mask, x * x, 0.0)
    tl.store(mean_ptr + row, mean, mask=row < N)
    tl.store(scale_ptr + row, 1 / tl.sqrt(tl.sum(squares, 1) / D + eps), mask=row < N)


@triton.jit(do_not_specialize=["T", "stride_b", "stride_t", "stride_grad_b", "stride_grad_t"])
def norm_grads_rows_kernel(
    input_ptr, grad_ptr, mean_ptr, scale_ptr, weight_ptr, bias_ptr, T, D, stride_b, stride_t, stride_grad_b,
    stride_grad_t, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight, bias [B, D]: an example and a block of features a program."""
    b = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (feature < D)[None, :]
    weight = tl.zeros((ROWS, BLOCK), tl.float32)
    bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, T, ROWS):
        t = begin + tl.arange(0, ROWS).to(tl.int64)
        mask = (t < T)[:, None] & inside
        at = b * (stride_b * UNIT) + t[:, None] * (stride_t * UNIT) + feature[None, :]
        x = tl.load(input_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = b * (stride_grad_b * UNIT) + t[:, None] * (stride_grad_t * UNIT) + feature[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + b * T + t, mask=t < T, other=0.0)
        scale = tl.load(scale_ptr + b * T + t, mask=t < T, other=0.0)
        weight += grad * ((x - mean[:, None]) * scale[:, None])
        bias += grad
    tl.store(weight_ptr + b * D + feature, tl.sum(weight, 0), mask=feature < D)
    tl.store(bias_ptr + b * D + feature, tl.sum(bias, 0), mask=feature < D)


@triton.jit(do_not_specialize=["G", "members", "stride_b", "stride_c"])
def norm_grads_group_statistics_kernel(
    input_ptr, mean_ptr, scale_ptr, G, members, S, stride_b, stride_c, eps, UNIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """mean, scale [B·G] of ``members`` channels of S positions each."""
    group = tl.program_id(0).to(tl.int64)
    from_ptr = input_ptr + group // G * (stride_b * UNIT) + group % G * members * (stride_c * UNIT)
    size = (members * S).to(tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, members, ROWS):
        c = start + tl.arange(0, ROWS).to(tl.int64)
        for begin in range(0, S, BLOCK):
            s = begin + tl.arange(0, BLOCK)
            mask = (c < members)[:, None] & (s < S)[None, :]
            sums += tl.load(from_ptr + c[:, None] * (stride_c * UNIT) + s[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(sums, 1), 0) / size
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, members, ROWS):
        c = start + tl.arange(0, ROWS).to(tl.int64)
        for begin in range(0, S, BLOCK):
            s = begin + tl.arange(0, BLOCK)
            mask = (c < members)[:, None] & (s < S)[None, :]
            x = tl.load(from_ptr + c[:, None] * (stride_c * UNIT) + s[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += tl.where(mask, (x - mean) * (x - mean), 0.0)
    tl.store(mean_ptr + group, mean)
    tl.store(scale_ptr + group, 1 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / size + eps))


@triton.jit(do_not_specialize=["C", "G", "members", "stride_b", "stride_c", "stride_grad_b", "stride_grad_c"])
def norm_grads_channels_kernel(
    input_ptr, grad_ptr, mean_ptr, scale_ptr, weight_ptr, bias_ptr, C, G, members, S, stride_b, stride_c,
    stride_grad_b, stride_grad_c, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight, bias [B, C]: an example and ROWS channels a program."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    live = c < C
    mean = tl.load(mean_ptr + b * G + c // members, mask=live, other=0.0)
    scale = tl.load(scale_ptr + b * G + c // members, mask=live, other=0.0)
    weight = tl.zeros((ROWS, BLOCK), tl.float32)
    bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, S, BLOCK):
        s = begin + tl.arange(0, BLOCK)
        mask = live[:, None] & (s < S)[None, :]
        at = b * (stride_b * UNIT) + c[:, None] * (stride_c * UNIT) + s[None, :]
        x = tl.load(input_ptr + at, mask=mask, other=0.0).to(tl.float32)
        at = b * (stride_grad_b * UNIT) + c[:, None] * (stride_grad_c * UNIT) + s[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        weight += grad * ((x - mean[:, None]) * scale[:, None])
        bias += grad
    tl.store(weight_ptr + b * C + c, tl.sum(weight, 1), mask=live)
    tl.store(bias_ptr + b * C + c, tl.sum(bias, 1), mask=live)


def norm_grads(
    input: torch.Tensor,
    grad: torch.Tensor,
    groups: int,
    eps: float,
    rms: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
) -> None:
    """input, grad [B, T, D] (or, with groups, [B, C, S]) with last stride 1; fills weight and bias in float32."""
    B, T, D = input.shape
    small = _support.target(input.device).interpreter
    rows = B * groups if groups else B * T
    mean, scale = (input.new_empty(rows, dtype=torch.float32) for _ in range(2))
    strides = (input.stride(0), input.stride(1))
    grad_strides = (grad.stride(0), grad.stride(1))
    UNIT = unit(*strides, *grad_strides)
    strides, grad_strides = ((a // UNIT, b // UNIT) for a, b in (strides, grad_strides))
    BLOCK = power_of_two(D, 16, 128 if small else 256 if groups else 1024)
    ROWS = 8 if small or groups else max(1, 2048 // BLOCK)
    if groups:
        launch(
            norm_grads_group_statistics_kernel, (rows,), input, mean, scale, groups, T // groups, D, *strides, eps,
            UNIT, ROWS, BLOCK, num_warps=4, device=input.device,
        )  # fmt: skip
        launch(
            norm_grads_channels_kernel, (B, blocks(T, ROWS)), input, grad, mean, scale, weight, bias, T, groups,
            T // groups, D, *strides, *grad_strides, UNIT, ROWS, BLOCK, num_warps=4, device=input.device,
        )  # fmt: skip
        return
    launch(
        norm_grads_row_statistics_kernel, (blocks(rows, ROWS),), input, mean, scale, rows, T, D, *strides, eps, UNIT,
        rms, ROWS, BLOCK, num_warps=4, device=input.device,
    )  # fmt: skip
    BLOCK = power_of_two(D, 16, 128)
    launch(
        norm_grads_rows_kernel, (B, blocks(D, BLOCK)), input, grad, mean, scale, weight, bias, T, D, *strides,
        *grad_strides, UNIT, 8 if small else 2048 // BLOCK, BLOCK, num_warps=4, device=input.device,
    )  # fmt: skip
