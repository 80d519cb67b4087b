"""Sketches leftᵀ G_b right and inner products ⟨G_b, C_k⟩ of per-example gradients of a linear layer, in one read.

Not measured on a GPU yet; the floors below are counted, not timed. A program takes 64 or 128 rows (positions): it meets
the activations with all their columns (the centres' activation sides, ``right``), then the gradients with theirs, in
float32 accumulators; multiplies the two and sums over an example's positions before anything is stored. Both factors
are read once as long as all centres fit one tile of 128 columns and each side of the sketch one of 64; wider ones are
cut, and the rows read again for each tile. About 2K + P + Q FLOPs a byte of half-precision factors: bound by memory up
to some hundred columns.

Examples shorter than half a tile share one. Long ones are split along T until the GPU is full: partial sums go to
memory ([splits, B, …]) and are added up in a fixed order. Squared norms come with the same read for one position; for
sequences they are grad_sqnorm's, a read of their own.

Embedding tables take the same kernel (INDEX): their activations are the output gradients [B, T, D], and the linear
layer's gradients would be one-hot rows [B, T, V], so the products with them are numbers and rows looked up in ``left``
and the centres. Nothing depends on the size of the table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import add_squares, product, product_of_squares
from ._support import Target, blocks, launch, power_of_two, unit
from .grad_sqnorm import grad_sqnorm

ONE, PACKED, LONG = 0, 1, 2  # positions of an example: one, a few examples a tile, one example (or a part of it) a tile
_ONE, _PACKED, _LONG = tl.constexpr(ONE), tl.constexpr(PACKED), tl.constexpr(LONG)


@triton.jit
def _meet(
    x_ptr, offset, live, F, centers, stride_center: tl.int64, column, columns, dots, side_ptr, stride_side: tl.int64,
    side, width, projected, squares, exponent, DOT: tl.constexpr, PROJECT: tl.constexpr, SQNORM: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One read of rows of X: dots += X centresᵀ, projected += X side, squares += X∘X, whichever are asked for."""
    for begin in range(0, F, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < F
        x = tl.load(x_ptr + offset[:, None] + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if DOT:
            here = (column < columns)[:, None] & inside[None, :]
            c = tl.load(centers + column[:, None] * stride_center + at[None, :], mask=here, other=0.0)
            dots = product(x, tl.trans(c), dots, PRECISION)
        if PROJECT:
            here = inside[:, None] & (side < width)[None, :]
            w = tl.load(side_ptr + at.to(tl.int64)[:, None] * stride_side + side[None, :], mask=here, other=0.0)
            projected = product(x, w, projected, PRECISION)
        if SQNORM:
            squares, exponent = add_squares(x.to(tl.float32), squares, exponent)
    return dots, projected, squares, exponent


@triton.jit(
    do_not_specialize=[
        "B", "T", "E", "chunk", "tiles", "across", "K", "P", "Q", "stride_act_b", "stride_act_t", "stride_grad_b",
        "stride_grad_t", "stride_center_act", "stride_center_grad", "stride_left", "stride_right", "padding",
    ]
)  # fmt: skip
def grad_quantities_kernel(
    act_ptr, grad_ptr, center_act_ptr, center_grad_ptr, left_ptr, right_ptr, dot_ptr, sketch_ptr, sqnorm_ptr,
    B: tl.int64, T, E, chunk, tiles, across, I, O, K, P, Q,
    stride_act_b: tl.int64, stride_act_t: tl.int64, stride_grad_b: tl.int64, stride_grad_t: tl.int64,
    stride_center_act: tl.int64, stride_center_grad: tl.int64, stride_left: tl.int64, stride_right: tl.int64,
    padding: tl.int64, stride_center_row, stride_left_column,
    DOT: tl.constexpr, SKETCH: tl.constexpr, SQNORM: tl.constexpr, BIAS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, INDEX: tl.constexpr, LAYOUT: tl.constexpr, UNIT: tl.constexpr, UNIT_CENTER: tl.constexpr,
    UNIT_SIDE: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of columns (of the centres, or of the two sides) of one group of examples, or of one chunk of positions.

    Program ids run over (chunk of T, group, tile); ``tiles`` tiles, ``across`` of them side by side in Q. A group is E
    examples, or one. dot is [chunks, B, K], sketch [chunks, B, P, Q], sqnorm [B].

    INDEX: grad is [B, T] int64, rows of a table, of which ``padding`` counts for nothing; center_grad and left have a
    number and a row for each of them, and any strides.
    """
    tile = tl.program_id(0) % tiles
    group = (tl.program_id(0) // tiles).to(tl.int64)
    groups = tl.cdiv(B, E)
    split = group // groups
    group = group % groups
    row = tl.arange(0, ROWS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    p = (tile // across) * LEFT + tl.arange(0, LEFT)
    q = (tile % across) * RIGHT + tl.arange(0, RIGHT)
    first = 0
    last = ROWS
    if LAYOUT == _LONG:
        first = (split * chunk).to(tl.int32)
        last = tl.minimum(first + chunk, T)
    dot = tl.zeros((COLUMNS,), tl.float32)
    sketch = tl.zeros((LEFT, RIGHT), tl.float32)
    for start in range(first, last, ROWS):
        if LAYOUT == _LONG:
            position = start + row
            example = group + row * 0
            live = position < last
        else:
            example = group * E + row // T
            position = row % T
            live = (row < E * T) & (example < B)
        act_row = example * (stride_act_b * UNIT) + position * (stride_act_t * UNIT)
        counted = live
        if INDEX:
            looked_up = tl.load(grad_ptr + example * T + position, mask=live, other=0)
            counted = live & (looked_up != padding)
        else:
            grad_row = example * (stride_grad_b * UNIT) + position * (stride_grad_t * UNIT)
        act_dots = tl.zeros((ROWS, COLUMNS), tl.float32)
        grad_dots = tl.zeros((ROWS, COLUMNS), tl.float32)
        act_side = tl.zeros((ROWS, RIGHT), tl.float32)
        grad_side = tl.zeros((ROWS, LEFT), tl.float32)
        act_squares, act_exponent = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1, tl.int32)
        grad_squares, grad_exponent = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1, tl.int32)
        act_dots, act_side, act_squares, act_exponent = _meet(
            act_ptr, act_row, counted, I, center_act_ptr, stride_center_act * UNIT_CENTER, column, K, act_dots,
            right_ptr, stride_right * UNIT_SIDE, q, Q, act_side, act_squares, act_exponent, DOT, SKETCH and HAS_RIGHT,
            SQNORM, PRECISION, BLOCK,
        )  # fmt: skip
        if BIAS:  # the last feature is the constant 1
            if DOT:
                last_center = column * (stride_center_act * UNIT_CENTER) + I
                act_dots += tl.load(center_act_ptr + last_center, mask=column < K, other=0.0).to(tl.float32)[None, :]
            if SKETCH and HAS_RIGHT:
                last_side = I * (stride_right * UNIT_SIDE) + q
                act_side += tl.load(right_ptr + last_side, mask=q < Q, other=0.0).to(tl.float32)[None, :]
        if INDEX:
            if DOT:
                numbers = looked_up[:, None] * stride_center_row + column[None, :] * stride_center_grad
                wanted = counted[:, None] & (column < K)[None, :]
                grad_dots = tl.load(center_grad_ptr + numbers, mask=wanted, other=0.0).to(tl.float32)
            if SKETCH:
                numbers = looked_up[:, None] * stride_left + p[None, :] * stride_left_column
                wanted = counted[:, None] & (p < P)[None, :]
                grad_side = tl.load(left_ptr + numbers, mask=wanted, other=0.0).to(tl.float32)
        else:
            grad_dots, grad_side, grad_squares, grad_exponent = _meet(
                grad_ptr, grad_row, live, O, center_grad_ptr, stride_center_grad * UNIT_CENTER, column, K, grad_dots,
                left_ptr, stride_left * UNIT_SIDE, p, P, grad_side, grad_squares, grad_exponent, DOT,
                SKETCH and HAS_LEFT, SQNORM, PRECISION, BLOCK,
            )  # fmt: skip
            if SKETCH and not HAS_LEFT:  # the identity: the rows themselves
                own_grad = grad_row[:, None] + p[None, :]
                grad_side = tl.load(grad_ptr + own_grad, mask=live[:, None] & (p < O)[None, :], other=0.0)
                grad_side = grad_side.to(tl.float32)
        if SKETCH and not HAS_RIGHT:  # with the constant 1 as column I
            own_act = act_row[:, None] + q[None, :]
            act_side = tl.load(act_ptr + own_act, mask=counted[:, None] & (q < I)[None, :], other=0.0).to(tl.float32)
            if BIAS:
                act_side = tl.where((q == I)[None, :], 1.0, act_side)

        both = act_dots * grad_dots
        if SQNORM:
            sqnorm = product_of_squares(act_squares, act_exponent, grad_squares, grad_exponent, BIAS)
            tl.store(sqnorm_ptr + example, sqnorm, mask=live)
        if LAYOUT == _LONG:
            if DOT:
                dot += tl.sum(both, 0)
            if SKETCH:
                sketch = product(tl.trans(grad_side), act_side, sketch, PRECISION)
        elif LAYOUT == _PACKED:
            for e in range(0, E):
                b = group * E + e
                own = (example == b) & live  # what is not its own is left out, not multiplied by 0: it may be NaN
                if DOT:
                    dot = tl.sum(tl.where(own[:, None], both, 0.0), 0)
                    tl.store(dot_ptr + b * K + column, dot, mask=(column < K) & (b < B))
                if SKETCH:
                    left = tl.where(own[:, None], grad_side, 0.0)
                    right = tl.where(own[:, None], act_side, 0.0)
                    sketch = product(tl.trans(left), right, tl.zeros((LEFT, RIGHT), tl.float32), PRECISION)
                    slot = (b * P + p[:, None]) * Q + q[None, :]
                    tl.store(sketch_ptr + slot, sketch, mask=(p < P)[:, None] & (q < Q)[None, :] & (b < B))
        else:
            if DOT:
                cell = example[:, None] * K + column[None, :]
                tl.store(dot_ptr + cell, both, mask=live[:, None] & (column < K)[None, :])
            if SKETCH:
                for index in range(0, tl.minimum(LEFT, P - (tile // across) * LEFT)):
                    line = tl.sum(tl.where((tl.arange(0, LEFT) == index)[None, :], grad_side, 0.0), 1)
                    here = (tile // across) * LEFT + index
                    strip = (example[:, None] * P + here) * Q + q[None, :]
                    keep = live[:, None] & (q < Q)[None, :]
                    tl.store(sketch_ptr + strip, line[:, None] * act_side, mask=keep)
    if LAYOUT == _LONG:
        part = split * B + group
        if DOT:
            tl.store(dot_ptr + part * K + column, dot, mask=column < K)
        if SKETCH:
            whole = (part * P + p[:, None]) * Q + q[None, :]
            tl.store(sketch_ptr + whole, sketch, mask=(p < P)[:, None] & (q < Q)[None, :])


class Tiles(NamedTuple):
    """Rows and features of a product; the most columns of centres, and of each side of a sketch."""

    rows: int
    block: int
    columns: int
    side: int
    warps: int
    stages: int


def row_tiles(rows: int, dtype: torch.dtype, precision: str, target: Target) -> Tiles:
    """128 rows where that still fills the GPU; float32 without tensor cores takes less."""
    if target.interpreter:
        return Tiles(64, 64, 32, 32, 4, 1)
    hopper = target.capability >= (9, 0)  # wgmma reads its factors from shared memory, mma holds them in registers
    if dtype == torch.float32 and precision != "tf32":
        return Tiles(64, 16, 64, 32, 4, 2)
    block = 64 if dtype != torch.float32 and hopper else 32
    if blocks(rows, 128) >= target.multiprocessors:
        return Tiles(128, block, 128, 64, 8, 4 if hopper else 3)
    return Tiles(64, block, 128, 64, 4 if hopper else 8, 4 if hopper else 3)


def ampere_tiles(
    tiling: Tiles, T: int, dtype: torch.dtype, table: bool, aligned: bool, mixed: bool, K: int, widest: int | None
) -> Tiles:
    """Where mma's factors and addresses would spill: rows that are not aligned, a matrix of another type, an identity.

    ``widest`` is the wider side of a sketch, None where one of the two is the identity; without centres K is 0.
    """
    if table:
        return tiling if aligned else tiling._replace(rows=32, block=16)
    if dtype == torch.float32:
        if aligned or widest is None:
            few = 0 < K <= 16 and widest == 0 and tiling.rows < 2 * T
            return tiling._replace(stages=1) if few else tiling
        if K == 0:
            return tiling._replace(rows=32)
        return tiling if tiling.rows < 2 * T else tiling._replace(stages=1)
    if mixed or widest is None:
        return tiling._replace(rows=64, warps=4 if K == 0 and widest is not None and widest <= 16 else tiling.warps)
    return tiling


class _Side(NamedTuple):
    """A projection; without a matrix the identity."""

    matrix: torch.Tensor | None
    size: int


def grad_quantities(
    act: torch.Tensor,
    grad: torch.Tensor,
    bias: bool,
    *,
    sqnorm: torch.Tensor | None = None,
    sketch: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
    center_grad: torch.Tensor | None = None,
    center_act: torch.Tensor | None = None,
    padding: int | None = None,
) -> None:
    """Fills the outputs that are given, all float32: sqnorm [B], sketch [B, P, Q], dot [B, K].

    act [B, T, I] and grad [B, T, O] have feature stride 1. Sides and centres are copied where their last stride is
    not 1. With ``padding`` (a row, or −1) grad is [B, T] int64, contiguous: rows of a table, which ``left`` and
    ``center_grad`` have too.
    """
    B, T = act.shape[:2]
    if T == 0 or B == 0:
        for out in (sqnorm, sketch, dot):
            if out is not None:
                out.zero_()
        return
    if sqnorm is not None and T > 1:
        grad_sqnorm(act, grad, bias, sqnorm)
        sqnorm = None
    table = padding is not None
    target = _support.target(act.device)
    tiling = row_tiles(B * T, act.dtype, _support.float32_precision(), target)
    if table and not target.interpreter:  # what is looked up has an address a number: registers for 64 × 64 of them
        tiling = tiling._replace(rows=64, block=min(tiling.block, 32), columns=64, side=32, warps=8)
    elif target.capability < (9, 0) and not target.interpreter and 1 < T <= tiling.rows // 2:
        tiling = tiling._replace(side=min(tiling.side, 32))  # an example's part of both sides beside the sides
    centers = None
    if dot is not None and dot.numel():
        assert center_grad is not None and center_act is not None
        rank = center_grad.shape[1] if center_grad.dim() == 3 else 1
        if rank == 0:
            dot.zero_()
        else:
            center_grad = center_grad.flatten(0, -2)
            centers = center_grad if table else _rows(center_grad), _rows(center_act.flatten(0, -2)), rank
    sides = None
    if sketch is not None and sketch.numel():
        P, Q = sketch.shape[1:]
        left = left if table or left is None else _rows(left)
        sides = _Side(left, P), _Side(None if right is None else _rows(right), Q)
    one_tile = (centers is None or centers[0].shape[0] <= tiling.columns) and (
        sides is None or max(sides[0].size, sides[1].size) <= tiling.side
    )
    if one_tile and (centers is not None or sides is not None or sqnorm is not None):
        _launch(act, grad, bias, tiling, target, sqnorm, sketch, sides, dot, centers, padding)
        return
    if centers is not None:
        _launch(act, grad, bias, tiling, target, sqnorm, None, None, dot, centers, padding)
        sqnorm = None
    if sides is not None:
        _launch(act, grad, bias, tiling, target, sqnorm, sketch, sides, None, None, padding)


def _rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _launch(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, tiling: Tiles, target: Target, sqnorm: torch.Tensor | None,
    sketch: torch.Tensor | None, sides: tuple[_Side, _Side] | None, dot: torch.Tensor | None,
    centers: tuple[torch.Tensor, torch.Tensor, int] | None, padding: int | None,
) -> None:  # fmt: skip
    """One launch: all that is asked for where it fits one tile, else the centres or the sketch alone."""
    B, T, I = act.shape
    table = padding is not None
    O = 0 if table else grad.shape[2]
    center_grad, center_act = (act, act) if centers is None else centers[:2]
    left = act if sides is None or sides[0].matrix is None else sides[0].matrix
    right = act if sides is None or sides[1].matrix is None else sides[1].matrix
    strides = act.stride()[:2] if table else (*act.stride()[:2], *grad.stride()[:2])
    factor = unit(*strides)
    # what is looked up is not read in blocks, and counts in elements
    center_unit = unit(center_act.stride(0)) if table else unit(center_act.stride(0), center_grad.stride(0))
    side_unit = unit(right.stride(0)) if table else unit(left.stride(0), right.stride(0))
    if target.capability < (9, 0) and not target.interpreter:
        identity = sides is not None and (sides[0].matrix is None or sides[1].matrix is None)
        widest = None if identity else 0 if sides is None else max(sides[0].size, sides[1].size)
        mixed = any(matrix.dtype != act.dtype for matrix in (center_grad, center_act, left, right))
        aligned = 1 not in (factor, center_unit, side_unit)
        tiling = ampere_tiles(
            tiling, T, act.dtype, table, aligned, mixed, center_grad.shape[0] if centers else 0, widest
        )
    layout = ONE if T == 1 else PACKED if tiling.rows >= 2 * T else LONG
    E = 1 if layout == LONG else tiling.rows // T
    K, rank, tiles, across = 0, 1, 1, 1
    P = Q = 0
    if centers is not None:
        K, rank = centers[0].shape[0], centers[2]
        tiles = blocks(K, tiling.columns)
    if sides is not None:
        P, Q = sides[0].size, sides[1].size
        across = blocks(Q, tiling.side)
        tiles = max(tiles, blocks(P, tiling.side) * across)
    crowded = centers is not None and sides is not None  # four accumulators: more registers than 4 warps have
    if crowded or (sides is not None and (sides[0].matrix is None or sides[1].matrix is None)):
        tiling = tiling._replace(warps=8)
    if centers is None and act.dtype == torch.float32 and not target.interpreter:
        crammed = target.capability < (9, 0) and layout == PACKED and max(P, Q) > 16
        # two narrow products: what ptxas spills nothing with
        tiling = tiling._replace(block=16 if crammed else 32, warps=8, stages=1)
    programs, splits = blocks(B, E) * tiles, 1
    if layout == LONG:
        splits = min(blocks(target.multiprocessors, programs), blocks(T, tiling.rows))
    chunk = blocks(blocks(T, splits), tiling.rows) * tiling.rows
    splits = blocks(T, chunk) if layout == LONG else 1

    dots = sketches = act  # where nothing is stored
    if dot is not None and centers is not None:
        dots = dot if splits == rank == 1 else act.new_empty(splits, B, K, dtype=torch.float32)
    if sketch is not None:
        sketches = sketch if splits == 1 else act.new_empty(splits, B, P, Q, dtype=torch.float32)
    if centers is not None and 1 in (factor, center_unit) and not target.interpreter:
        tiling = tiling._replace(block=16, warps=8)  # every element has an address in registers
    launch(
        grad_quantities_kernel, (programs * splits,), act, grad, center_act, center_grad, left, right, dots, sketches,
        act if sqnorm is None else sqnorm, B, T, E, chunk, tiles, across, I, O, K, P, Q,
        *(stride // factor for stride in (*strides, *(0, 0) * table)), center_act.stride(0) // center_unit,
        center_grad.stride(0) // (1 if table else center_unit), left.stride(0) // (1 if table else side_unit),
        right.stride(0) // side_unit, padding or 0, *((center_grad.stride(-1), left.stride(-1)) if table else (1, 1)),
        centers is not None, sides is not None, sqnorm is not None, bias,
        sides is not None and sides[0].matrix is not None, sides is not None and sides[1].matrix is not None, table,
        layout, factor, center_unit, side_unit, _support.float32_precision(), tiling.rows,
        power_of_two(K, 16, tiling.columns), power_of_two(P, 16, tiling.side), power_of_two(Q, 16, tiling.side),
        tiling.block, num_warps=tiling.warps, num_stages=tiling.stages, device=act.device,
    )  # fmt: skip
    if dot is not None and dots is not dot:
        torch.sum(dots.unflatten(2, (K // rank, rank)), (0, 3), out=dot)
    if sketch is not None and sketches is not sketch:
        torch.sum(sketches, 0, out=sketch)
