"""Squared norms ‖G_b‖² of the per-example gradients of an embedding table.

Not measured on a GPU yet; the floor is counted, not timed. torch sorts an example's positions by table row; a program
walks some features of one example in that order, ROWS positions at a time. A product with the 0/1 matrix of equal rows
gives every position its run's sum (exact in the gradient's own type), a run that goes on is carried over, and where a
run ends its sum is squared. One gathered read of grad; memory does not depend on the table, and nothing is atomic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._device import product
from ._support import blocks, launch, power_of_two, unit


@triton.jit(do_not_specialize=["T", "parts", "padding", "stride_b", "stride_t"])
def embedding_sqnorm_kernel(
    row_ptr, order_ptr, grad_ptr, partial_ptr, T, D, parts, padding: tl.int64, stride_b: tl.int64, stride_t: tl.int64,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK features of one example; row and order are [B, T] int64, sorted by row; partial is [B, parts]."""
    b = (tl.program_id(0) // parts).to(tl.int64)
    feature = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, ROWS)
    rows_ptr = grad_ptr + b * (stride_b * UNIT)
    squares = tl.zeros((BLOCK,), tl.float32)
    carried = tl.zeros((BLOCK,), tl.float32)
    carried_row = tl.full((), -1, tl.int64)
    for begin in range(0, T, ROWS):
        at = begin + lane
        live = at < T
        row = tl.load(row_ptr + b * T + at, mask=live, other=-1)
        following = tl.load(row_ptr + b * T + at + 1, mask=at + 1 < T, other=-1)
        position = tl.load(order_ptr + b * T + at, mask=live, other=0)
        wanted = live & (row != padding)
        x = tl.load(
            rows_ptr + position[:, None] * (stride_t * UNIT) + feature[None, :],
            mask=wanted[:, None] & (feature < D)[None, :], other=0.0,
        )  # fmt: skip
        same = (row[:, None] == row[None, :]).to(tl.float32).to(x.dtype)
        sums = product(same, x, tl.zeros((ROWS, BLOCK), tl.float32), "ieee")
        sums += tl.where((row == carried_row)[:, None], carried[None, :], 0.0)
        ends = live & (row != following)
        squares += tl.sum(tl.where(ends[:, None], sums * sums, 0.0), 0)
        goes_on = (lane == ROWS - 1) & live & (row == following)
        carried = tl.sum(tl.where(goes_on[:, None], sums, 0.0), 0)
        carried_row = tl.max(tl.where(goes_on, row, -1), 0)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, 0))


def embedding_sqnorm(index: torch.Tensor, grad: torch.Tensor, padding: int, out: torch.Tensor) -> None:
    """index [B, T] int64, grad [B, T, D] with feature stride 1; fills out [B] in float32. padding: a row, or −1."""
    B, T, D = grad.shape
    if B == 0 or T == 0 or D == 0:
        out.zero_()
        return
    row, order = index.contiguous().sort(dim=1, stable=True)
    BLOCK = power_of_two(D, 16, 64)
    parts = blocks(D, BLOCK)
    partial = out.new_empty(B, parts)
    UNIT = unit(*grad.stride()[:2])
    launch(
        embedding_sqnorm_kernel, (B * parts,), row, order, grad, partial, T, D, parts, padding,
        *(stride // UNIT for stride in grad.stride()[:2]), UNIT, 16, BLOCK, num_warps=2, device=grad.device,
    )  # fmt: skip
    torch.sum(partial, 1, out=out)
