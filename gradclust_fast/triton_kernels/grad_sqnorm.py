"""Squared norms ‖G_b‖² of the per-example gradients of a linear layer.

Not measured on a GPU yet; the floors below are counted, not timed.

- One position: a program takes some rows and reads both factors once, scaling the squares on the way. Bound by
  memory.
- Sequences, Gram sum (short against the features): a program makes one tile of A Aᵀ, then the same tile of D Dᵀ, in two
  accumulators, multiplies them and adds up, so T×T never reaches memory. Tiles above the diagonal are left out: half of
  the products. Examples shorter than a tile share one. T²(I+O) FLOPs an example, bound by the tensor cores.
- Sequences, direct (long against the features): a program makes one tile of G_b and adds up its squares; O×I never
  reaches memory. 2TIO FLOPs an example.

The plain Gram sum cancels when activations hardly vary, so a feature whose activations lie within a factor of two of
their (rounded) mean c has c subtracted as it is read: exact in the factors' own half type, where an arbitrary mean
would round. The terms of c come back as 2 Σ_t (D[t]·s)(Ã[t]·c) + ‖s‖²‖c‖², s = Σ_t D[t]. An example without such
features, or where they carry under a quarter of the energy, loses nothing by the plain sum and takes it.

What the reference does beyond this: it centres the gradients too, and scales whole sequences so that no square of
theirs leaves float32's range. Here a sequence whose gradients hardly vary while its activations sum to zero cancels in
the Gram sum as it would in torch, and squares beyond 1e38 (below 1e-38) become infinite (zero).

Few examples have too few tiles to fill the GPU. Then the depth of the products is split (features of a Gram tile,
positions of a tile of G_b) until there are as many programs as multiprocessors; the parts of a tile, a few MB whatever
the sizes, meet in memory before they are multiplied or squared.

Every sum has one order, whatever runs first: partial sums go to memory ([B, tiles]) and a last launch adds them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _support
from ._device import add_squares, product, product_of_squares
from ._support import Target, blocks, launch, power_of_two, unit
from .grad_sqnorm_gram import (
    SIZES,
    Tiles,
    by_gram_tiles,
    column_tile,
    finish,
    grad_sqnorm_total_kernel,
    gram_tiles,
    splits,
)


@triton.jit(do_not_specialize=SIZES)
def grad_sqnorm_rows_kernel(
    act_ptr, grad_ptr, out_ptr, B: tl.int64, I, O, stride_act_b: tl.int64, stride_grad_b: tl.int64,
    BIAS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One position: ‖act‖²‖grad‖² of ROWS examples."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = (row < B)[:, None]
    feature = tl.arange(0, BLOCK)
    act_squares, act_exponent = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1, tl.int32)
    for begin in range(0, I, BLOCK):
        at = (begin + feature)[None, :]
        a = tl.load(act_ptr + row[:, None] * (stride_act_b * UNIT) + at, mask=live & (at < I), other=0.0)
        act_squares, act_exponent = add_squares(a.to(tl.float32), act_squares, act_exponent)
    grad_squares, grad_exponent = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), 1, tl.int32)
    for begin in range(0, O, BLOCK):
        at = (begin + feature)[None, :]
        d = tl.load(grad_ptr + row[:, None] * (stride_grad_b * UNIT) + at, mask=live & (at < O), other=0.0)
        grad_squares, grad_exponent = add_squares(d.to(tl.float32), grad_squares, grad_exponent)
    sqnorm = product_of_squares(act_squares, act_exponent, grad_squares, grad_exponent, BIAS)
    tl.store(out_ptr + row, sqnorm, mask=row < B)


@triton.jit(do_not_specialize=SIZES)
def grad_sqnorm_direct_kernel(
    act_ptr, grad_ptr, partial_ptr, parts_ptr, T, S, I, O, stride_act_b: tl.int64, stride_act_t: tl.int64,
    stride_grad_b: tl.int64, stride_grad_t: tl.int64, SPLIT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one ROWS × COLUMNS tile of G_b; partial is [B, tiles of O × I].

    SPLIT: S programs a tile, each with a part of the positions; parts is [B, tiles of O × I, S, ROWS, COLUMNS].
    """
    across = tl.cdiv(I, COLUMNS)
    tiles = tl.cdiv(O, ROWS) * across
    program = tl.program_id(0)
    start, stop = 0, T
    if SPLIT:
        program = tl.program_id(0) // S
        step = tl.cdiv(tl.cdiv(T, BLOCK), S) * BLOCK
        start = tl.program_id(0) % S * step
        stop = tl.minimum(start + step, T)
    b = (program // tiles).to(tl.int64)
    tile = program % tiles
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    act_rows = act_ptr + b * (stride_act_b * UNIT)
    grad_rows = grad_ptr + b * (stride_grad_b * UNIT)
    for begin in range(start, stop, BLOCK):
        position = (begin + tl.arange(0, BLOCK)).to(tl.int64)
        live = (position < T)[:, None]
        d = tl.load(
            grad_rows + position[:, None] * (stride_grad_t * UNIT) + row[None, :],
            mask=live & (row < O)[None, :], other=0.0,
        )  # fmt: skip
        a = tl.load(
            act_rows + position[:, None] * (stride_act_t * UNIT) + column[None, :],
            mask=live & (column < I)[None, :], other=0.0,
        )  # fmt: skip
        acc = product(tl.trans(d), a, acc, PRECISION)
    if SPLIT:
        cell = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * (ROWS * COLUMNS) + cell, acc)
    else:
        tl.store(partial_ptr + program, tl.sum(tl.sum(acc * acc, 1), 0))


