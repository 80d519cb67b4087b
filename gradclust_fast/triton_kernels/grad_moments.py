"""Sums of per-example gradients and of their squares, Σ_b G_b and Σ_b G_b∘G_b, of a linear layer.

Not measured on a GPU yet; the floors below are counted, not timed. A program keeps one tile of O × I: it makes each
example's tile of G_b in an accumulator, adds it and its square to two more, and goes on to the next example, so no G_b
reaches memory. 2BTIO FLOPs, those of the weight gradient alone, bound by the tensor cores; examples shorter than a
product is deep (16) pay for 16 positions. One position needs no products: G_b∘G_b is the product of the squares.

Where the tiles do not fill the GPU, the batch is split; the parts go to memory ([splits, O, I], twice) and are added up
in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import product
from ._support import Target, blocks, launch, unit


@triton.jit(
    do_not_specialize=["B", "T", "chunk", "stride_act_b", "stride_act_t", "stride_grad_b", "stride_grad_t"]
)  # fmt: skip
def grad_moments_kernel(
    act_ptr, grad_ptr, first_ptr, second_ptr, B, T, chunk, I, O,
    stride_act_b: tl.int64, stride_act_t: tl.int64, stride_grad_b: tl.int64, stride_grad_t: tl.int64,
    BIAS: tl.constexpr, ONE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One ROWS × COLUMNS tile of both sums over ``chunk`` examples; first and second are [splits, O, I (+ 1)].

    ONE: the examples have one position, and take the place of positions in the products.
    """
    width = I + 1 if BIAS else I
    across = tl.cdiv(width, COLUMNS)
    tiles = tl.cdiv(O, ROWS) * across
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    begin_b = split * chunk
    end_b = tl.minimum(begin_b + chunk, B)
    if ONE:
        for begin in range(begin_b, end_b, BLOCK):
            example = (begin + tl.arange(0, BLOCK)).to(tl.int64)
            live = (example < end_b)[:, None]
            at = example[:, None] * (stride_grad_b * UNIT) + row[None, :]
            d = tl.load(grad_ptr + at, mask=live & (row < O)[None, :], other=0.0)
            at = example[:, None] * (stride_act_b * UNIT) + column[None, :]
            a = tl.load(act_ptr + at, mask=live & (column < I)[None, :], other=0.0)
            if BIAS:
                a = tl.where((column == I)[None, :] & live, 1.0, a.to(tl.float32)).to(a.dtype)
            first = product(tl.trans(d), a, first, PRECISION)
            wide_d, wide_a = d.to(tl.float32), a.to(tl.float32)
            second = product(tl.trans(wide_d * wide_d), wide_a * wide_a, second, PRECISION)
    else:
        for b in range(begin_b, end_b):
            act_rows = act_ptr + b * (stride_act_b * UNIT)
            grad_rows = grad_ptr + b * (stride_grad_b * UNIT)
            G = tl.zeros((ROWS, COLUMNS), tl.float32)
            for begin in range(0, T, BLOCK):
                position = (begin + tl.arange(0, BLOCK)).to(tl.int64)
                live = (position < T)[:, None]
                at = position[:, None] * (stride_grad_t * UNIT) + row[None, :]
                d = tl.load(grad_rows + at, mask=live & (row < O)[None, :], other=0.0)
                at = position[:, None] * (stride_act_t * UNIT) + column[None, :]
                a = tl.load(act_rows + at, mask=live & (column < I)[None, :], other=0.0)
                if BIAS:
                    a = tl.where((column == I)[None, :] & live, 1.0, a.to(tl.float32)).to(a.dtype)
                G = product(tl.trans(d), a, G, PRECISION)
            first += G
            second += G * G
    cell = (split.to(tl.int64) * O + row[:, None]) * width + column[None, :]
    inside = (row < O)[:, None] & (column < width)[None, :]
    tl.store(first_ptr + cell, first, mask=inside)
    tl.store(second_ptr + cell, second, mask=inside)


class Tiles(NamedTuple):
    """Rows and columns of a tile of O × I, and positions of a product."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


def moment_tiles(T: int, dtype: torch.dtype, precision: str, target: Target) -> Tiles:
    """Three accumulators of 64 × 128 (two for one position): as many registers as 8 warps can spare."""
    if target.interpreter:
        return Tiles(32, 64, 32, 4, 1)
    if dtype == torch.float32 and precision != "tf32":
        return Tiles(32 if T == 1 else 64, 64, 16, 8, 1)
    depth = 16 if T <= 16 else 32
    return Tiles(64, 128, depth, 8, 3)


def grad_moments(act: torch.Tensor, grad: torch.Tensor, bias: bool, first: torch.Tensor, second: torch.Tensor) -> None:
    """act [B, T, I], grad [B, T, O] with feature stride 1; fills first and second [O, I (+ 1)] in float32."""
    B, T, I = act.shape
    O, width = first.shape
    if B == 0 or T == 0:
        first.zero_()
        second.zero_()
        return
    target = _support.target(act.device)
    precision = _support.float32_precision()
    one = T == 1
    if one and act.dtype != torch.float32 and precision == "ieee":
        precision = "tf32x3"  # the squares of half types have at most 22 bits: float32 units would gain little
    tiling = moment_tiles(T, torch.float32 if one else act.dtype, precision, target)
    tiles = blocks(O, tiling.rows) * blocks(width, tiling.columns)
    splits = max(1, min(blocks(target.multiprocessors, max(1, tiles)), B // (tiling.block if one else 1)))
    chunk = blocks(B, splits)
    splits = blocks(B, chunk)
    parts = [out if splits == 1 else act.new_empty(splits, O, width, dtype=torch.float32) for out in (first, second)]
    factor = unit(*act.stride()[:2], *grad.stride()[:2])
    launch(
        grad_moments_kernel, (tiles * splits,), act, grad, *parts, B, T, chunk, I, O,
        *(stride // factor for stride in (*act.stride()[:2], *grad.stride()[:2])), bias, one, factor, precision,
        tiling.rows, tiling.columns, tiling.block, num_warps=tiling.warps, num_stages=tiling.stages, device=act.device,
    )  # fmt: skip
    if splits > 1:
        torch.sum(parts[0], 0, out=first)
        torch.sum(parts[1], 0, out=second)
