"""Cheapest cluster of every example, from inner products.

Not measured on a GPU yet. ``dot`` is read once, so the floor is memory: every thread keeps the smallest cost of its own
columns and where it was, and columns meet once, at the end of the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _support
from ._support import blocks, launch, power_of_two, unit


@triton.jit
def cheaper(value, index, best, best_index):
    """Does (value, index) come before (best, best_index)? NaN first, as in torch's argmin; then by index."""
    nan, best_nan = value != value, best != best
    less = (nan & (best_nan == 0)) | (value < best)
    equal = (nan & best_nan) | (value == best)
    return less | (equal & (index < best_index))


@triton.jit
def first_cheapest(value, index):
    """Of every row of [ROWS, BLOCK]: the smallest value (NaN if there is one) and the lowest index that has it."""
    nan = value != value
    no_index = tl.full(value.shape, 2147483647, tl.int32)
    any_nan = tl.max(nan.to(tl.int32), 1) == 1
    infinity = tl.full(value.shape, float("inf"), value.dtype)
    smallest = tl.min(tl.where(nan, infinity, value), 1)
    wanted = tl.where(any_nan[:, None], nan, value == smallest[:, None])
    at = tl.min(tl.where(wanted, index, no_index), 1)
    return tl.where(any_nan, float("nan"), smallest), at


@triton.jit
def with_columns(
    dot_ptr, center_sqnorm_ptr, counts_ptr, grad_sqnorm, live, begin, K, stride_center, stride_counts, best, best_index,
    WEIGHTED: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The best so far and columns begin .. begin + BLOCK; the LAST ones may end before."""
    acc = best.dtype
    k = begin + tl.arange(0, BLOCK)
    valid = k < K if LAST else k >= 0
    mask = live[:, None] & valid[None, :] if LAST else live[:, None]
    center_sqnorm = tl.load(center_sqnorm_ptr + k * stride_center, mask=valid, other=float("inf")).to(acc)
    dot = tl.load(dot_ptr + k[None, :], mask=mask, other=0.0).to(acc)
    cost = (center_sqnorm[None, :] - 2 * dot) + grad_sqnorm[:, None]
    if WEIGHTED:
        cost *= (tl.load(counts_ptr + k * stride_counts, mask=valid, other=0).to(acc) + 1)[None, :]
    if LAST:
        cost = tl.where(valid[None, :], cost, float("inf"))  # not NaN, whatever the row's norm is
    index = tl.zeros_like(best_index) + k[None, :].to(tl.int32)
    take = cheaper(cost, index, best, best_index)
    return tl.where(take, cost, best), tl.where(take, index, best_index)


@triton.jit(do_not_specialize=["B", "K", "stride_dot"])
def assign_kernel(
    dot_ptr, center_sqnorm_ptr, grad_sqnorm_ptr, counts_ptr, label_ptr, cost_ptr, B, K,
    stride_dot, stride_center, stride_grad, stride_counts, WEIGHTED: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    acc = cost_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < B
    grad_sqnorm = tl.load(grad_sqnorm_ptr + row * stride_grad, mask=live, other=0.0).to(acc)
    best = tl.full((ROWS, BLOCK), float("inf"), acc)
    best_index = tl.zeros((ROWS, BLOCK), tl.int32) + tl.arange(0, BLOCK)[None, :]
    dot_ptr += row[:, None] * (stride_dot * UNIT)
    whole = K // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):  # without a mask on k, which would take the 16-byte loads apart
        best, best_index = with_columns(
            dot_ptr, center_sqnorm_ptr, counts_ptr, grad_sqnorm, live, begin, K, stride_center, stride_counts, best,
            best_index, WEIGHTED, False, BLOCK,
        )  # fmt: skip
    if whole < K:
        best, best_index = with_columns(
            dot_ptr, center_sqnorm_ptr, counts_ptr, grad_sqnorm, live, whole, K, stride_center, stride_counts, best,
            best_index, WEIGHTED, True, BLOCK,
        )  # fmt: skip
    cost, label = first_cheapest(best, best_index)
    tl.store(label_ptr + row, label.to(tl.int64), mask=live)
    tl.store(cost_ptr + row, cost, mask=live)


def assign(
    dot: torch.Tensor,
    center_sqnorm: torch.Tensor,
    grad_sqnorm: torch.Tensor,
    counts: torch.Tensor | None,
    label: torch.Tensor,
    cost: torch.Tensor,
) -> None:
    """dot [B, K] with column stride 1; fills label [B] and cost [B]."""
    B, K = dot.shape
    small = _support.target(dot.device).interpreter
    BLOCK = power_of_two(K, 16, 32 if small else 256)
    ROWS = 64 if small else max(1, 2048 // BLOCK)
    UNIT = unit(dot.stride(0))
    launch(
        assign_kernel, (blocks(B, ROWS),), dot, center_sqnorm, grad_sqnorm, dot if counts is None else counts, label,
        cost, B, K, dot.stride(0) // UNIT, center_sqnorm.stride(0), grad_sqnorm.stride(0),
        0 if counts is None else counts.stride(0), counts is not None, UNIT, ROWS, BLOCK, num_warps=4,
        device=dot.device,
    )  # fmt: skip
