"""Squared norms ‖G_b‖² of per-example gradients of a linear layer.

Not measured on a GPU yet. One position: a program takes some rows and reads both factors once, so the floor is memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _support
from ._support import blocks, launch, power_of_two, unit


@triton.jit(do_not_specialize=["B", "stride_act", "stride_grad"])
def grad_sqnorm_rows_kernel(
    act_ptr, grad_ptr, out_ptr, B: tl.int64, I, O, stride_act: tl.int64, stride_grad: tl.int64,
    BIAS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One position: ‖act‖²‖grad‖² of ROWS examples."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < B)[:, None]
    feature = tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, I, BLOCK):
        at = begin + feature
        a = tl.load(act_ptr + row[:, None] * (stride_act * UNIT) + at, mask=live & (at < I), other=0.0).to(tl.float32)
        sums += a * a
    act_sqnorm = tl.sum(sums, 1)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, O, BLOCK):
        at = begin + feature
        d = tl.load(grad_ptr + row[:, None] * (stride_grad * UNIT) + at, mask=live & (at < O), other=0.0).to(tl.float32)
        sums += d * d
    if BIAS:
        act_sqnorm += 1.0
    tl.store(out_ptr + row, act_sqnorm * tl.sum(sums, 1), mask=row < B)


def grad_sqnorm(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor) -> None:
    """act [B, T, I], grad [B, T, O] with feature stride 1; fills out [B] in float32."""
    rows(act, grad, bias, out)


def rows(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor) -> None:
    B, _, I = act.shape
    O = grad.shape[2]
    target = _support.target(act.device)
    BLOCK = power_of_two(max(I, O), 16, 16 if target.interpreter else 1024)
    ROWS = max(1, (64 if target.interpreter else 4096) // BLOCK)
    UNIT = unit(act.stride(0), grad.stride(0))
    launch(
        grad_sqnorm_rows_kernel, (blocks(B, ROWS),), act, grad, out, B, I, O, act.stride(0) // UNIT,
        grad.stride(0) // UNIT, bias, UNIT, ROWS, BLOCK, num_warps=4, device=act.device,
    )  # fmt: skip
