"""Sums of per-example gradients of an embedding table and of their squares, Σ_b G_b and Σ_b G_b∘G_b.

Not measured on a GPU yet; the floor is counted, not timed: one gathered read of grad, and the rows that somebody looked
up written once. torch sorts the batch's positions by table row, stably, so a row's positions come example by example.
The list is cut into pieces; a program sums those examples' rows that begin in its piece, ROWS positions at a time:
every position gets its example's sum, the last of an example adds it and its square to the table row's. Sums that go on
past a tile are carried over. They are masked, not multiplied by 0: a NaN stays in its row of the table.

A table row within one piece is written at once. One that goes on into others leaves a sum in each, which a second
kernel adds up in order: a row that half of the batch looks up is the work of many programs. No atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._support import Target, blocks, launch, power_of_two, unit

_SIZES = ["n", "T", "piece", "padding", "stride_b", "stride_t"]


@triton.jit
def _opened(row_ptr, at, n):
    """The table row that sorted positions at − 1 and ``at`` both look up, or −1."""
    inner = (at > 0) & (at < n)
    before = tl.load(row_ptr + at - 1, mask=inner, other=-1)
    return tl.where(tl.load(row_ptr + at, mask=inner, other=-2) == before, before, -1)


@triton.jit
def _next_begin(row_ptr, order_ptr, at, n, T, WIDTH: tl.constexpr):
    """The first sorted position from ``at`` on with another table row or example than the one before it, or n."""
    lane = tl.arange(0, WIDTH)
    searching = (at > 0) & (at < n)
    while searching:
        p = at + lane
        inner = p < n
        changes = tl.load(row_ptr + p, mask=inner, other=-1) != tl.load(row_ptr + p - 1, mask=inner, other=-1)
        example = tl.load(order_ptr + p, mask=inner, other=0) // T
        changes |= example != tl.load(order_ptr + p - 1, mask=inner, other=0) // T
        steps = tl.min(tl.where(changes | (p >= n), lane, WIDTH), 0)
        searching = steps == WIDTH
        at += steps
    return tl.minimum(at, n)


@triton.jit
def _same_sums(same, x):
    """For every i the sum of x[j] over same[i, j]."""
    return tl.sum(tl.where(same[:, :, None], x[None, :, :], 0.0), 1)


@triton.jit(do_not_specialize=_SIZES)
def embedding_moments_pieces_kernel(
    row_ptr, order_ptr, grad_ptr, first_ptr, second_ptr, part_ptr, n: tl.int64, T, D, piece, padding: tl.int64,
    stride_b: tl.int64, stride_t: tl.int64, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece and BLOCK features; row and order [n] int64; part [pieces, 4, D]: both sums of the table row that came
    in from the piece before, and of the one that goes on into the next."""
    begin = tl.program_id(0).to(tl.int64) * piece
    feature = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (feature < D)[None, :]
    lane = tl.arange(0, ROWS)
    head, tail = _opened(row_ptr, begin, n), _opened(row_ptr, begin + piece, n)
    end = _next_begin(row_ptr, order_ptr, begin + piece, n, T, 64)
    begin = _next_begin(row_ptr, order_ptr, begin, n, T, 64)
    head_first, head_second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    tail_first, tail_second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    open_first, open_second = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    carried = tl.zeros((BLOCK,), tl.float32)
    open_row, carried_row, carried_example = tl.full((), -1, tl.int64), tl.full((), -1, tl.int64), begin * 0 - 1
    for at in range(begin, end, ROWS):
        p = at + lane
        live = p < end
        row = tl.load(row_ptr + p, mask=live, other=-1)
        following = tl.load(row_ptr + p + 1, mask=p + 1 < n, other=-1)
        position = tl.load(order_ptr + p, mask=live, other=0)
        example = position // T
        next_example = tl.load(order_ptr + p + 1, mask=p + 1 < n, other=0) // T
        from_ptr = grad_ptr + (example * (stride_b * UNIT) + position % T * (stride_t * UNIT))[:, None]
        wanted = live & (row != padding)
        x = tl.load(from_ptr + feature[None, :], mask=wanted[:, None] & inside, other=0.0).to(tl.float32)
        same_row = row[:, None] == row[None, :]
        sums = _same_sums(same_row & (example[:, None] == example[None, :]), x)
        sums += tl.where(((row == carried_row) & (example == carried_example))[:, None], carried[None, :], 0.0)
        more = live & (row == following) & (example == next_example)
        done = tl.where((live & ~more)[:, None], sums, 0.0)
        first = _same_sums(same_row, done) + tl.where((row == open_row)[:, None], open_first[None, :], 0.0)
        second = _same_sums(same_row, done * done) + tl.where((row == open_row)[:, None], open_second[None, :], 0.0)
        ends = live & ((row != following) | (p + 1 == end))
        is_head, is_tail = ends & (row == head), ends & (row == tail) & (row != head)
        cell = row[:, None] * D + feature[None, :]
        whole = (ends & (row != head) & (row != tail) & (row != padding))[:, None] & inside
        tl.store(first_ptr + cell, first, mask=whole)
        tl.store(second_ptr + cell, second, mask=whole)
        head_first += tl.sum(tl.where(is_head[:, None], first, 0.0), 0)
        head_second += tl.sum(tl.where(is_head[:, None], second, 0.0), 0)
        tail_first += tl.sum(tl.where(is_tail[:, None], first, 0.0), 0)
        tail_second += tl.sum(tl.where(is_tail[:, None], second, 0.0), 0)
        last = lane == ROWS - 1
        goes_on = last & live & ~ends
        open_first = tl.sum(tl.where(goes_on[:, None], first, 0.0), 0)
        open_second = tl.sum(tl.where(goes_on[:, None], second, 0.0), 0)
        open_row = tl.max(tl.where(goes_on, row, -1), 0)
        carried = tl.sum(tl.where((last & more)[:, None], sums, 0.0), 0)
        carried_row = tl.max(tl.where(last & more, row, -1), 0)
        carried_example = tl.max(tl.where(last & more, example, -1), 0)
    slot = part_ptr + tl.program_id(0).to(tl.int64) * 4 * D + feature
    tl.store(slot, head_first, mask=feature < D)
    tl.store(slot + D, head_second, mask=feature < D)
    tl.store(slot + 2 * D, tail_first, mask=feature < D)
    tl.store(slot + 3 * D, tail_second, mask=feature < D)