@triton.jit(do_not_specialize=SIZES)
def grad_sqnorm_direct_join_kernel(parts_ptr, partial_ptr, S, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    """The S parts of one tile of G_b, added up and squared."""
    tile_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * S * CELLS
    squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, CELLS, BLOCK):
        cell = begin + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for part in range(0, S):
            total += tl.load(tile_ptr + part * CELLS + cell)
        squares += total * total
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares, 0))


LEAST_POSITIONS = 256
"""Of a split tile of G_b: below, its parts would cost as much memory traffic as the factors."""


def direct_tiles(B: int, T: int, I: int, O: int, dtype: torch.dtype, precision: str, target: Target) -> Tiles:
    """Tiles of O × I: the largest that still fill the GPU, split where positions are many."""
    if target.interpreter:
        return Tiles(32, 64, 32, 4, 1)
    wide = dtype != torch.float32 or precision == "tf32"
    for side in (128, 64, 32) if wide else (64, 32):
        programs = B * blocks(O, side) * blocks(I, side) * blocks(T, LEAST_POSITIONS)
        if programs >= target.multiprocessors and min(I, O) > side // 2:
            break
    return Tiles(side, side, 64 if dtype != torch.float32 else 32, 8 if side == 128 else 4, 3 if wide else 2)


def gram_is_cheaper(B: int, T: int, I: int, O: int, dtype: torch.dtype, target: Target) -> bool:
    """Whether the Gram sum takes fewer FLOPs than the direct product, padding counted."""
    if target.interpreter:  # padding costs nothing there, and small shapes are to take both ways
        return T * (I + O) <= 2 * I * O
    precision = _support.float32_precision()
    rows = gram_tiles(B, T, dtype, precision, target).rows
    n = blocks(T, rows)
    gram = rows * rows * (I + O) * (n * (n + 1) / 2 if rows // 2 < T else 1 / (rows // T))
    return gram < power_of_two(T) * I * O if T <= 16 else gram < T * I * O


def route(B: int, T: int, I: int, O: int, dtype: torch.dtype, device: torch.device) -> str:
    """Which algorithm runs, as a sentence."""
    if T <= 1:
        return "rank 1: ‖act‖²‖grad‖², one read of each"
    gram = gram_is_cheaper(B, T, I, O, dtype, _support.target(device))
    return "centred Gram sum over the tiles of a triangle" if gram else "direct product, tile by tile"


def grad_sqnorm(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor) -> None:
    """act [B, T, I], grad [B, T, O] with feature stride 1; fills out [B] in float32."""
    B, T, I = act.shape
    O = grad.shape[2]
    target = _support.target(act.device)
    if T == 0:
        out.zero_()
    elif T == 1:
        _rows(act, grad, bias, out, target)
    elif gram_is_cheaper(B, T, I, O, act.dtype, target):
        by_gram_tiles(act, grad, bias, out, target)
    else:
        _direct(act, grad, bias, out, target)


def _rows(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor, target: Target) -> None:
    B, _, I = act.shape
    O = grad.shape[2]
    BLOCK = power_of_two(max(I, O), 16, 64 if target.interpreter else 1024)
    UNIT = unit(act.stride(0), grad.stride(0))
    ROWS = max(1, (256 if target.interpreter else 4096) // BLOCK)
    warps = 8 if UNIT == 1 and target.capability < (9, 0) else 4  # every element's address is in registers there
    launch(
        grad_sqnorm_rows_kernel, (blocks(B, ROWS),), act, grad, out, B, I, O, act.stride(0) // UNIT,
        grad.stride(0) // UNIT, bias, UNIT, ROWS, BLOCK, num_warps=warps, device=act.device,
    )  # fmt: skip


def _direct(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor, target: Target) -> None:
    B, T, I = act.shape
    O, device = grad.shape[2], act.device
    precision = _support.float32_precision()
    tiling = direct_tiles(B, T, I, O, act.dtype, precision, target)
    UNIT = unit(*act.stride()[:2], *grad.stride()[:2])
    strides = [stride // UNIT for stride in (*act.stride()[:2], *grad.stride()[:2])]
    tiles = blocks(O, tiling.rows) * blocks(I, tiling.columns)
    partial = act.new_empty(B, tiles, dtype=torch.float32)
    S = splits(B * tiles, blocks(T, LEAST_POSITIONS), target)
    cells = tiling.rows * tiling.columns
    parts = partial if S == 1 else act.new_empty(B * tiles, S, cells, dtype=torch.float32)
    launch(
        grad_sqnorm_direct_kernel, (B * tiles * S,), act, grad, partial, parts, T, S, I, O, *strides, S > 1, UNIT,
        precision, tiling.rows, tiling.columns, tiling.block, num_warps=tiling.warps, num_stages=tiling.stages,
        device=device,
    )  # fmt: skip
    if S > 1:
        launch(
            grad_sqnorm_direct_join_kernel, (B * tiles,), parts, partial, S, cells, min(cells, 1024), num_warps=4,
            device=device,
        )  # fmt: skip
    total = partial
    if bias:
        POSITIONS, BLOCK = column_tile(T, target)
        n = max(1, blocks(O, BLOCK))
        total = act.new_empty(B, O, dtype=torch.float32)
        launch(
            grad_sqnorm_total_kernel, (B * n,), grad, partial, partial, total, T, O, 0, n, *strides[2:], False, True,
            UNIT, POSITIONS, BLOCK, num_warps=4, device=device,
        )  # fmt: skip
    finish(partial, partial, total, partial, out, I, O, False, bias, target)
