"""The weight gradient Σ_b G_b of a linear layer and every ‖G_b‖², in one pass over the factors.

Not measured on a GPU yet; the floors below are counted, not timed. A program keeps one tile of O × I, as a product
that splits nothing would. It adds an example's positions up in one accumulator, G_b's tile; when the example ends, the
tile's squares go to memory ([B, tiles], a few bytes for each example and tile) and the tile joins a second accumulator.
2BTIO FLOPs, those of the weight gradient alone, bound by the tensor cores. Examples and positions are one loop, so that
loads run ahead across the end of an example.

Where the tiles do not fill the GPU the batch is split; the parts go to memory ([splits, O, I]). They and the squares
are added up in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import product
from ._support import Target, blocks, launch, unit

GROUP = tl.constexpr(8)  # rows of tiles that run side by side, so that they find each other's columns in L2


@triton.jit(
    do_not_specialize=["B", "T", "chunk", "stride_act_b", "stride_act_t", "stride_grad_b", "stride_grad_t"]
)  # fmt: skip
def grad_weight_sqnorm_kernel(
    act_ptr, grad_ptr, sum_ptr, squares_ptr, B, T, chunk, I, O,
    stride_act_b: tl.int64, stride_act_t: tl.int64, stride_grad_b: tl.int64, stride_grad_t: tl.int64,
    BIAS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One ROWS × COLUMNS tile of the sum over ``chunk`` examples; sum is [splits, O, I (+ 1)], squares [tiles, B]."""
    width = I + 1 if BIAS else I
    across, down = tl.cdiv(width, COLUMNS), tl.cdiv(O, ROWS)
    split = tl.program_id(0) // (across * down)
    tile = tl.program_id(0) % (across * down)
    first = tile // (GROUP * across) * GROUP
    rows = tl.minimum(down - first, GROUP)
    row = (first + tile % (GROUP * across) % rows) * ROWS + tl.arange(0, ROWS)
    column = tile % (GROUP * across) // rows * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = split * chunk, tl.minimum(split * chunk + chunk, B)
    squares_at = squares_ptr + tile.to(tl.int64) * B
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    G = tl.zeros((ROWS, COLUMNS), tl.float32)
    steps = tl.cdiv(T, BLOCK)
    for step in range(begin * steps, end * steps):
        b = step // steps
        position = ((step % steps) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        live = (position < T)[:, None]
        at = b.to(tl.int64) * (stride_grad_b * UNIT) + position[:, None] * (stride_grad_t * UNIT) + row[None, :]
        d = tl.load(grad_ptr + at, mask=live & (row < O)[None, :], other=0.0)
        at = b.to(tl.int64) * (stride_act_b * UNIT) + position[:, None] * (stride_act_t * UNIT) + column[None, :]
        a = tl.load(act_ptr + at, mask=live & (column < I)[None, :], other=0.0)
        if BIAS:
            a = tl.where((column == I)[None, :] & live, 1.0, a.to(tl.float32)).to(a.dtype)
        G = product(tl.trans(d), a, G, PRECISION)
        if step % steps == steps - 1:
            tl.store(squares_at + b, tl.sum(tl.sum(G * G, 1), 0))
            total += G
            G = tl.zeros((ROWS, COLUMNS), tl.float32)
    cell = (split.to(tl.int64) * O + row[:, None]) * width + column[None, :]
    inside = (row < O)[:, None] & (column < width)[None, :]
    tl.store(sum_ptr + cell, total.to(sum_ptr.dtype.element_ty), mask=inside)


class Tiles(NamedTuple):
    """Rows and columns of a tile of O × I, and positions of a product."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


def weight_tiles(
    T: int, dtype: torch.dtype, precision: str, target: Target, bias: bool = False, aligned: bool = True
) -> Tiles:
    """Two accumulators of 128 × 128: as many registers as 8 warps can spare."""
    if target.interpreter:
        return Tiles(32, 64, 32, 4, 1)
    hopper = target.capability >= (9, 0)
    if dtype == torch.float32 and precision != "tf32":  # float32 units, or three products: registers are the limit
        return Tiles(64, 64, 16, 8, 2)
    rows = 64 if bias and not hopper else 128  # there, the column of ones is put in between memory and product
    if dtype == torch.float32:
        return Tiles(rows, 128, 32, 8, 3)
    # where T is no multiple of 64, positions that are not there would take more than the shorter loop saves
    deep = hopper and aligned and blocks(T, 64) * 64 <= 1.1 * T
    return Tiles(rows, 128, 64, 8, 3) if deep else Tiles(rows, 128, 32, 8, 4)


def one_pass(T: int, I: int, O: int, device: torch.device) -> bool:
    """Whether the norms should come out of the weight gradient's own product.

    This kernel's product cannot be as fast as the library's. Where the Gram sum takes less than an eighth of the
    product's FLOPs (T(I+O) / 2IO of them), the library's product and the Gram sum are taken instead.
    """
    if _support.target(device).interpreter:
        return T > 1
    return T > 1 and 8 * T * (I + O) >= 2 * I * O


def grad_weight_sqnorm(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, weight_grad: torch.Tensor, sqnorm: torch.Tensor
) -> None:
    """act [B, T, I], grad [B, T, O] with feature stride 1; fills weight_grad [O, I (+ 1)] and sqnorm [B] in float32."""
    B, T, I = act.shape
    O, width = weight_grad.shape
    if B == 0 or T == 0 or O == 0 or width == 0:
        weight_grad.zero_()
        sqnorm.zero_()
        return
    target = _support.target(act.device)
    precision = _support.float32_precision()
    factor = unit(*act.stride()[:2], *grad.stride()[:2])
    tiling = weight_tiles(T, act.dtype, precision, target, bias, factor > 1)
    tiles = blocks(O, tiling.rows) * blocks(width, tiling.columns)
    splits = max(1, min(target.multiprocessors // tiles, B))  # one more would be a second, mostly empty round
    chunk = blocks(B, splits)
    splits = blocks(B, chunk)
    sums = weight_grad if splits == 1 else act.new_empty(splits, O, width, dtype=torch.float32)
    squares = act.new_empty(tiles, B, dtype=torch.float32)
    launch(
        grad_weight_sqnorm_kernel, (tiles * splits,), act, grad, sums, squares, B, T, chunk, I, O,
        *(stride // factor for stride in (*act.stride()[:2], *grad.stride()[:2])), bias, factor, precision,
        tiling.rows, tiling.columns, tiling.block, num_warps=tiling.warps, num_stages=tiling.stages, device=act.device,
    )  # fmt: skip
    torch.sum(squares, 0, out=sqnorm)
    if splits > 1:
        weight_grad.copy_(sums.sum(0))