@triton.jit(do_not_specialize=_SIZES)
def embedding_moments_total_kernel(
    row_ptr, part_ptr, first_ptr, second_ptr, n: tl.int64, D, piece, padding: tl.int64, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The table row that begins in a piece and goes on into others: their sums in order."""
    own = tl.program_id(0).to(tl.int64)
    tail = _opened(row_ptr, (own + 1) * piece, n)
    if (tail >= 0) & (tail != _opened(row_ptr, own * piece, n)) & (tail != padding):
        feature = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = feature < D
        slot = part_ptr + own * 4 * D + feature
        first = tl.load(slot + 2 * D, mask=inside, other=0.0).to(tl.float64)
        second = tl.load(slot + 3 * D, mask=inside, other=0.0).to(tl.float64)
        other = own + 1 + tl.arange(0, ROWS)
        going = True
        while going:
            here = tl.load(row_ptr + other * piece, mask=other * piece < n, other=-1) == tail
            slots = part_ptr + other[:, None] * (4 * D) + feature[None, :]
            mask = here[:, None] & inside[None, :]
            first += tl.sum(tl.load(slots, mask=mask, other=0.0).to(tl.float64), 0)
            second += tl.sum(tl.load(slots + D, mask=mask, other=0.0).to(tl.float64), 0)
            other += ROWS
            going = tl.min(here.to(tl.int32), 0) > 0
        tl.store(first_ptr + tail * D + feature, first.to(tl.float32), mask=inside)
        tl.store(second_ptr + tail * D + feature, second.to(tl.float32), mask=inside)


class Pieces(NamedTuple):
    """Positions of a piece (a number, so it recompiles nothing), and of a tile; features of a tile."""

    piece: int
    rows: int
    block: int


def moment_pieces(n: int, D: int, target: Target) -> Pieces:
    """Pieces that make some blocks for every multiprocessor, long enough that what they leave over costs little."""
    if target.interpreter:
        return Pieces(128, 64, power_of_two(D, 16, 64))
    block = power_of_two(D, 16, 128)
    return Pieces(min(1024, max(64, n * blocks(D, block) // (8 * target.multiprocessors))), 8, block)


def embedding_moments(
    index: torch.Tensor, grad: torch.Tensor, padding: int, first: torch.Tensor, second: torch.Tensor
) -> None:
    """index [B, T] int64, grad [B, T, D] with feature stride 1; first and second are [V, D] float32.

    padding: a row, or −1. Only rows that were looked up are written: both must be zero before.
    """
    B, T, D = grad.shape
    n = B * T
    if n == 0 or D == 0:
        return
    piece, ROWS, BLOCK = moment_pieces(n, D, _support.target(grad.device))
    row, order = index.flatten().sort(stable=True)
    grid = (blocks(n, piece), blocks(D, BLOCK))
    part = grad.new_empty(grid[0], 4, D, dtype=torch.float32)
    UNIT = unit(*grad.stride()[:2])
    launch(
        embedding_moments_pieces_kernel, grid, row, order, grad, first, second, part, n, T, D, piece, padding,
        *(stride // UNIT for stride in grad.stride()[:2]), UNIT, ROWS, BLOCK, num_warps=4, device=grad.device,
    )  # fmt: skip
    launch(
        embedding_moments_total_kernel, grid, row, part, first, second, n, D, piece, padding, 16, BLOCK, num_warps=4,
        device=grad.device,
    )  # fmt: skip
