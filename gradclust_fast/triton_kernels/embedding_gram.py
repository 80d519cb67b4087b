"""All pairwise inner products ⟨G_b, G_c⟩ of per-example gradients of an embedding table.

Not measured on a GPU yet; the costs are counted, not timed. A program makes the products of two groups of positions in
one tile and keeps those of positions that look up the same row, so nothing but [B, B] reaches memory, nothing depends
on the size of the table, and another row's NaN is left out, not multiplied by 0. Pairs above the diagonal are mirrored.

Short examples share a tile: B²T²D FLOPs. Of a long one torch sorts the positions by table row, and the tiles of two
examples meet like two sorted lists: a tile that shares no row is passed over at the cost of its indices, so about
4BT·ROWS FLOPs a pair of features are left where rows are spread, and B²T²D only where all positions look up one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _support
from ._support import Target, blocks, launch, unit
from .grad_gram import Tiles, triangle
from .grad_quantities import LONG, ONE, PACKED
from .grad_sqnorm_gram import outer

_ONE, _LONG = tl.constexpr(ONE), tl.constexpr(LONG)


@triton.jit
def _rows(row_ptr, at, live, padding, NOBODY: tl.constexpr):
    """Table rows of positions; NOBODY, which equals no row, in place of padding and of positions that are not there."""
    row = tl.load(row_ptr + at, mask=live, other=NOBODY)
    return tl.where(row == padding, NOBODY, row)


@triton.jit
def _common(
    grad_ptr, left, right, left_row, right_row, D, PRECISION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Products of two lists of positions (their offsets), 0 where the rows differ; nothing is read where all do."""
    same = left_row[:, None] == right_row[None, :]
    found = tl.zeros((ROWS, ROWS), tl.float32)
    if tl.max(tl.max(same.to(tl.int32), 1), 0) > 0:
        found = outer(grad_ptr, left, right, left_row >= 0, right_row >= 0, 0, D, D, found, PRECISION, BLOCK)
        found = tl.where(same, found, 0.0)
    return found


@triton.jit(do_not_specialize=["B", "T", "E", "padding", "stride_b", "stride_t"])
def embedding_gram_kernel(
    row_ptr, order_ptr, grad_ptr, out_ptr, B, T, E, D, padding: tl.int64, stride_b: tl.int64, stride_t: tl.int64,
    LAYOUT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, EXAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Two groups of E examples, or two examples; row is [B, T] int64, and of long examples sorted, by ``order``."""
    i, j = triangle(tl.program_id(0))
    lane = tl.arange(0, ROWS)
    step_b, step_t = stride_b * UNIT, stride_t * UNIT
    if LAYOUT == _LONG:
        left_ptr, right_ptr = row_ptr + i.to(tl.int64) * T, row_ptr + j.to(tl.int64) * T
        left_order, right_order = order_ptr + i.to(tl.int64) * T, order_ptr + j.to(tl.int64) * T
        total = tl.zeros((ROWS, ROWS), tl.float32)
        first = 0
        for begin in range(0, T, ROWS):
            at = begin + lane
            left_row = _rows(left_ptr, at, at < T, padding, -1)
            left = i * step_b + tl.load(left_order + at, mask=at < T, other=0) * step_t
            low, high = tl.load(left_ptr + begin), tl.load(left_ptr + tl.minimum(begin + ROWS, T) - 1)
            # the right tiles before `first` end before this one begins, and before the later ones
            while (first < T) & (tl.load(right_ptr + tl.minimum(first + ROWS, T) - 1) < low):
                first += ROWS
            other = first
            while (other < T) & (tl.load(right_ptr + tl.minimum(other, T - 1)) <= high):
                at = other + lane
                right_row = _rows(right_ptr, at, at < T, padding, -2)
                right = j * step_b + tl.load(right_order + at, mask=at < T, other=0) * step_t
                total += _common(grad_ptr, left, right, left_row, right_row, D, PRECISION, ROWS, BLOCK)
                other += ROWS
        one = tl.sum(tl.sum(total, 1), 0)
        tl.store(out_ptr + i.to(tl.int64) * B + j, one)
        tl.store(out_ptr + j.to(tl.int64) * B + i, one)
    else:
        b = (i * E + lane // T).to(tl.int64)
        c = (j * E + lane // T).to(tl.int64)
        left_row = _rows(row_ptr, i.to(tl.int64) * E * T + lane, (lane < E * T) & (b < B), padding, -1)
        right_row = _rows(row_ptr, j.to(tl.int64) * E * T + lane, (lane < E * T) & (c < B), padding, -2)
        left = b * step_b + lane % T * step_t
        right = c * step_b + lane % T * step_t
        both = _common(grad_ptr, left, right, left_row, right_row, D, PRECISION, ROWS, BLOCK)
        if LAYOUT == _ONE:
            inside = (b < B)[:, None] & (c < B)[None, :] & (b[:, None] >= c[None, :])
            tl.store(out_ptr + b[:, None] * B + c[None, :], both, mask=inside)
            tl.store(out_ptr + c[None, :] * B + b[:, None], both, mask=inside)
        else:
            own = tl.arange(0, EXAMPLES)
            column = (j * E + own).to(tl.int64)
            for e in range(0, E):
                example = (i * E + e).to(tl.int64)
                line = tl.sum(tl.where((b == example)[:, None], both, 0.0), 0)
                cells = tl.sum(tl.where(column[:, None] == c[None, :], line[None, :], 0.0), 1)
                inside = (own < E) & (column <= example) & (example < B)
                tl.store(out_ptr + example * B + column, cells, mask=inside)
                tl.store(out_ptr + column * B + example, cells, mask=inside)


def pair_tiles(dtype: torch.dtype, precision: str, target: Target) -> Tiles:
    """Small tiles: rows that hardly meet fill no larger ones, and which do is held in registers beside the products."""
    if target.interpreter:
        return Tiles(256, 64, 16, 4, 1)  # a program costs it more than a large tile
    if dtype == torch.float32 and precision != "tf32":
        return Tiles(32, 16, 16, 8, 1)
    return Tiles(64, 32, 16, 8, 2)


def embedding_gram(index: torch.Tensor, grad: torch.Tensor, padding: int, out: torch.Tensor) -> None:
    """index [B, T] int64, grad [B, T, D] with feature stride 1; fills out [B, B] in float32. padding: a row, or −1."""
    B, T, D = grad.shape
    if T == 0 or D == 0:
        out.zero_()
        return
    target = _support.target(grad.device)
    precision = _support.float32_precision()
    UNIT = unit(*grad.stride()[:2])
    tiling = pair_tiles(grad.dtype, precision, target)
    layout, E, row, order = LONG, 1, index.contiguous(), index
    if tiling.rows >= 2 * T:
        layout = ONE if T == 1 else PACKED
        E = tiling.rows if T == 1 else min(tiling.rows // T, tiling.examples)
    else:
        row, order = row.sort(dim=1, stable=True)
    n = blocks(B, E)
    launch(
        embedding_gram_kernel, (n * (n + 1) // 2,), row, order, grad, out, B, T, E, D, padding,
        *(stride // UNIT for stride in grad.stride()[:2]), layout, UNIT, precision, tiling.rows, tiling.examples,
        tiling.block, num_warps=tiling.warps, num_stages=tiling.stages, device=grad.device,
    )  # fmt: skip
