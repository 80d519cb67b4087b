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

Every sum has one order, whatever runs first: partial sums go to memory ([B, tiles]) and a last launch adds them up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import add_squares, product, product_of_squares
from ._support import Target, blocks, launch, power_of_two, unit

_SIZES = ["B", "T", "E", "tiles", "stride_act_b", "stride_act_t", "stride_grad_b", "stride_grad_t", "n", "parts"]


@triton.jit(do_not_specialize=_SIZES)
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


@triton.jit(do_not_specialize=_SIZES)
def grad_sqnorm_center_kernel(
    act_ptr, center_ptr, energy_ptr, T, I, parts, stride_act_b: tl.int64, stride_act_t: tl.int64,
    UNIT: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is subtracted from each feature of one example (0 where that would round), and the energies it carries."""
    b = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    feature = part * BLOCK + tl.arange(0, BLOCK)
    inside = feature < I
    total = tl.zeros((POSITIONS, BLOCK), tl.float32)
    energy = tl.zeros((POSITIONS, BLOCK), tl.float32)
    least = tl.full((POSITIONS, BLOCK), float("inf"), tl.float32)
    most = tl.full((POSITIONS, BLOCK), float("-inf"), tl.float32)
    rows_ptr = act_ptr + b * (stride_act_b * UNIT)
    for begin in range(0, T, POSITIONS):
        position = (begin + tl.arange(0, POSITIONS)).to(tl.int64)
        live = (position < T)[:, None] & inside[None, :]
        at = position[:, None] * (stride_act_t * UNIT) + feature[None, :]
        a = tl.load(rows_ptr + at, mask=live, other=0.0).to(tl.float32)
        total += a
        energy += a * a
        least = tl.minimum(least, tl.where(live, a, float("inf")))
        most = tl.maximum(most, tl.where(live, a, float("-inf")))
    mean = tl.sum(total, 0) / T
    low, high = tl.min(least, 0), tl.max(most, 0)
    if act_ptr.dtype.element_ty != tl.float32:
        mean = mean.to(act_ptr.dtype.element_ty).to(tl.float32)
        above = (mean > 0) & (low >= 0.5 * mean) & (high <= 2 * mean)
        below = (mean < 0) & (high <= 0.5 * mean) & (low >= 2 * mean)
        mean = tl.where(above | below, mean, 0.0)
    mean = tl.where(inside, mean, 0.0)
    tl.store(center_ptr + b * I + feature, mean, mask=inside)
    slot = (b * parts + part) * 2
    tl.store(energy_ptr + slot, tl.sum(mean * mean, 0))
    tl.store(energy_ptr + slot + 1, tl.sum(tl.sum(energy, 0), 0) / T)


@triton.jit(do_not_specialize=_SIZES)
def grad_sqnorm_total_kernel(
    grad_ptr, energy_ptr, flag_ptr, total_ptr, T, O, parts, n, stride_grad_b: tl.int64,
    stride_grad_t: tl.int64, GRAM: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr, POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """s = Σ_t D[t] of one example where it is needed, and whether the example is centred; n blocks of s an example."""
    b = (tl.program_id(0) // n).to(tl.int64)
    part = tl.program_id(0) % n
    wanted = BIAS
    if GRAM:
        carried, energy = 0.0, 0.0
        for first in range(0, parts, 64):
            slot = first + tl.arange(0, 64)
            at = (b * parts + slot) * 2
            carried += tl.sum(tl.load(energy_ptr + at, mask=slot < parts, other=0.0), 0)
            energy += tl.sum(tl.load(energy_ptr + at + 1, mask=slot < parts, other=0.0), 0)
        centered = (carried > 0.25 * energy) & (carried > 0)
        if part == 0:
            tl.store(flag_ptr + b, tl.where(centered, 1, 0))
        wanted = centered | BIAS
    if wanted:
        feature = part * BLOCK + tl.arange(0, BLOCK)
        inside = feature < O
        total = tl.zeros((POSITIONS, BLOCK), tl.float32)
        rows_ptr = grad_ptr + b * (stride_grad_b * UNIT)
        for begin in range(0, T, POSITIONS):
            position = (begin + tl.arange(0, POSITIONS)).to(tl.int64)
            live = (position < T)[:, None] & inside[None, :]
            at = position[:, None] * (stride_grad_t * UNIT) + feature[None, :]
            total += tl.load(rows_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(total_ptr + b * O + feature, tl.sum(total, 0), mask=inside)


@triton.jit
def _outer(x_ptr, left, right, left_live, right_live, F, acc, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """acc + X[left] X[right]ᵀ; left and right are the offsets of rows."""
    for begin in range(0, F, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = (at < F)[None, :]
        x = tl.load(x_ptr + left[:, None] + at[None, :], mask=left_live[:, None] & inside, other=0.0)
        y = tl.load(x_ptr + right[:, None] + at[None, :], mask=right_live[:, None] & inside, other=0.0)
        acc = product(x, tl.trans(y), acc, PRECISION)
    return acc


@triton.jit
def _centered(x_ptr, center_ptr, row, example, live, flag, at, F):
    """Rows with their example's c subtracted, in their own type (exactly: see the head of this file)."""
    inside = (at < F)[None, :]
    x = tl.load(x_ptr + row[:, None] + at[None, :], mask=live[:, None] & inside, other=0.0)
    centers = tl.load(center_ptr + example[:, None] * F + at[None, :], mask=(live & flag)[:, None] & inside, other=0.0)
    return (x.to(tl.float32) - centers).to(x.dtype)


@triton.jit
def _twice_cross(
    act_ptr, grad_ptr, center_ptr, total_ptr, act_row, grad_row, example, live, I, O, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """2 (D[t]·s)(Ã[t]·c) of ROWS positions."""
    act_dots = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, I, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = live[:, None] & (at < I)[None, :]
        a = tl.load(act_ptr + act_row[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        c = tl.load(center_ptr + example[:, None] * I + at[None, :], mask=inside, other=0.0)
        act_dots += (a - c) * c
    grad_dots = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, O, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = live[:, None] & (at < O)[None, :]
        d = tl.load(grad_ptr + grad_row[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_dots += d * tl.load(total_ptr + example[:, None] * O + at[None, :], mask=inside, other=0.0)
    return 2.0 * tl.sum(act_dots, 1) * tl.sum(grad_dots, 1)


@triton.jit(do_not_specialize=_SIZES)
def grad_sqnorm_gram_kernel(
    act_ptr, grad_ptr, center_ptr, total_ptr, flag_ptr, partial_ptr, B: tl.int64, T, E, tiles, I, O,
    stride_act_b: tl.int64, stride_act_t: tl.int64, stride_grad_b: tl.int64, stride_grad_t: tl.int64,
    CENTERED: tl.constexpr, PACKED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of Σ (ÃÃᵀ∘DDᵀ) of one example or of E packed ones; centred, also blocks of the terms of c.

    A group (an example, or E) has tiles·(tiles+1)/2 programs of the first kind, then ``tiles`` of the second. Launched
    twice: the subtraction would slow down the plain sum, so each launch leaves the other's tiles alone. partial is
    [B, programs of a group] or, packed, [B, 2, T].
    """
    triangle = tiles * (tiles + 1) // 2
    programs = triangle + tiles
    if CENTERED:
        group = (tl.program_id(0) // programs).to(tl.int64)
        index = tl.program_id(0) % programs
    else:
        group = (tl.program_id(0) // triangle).to(tl.int64)
        index = tl.program_id(0) % triangle
    cross = index >= triangle
    i = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)  # index = i(i+1)/2 + j, up to rounding of the root
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    j = index - i * (i + 1) // 2
    i = tl.where(cross, index - triangle, i)
    j = tl.where(cross, i, j)

    left = i * ROWS + tl.arange(0, ROWS)
    right = j * ROWS + tl.arange(0, ROWS)
    left_example, right_example = group * E + left // T, group * E + right // T
    left_live = (left < E * T) & (left_example < B)
    right_live = (right < E * T) & (right_example < B)
    left_act = left_example * (stride_act_b * UNIT) + (left % T) * (stride_act_t * UNIT)
    right_act = right_example * (stride_act_b * UNIT) + (right % T) * (stride_act_t * UNIT)
    left_grad = left_example * (stride_grad_b * UNIT) + (left % T) * (stride_grad_t * UNIT)
    right_grad = right_example * (stride_grad_b * UNIT) + (right % T) * (stride_grad_t * UNIT)
    left_flag = tl.load(flag_ptr + left_example, mask=left_live, other=0) > 0
    centered = tl.max(left_flag.to(tl.int32), 0) > 0
    if PACKED:
        slot = left_example * (2 * T) + left % T
    if (centered | cross) == CENTERED:
        sums = tl.zeros((ROWS,), tl.float32)
        if CENTERED:
            right_flag = tl.load(flag_ptr + right_example, mask=right_live, other=0) > 0
            if PACKED:
                slot += tl.where(cross, T, 0)
        if cross:
            if CENTERED:
                sums = _twice_cross(
                    act_ptr, grad_ptr, center_ptr, total_ptr, left_act, left_grad, left_example, left_live & left_flag,
                    I, O, ROWS, BLOCK,
                )  # fmt: skip
        else:
            act_gram = tl.zeros((ROWS, ROWS), tl.float32)
            if CENTERED:
                for begin in range(0, I, BLOCK):
                    at = begin + tl.arange(0, BLOCK)
                    x = _centered(act_ptr, center_ptr, left_act, left_example, left_live, left_flag, at, I)
                    y = _centered(act_ptr, center_ptr, right_act, right_example, right_live, right_flag, at, I)
                    act_gram = product(x, tl.trans(y), act_gram, PRECISION)
            else:
                act_gram = _outer(act_ptr, left_act, right_act, left_live, right_live, I, act_gram, PRECISION, BLOCK)
            grad_gram = tl.zeros((ROWS, ROWS), tl.float32)
            grad_gram = _outer(grad_ptr, left_grad, right_grad, left_live, right_live, O, grad_gram, PRECISION, BLOCK)
            both = act_gram * grad_gram
            if PACKED:  # not a product with 0: another example's NaN stays its own
                both = tl.where(left_example[:, None] == right_example[None, :], both, 0.0)
            sums = tl.sum(both, 1)
        if PACKED:
            tl.store(partial_ptr + slot, sums, mask=left_live)
        else:
            twice = tl.where(i == j, 1.0, 2.0)  # the tile above the diagonal is the same
            tl.store(partial_ptr + group * programs + index, twice * tl.sum(sums, 0))


@triton.jit(do_not_specialize=_SIZES)
def grad_sqnorm_direct_kernel(
    act_ptr, grad_ptr, partial_ptr, T, I, O, stride_act_b: tl.int64, stride_act_t: tl.int64,
    stride_grad_b: tl.int64, stride_grad_t: tl.int64,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of one ROWS × COLUMNS tile of G_b; partial is [B, tiles of O × I]."""
    across = tl.cdiv(I, COLUMNS)
    tiles = tl.cdiv(O, ROWS) * across
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    act_rows = act_ptr + b * (stride_act_b * UNIT)
    grad_rows = grad_ptr + b * (stride_grad_b * UNIT)
    for begin in range(0, T, BLOCK):
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
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(acc * acc, 1), 0))


@triton.jit(do_not_specialize=_SIZES)
def grad_sqnorm_finish_kernel(
    partial_ptr, center_ptr, total_ptr, flag_ptr, out_ptr, n, I, O, GRAM: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds up the n partial sums of one example, ‖s‖²‖c‖² where it is centred, and ‖s‖² with a bias."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, n, BLOCK):
        sums += tl.load(partial_ptr + b * n + begin + lane, mask=begin + lane < n, other=0.0)
    sqnorm = tl.sum(sums, 0)
    times = 1.0 if BIAS else 0.0
    wanted = BIAS
    if GRAM:
        centered = tl.load(flag_ptr + b) > 0
        wanted = centered | BIAS
        if centered:
            sums = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, I, BLOCK):
                c = tl.load(center_ptr + b * I + begin + lane, mask=begin + lane < I, other=0.0)
                sums += c * c
            times += tl.sum(sums, 0)
    if wanted:
        sums = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, O, BLOCK):
            s = tl.load(total_ptr + b * O + begin + lane, mask=begin + lane < O, other=0.0)
            sums += s * s
        sqnorm += times * tl.sum(sums, 0)
    tl.store(out_ptr + b, sqnorm)


class Tiles(NamedTuple):
    """How the products of one launch are cut."""

    rows: int
    columns: int
    block: int
    warps: int
    stages: int


def gram_tiles(B: int, T: int, dtype: torch.dtype, precision: str, target: Target) -> Tiles:
    """Tiles of T × T: the largest that still fill the GPU, or one of 64 rows that short examples share."""
    if target.interpreter:
        return Tiles(64, 64, 64, 4, 1)
    if dtype == torch.float32 and precision != "tf32":  # float32 units, or three products: registers are the limit
        return Tiles(64, 64, 32, 8, 2)
    n = blocks(T, 128)
    rows = 128 if T > 64 and B * n * (n + 1) // 2 >= target.multiprocessors else 64
    return Tiles(rows, rows, 32 if dtype == torch.float32 else 64, 8 if rows == 128 else 4, 3)


def direct_tiles(B: int, I: int, O: int, dtype: torch.dtype, precision: str, target: Target) -> Tiles:
    """Tiles of O × I: the largest that still fill the GPU."""
    if target.interpreter:
        return Tiles(32, 64, 32, 4, 1)
    wide = dtype != torch.float32 or precision == "tf32"
    for side in (128, 64, 32) if wide else (64, 32):
        if B * blocks(O, side) * blocks(I, side) >= target.multiprocessors and min(I, O) > side // 2:
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
        _gram(act, grad, bias, out, target)
    else:
        _direct(act, grad, bias, out, target)


def _rows(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor, target: Target) -> None:
    B, _, I = act.shape
    O = grad.shape[2]
    BLOCK = power_of_two(max(I, O), 16, 64 if target.interpreter else 1024)
    ROWS = max(1, (256 if target.interpreter else 4096) // BLOCK)
    UNIT = unit(act.stride(0), grad.stride(0))
    launch(
        grad_sqnorm_rows_kernel, (blocks(B, ROWS),), act, grad, out, B, I, O, act.stride(0) // UNIT,
        grad.stride(0) // UNIT, bias, UNIT, ROWS, BLOCK, num_warps=4, device=act.device,
    )  # fmt: skip


def _column_tile(T: int, target: Target) -> tuple[int, int]:
    """Positions and features of a tile that is summed over positions."""
    positions = 8 if T <= 8 else 32
    return positions, (32 if target.interpreter else max(64, 2048 // positions))


def _gram(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor, target: Target) -> None:
    B, T, I = act.shape
    O, device = grad.shape[2], act.device
    precision = _support.float32_precision()
    tiling = gram_tiles(B, T, act.dtype, precision, target)
    UNIT = unit(*act.stride()[:2], *grad.stride()[:2])
    strides = [stride // UNIT for stride in (*act.stride()[:2], *grad.stride()[:2])]
    POSITIONS, BLOCK = _column_tile(T, target)
    parts = max(1, blocks(I, BLOCK))
    center = act.new_empty(B, I, dtype=torch.float32)
    energy = act.new_empty(B, parts, 2, dtype=torch.float32)
    flag = act.new_empty(B, dtype=torch.int32)
    total = act.new_empty(B, O, dtype=torch.float32)
    launch(
        grad_sqnorm_center_kernel, (B * parts,), act, center, energy, T, I, parts, *strides[:2], UNIT, POSITIONS, BLOCK,
        num_warps=4, device=device,
    )  # fmt: skip
    n = max(1, blocks(O, BLOCK))
    launch(
        grad_sqnorm_total_kernel, (B * n,), grad, energy, flag, total, T, O, parts, n, *strides[2:], True, bias, UNIT,
        POSITIONS, BLOCK, num_warps=4, device=device,
    )  # fmt: skip
    packed = tiling.rows >= 2 * T
    E = tiling.rows // T if packed else 1
    tiles = blocks(E * T, tiling.rows)
    programs = tiles * (tiles + 1) // 2 + tiles
    partial = act.new_empty(B, 2 * T if packed else programs, dtype=torch.float32)
    # half the depth for the subtraction: it holds its factors in registers
    for centered, count, block in ((False, programs - tiles, tiling.block), (True, programs, tiling.block // 2)):
        launch(
            grad_sqnorm_gram_kernel, (blocks(B, E) * count,), act, grad, center, total, flag, partial, B, T, E, tiles,
            I, O, *strides, centered, packed, UNIT, precision, tiling.rows, block, num_warps=tiling.warps,
            num_stages=tiling.stages, device=device,
        )  # fmt: skip
    _finish(partial, center, total, flag, out, I, O, True, bias, target)


def centers_and_totals(act: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c [B, I] and s = Σ_t D[t] [B, O] of every example, in float32; see the head of this file."""
    B, T, I = act.shape
    O, device = grad.shape[2], act.device
    UNIT = unit(*act.stride()[:2], *grad.stride()[:2])
    strides = [stride // UNIT for stride in (*act.stride()[:2], *grad.stride()[:2])]
    POSITIONS, BLOCK = _column_tile(T, _support.target(device))
    parts, n = max(1, blocks(I, BLOCK)), max(1, blocks(O, BLOCK))
    center = act.new_empty(B, I, dtype=torch.float32)
    energy = act.new_empty(B, parts, 2, dtype=torch.float32)
    total = act.new_empty(B, O, dtype=torch.float32)
    launch(
        grad_sqnorm_center_kernel, (B * parts,), act, center, energy, T, I, parts, *strides[:2], UNIT, POSITIONS, BLOCK,
        num_warps=4, device=device,
    )  # fmt: skip
    launch(
        grad_sqnorm_total_kernel, (B * n,), grad, energy, energy, total, T, O, parts, n, *strides[2:], False, True,
        UNIT, POSITIONS, BLOCK, num_warps=4, device=device,
    )  # fmt: skip
    return center, total


def _direct(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor, target: Target) -> None:
    B, T, I = act.shape
    O, device = grad.shape[2], act.device
    precision = _support.float32_precision()
    tiling = direct_tiles(B, I, O, act.dtype, precision, target)
    UNIT = unit(*act.stride()[:2], *grad.stride()[:2])
    strides = [stride // UNIT for stride in (*act.stride()[:2], *grad.stride()[:2])]
    tiles = blocks(O, tiling.rows) * blocks(I, tiling.columns)
    partial = act.new_empty(B, tiles, dtype=torch.float32)
    launch(
        grad_sqnorm_direct_kernel, (B * tiles,), act, grad, partial, T, I, O, *strides, UNIT, precision, tiling.rows,
        tiling.columns, tiling.block, num_warps=tiling.warps, num_stages=tiling.stages, device=device,
    )  # fmt: skip
    total = partial
    if bias:
        POSITIONS, BLOCK = _column_tile(T, target)
        n = max(1, blocks(O, BLOCK))
        total = act.new_empty(B, O, dtype=torch.float32)
        launch(
            grad_sqnorm_total_kernel, (B * n,), grad, partial, partial, total, T, O, 0, n, *strides[2:], False, True,
            UNIT, POSITIONS, BLOCK, num_warps=4, device=device,
        )  # fmt: skip
    _finish(partial, partial, total, partial, out, I, O, False, bias, target)


def _finish(
    partial: torch.Tensor, center: torch.Tensor, total: torch.Tensor, flag: torch.Tensor, out: torch.Tensor, I: int,
    O: int, gram: bool, bias: bool, target: Target,
) -> None:  # fmt: skip
    BLOCK = 64 if target.interpreter else 1024
    launch(
        grad_sqnorm_finish_kernel, (out.shape[0],), partial, center, total, flag, out, partial.shape[1], I, O, gram,
        bias, BLOCK, num_warps=4, device=out.device,
    )  # fmt: skip
