"""The Gram side of ``grad_sqnorm``: ‖G_b‖² as a sum over the tiles of A Aᵀ ∘ D Dᵀ, and what both ways share.

The head of ``grad_sqnorm.py`` tells how and why.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import product
from ._support import Target, blocks, launch, unit

SIZES = ["B", "T", "E", "tiles", "stride_act_b", "stride_act_t", "stride_grad_b", "stride_grad_t", "n", "parts", "S"]


@triton.jit(do_not_specialize=SIZES)
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


@triton.jit(do_not_specialize=SIZES)
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
def outer(
    x_ptr, left, right, left_live, right_live, start, stop, F, acc, PRECISION: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """acc + X[left] X[right]ᵀ over features start to stop; left and right are the offsets of rows."""
    for begin in range(start, stop, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = (at < F)[None, :]
        x = tl.load(x_ptr + left[:, None] + at[None, :], mask=left_live[:, None] & inside, other=0.0)
        y = tl.load(x_ptr + right[:, None] + at[None, :], mask=right_live[:, None] & inside, other=0.0)
        acc = product(x, tl.trans(y), acc, PRECISION)
    return acc


@triton.jit
def centered_rows(x_ptr, center_ptr, row, example, live, flag, at, F):
    """Rows with their example's c subtracted, in their own type (exactly: see the head of this file)."""
    inside = (at < F)[None, :]
    x = tl.load(x_ptr + row[:, None] + at[None, :], mask=live[:, None] & inside, other=0.0)
    centers = tl.load(center_ptr + example[:, None] * F + at[None, :], mask=(live & flag)[:, None] & inside, other=0.0)
    return (x.to(tl.float32) - centers).to(x.dtype)


@triton.jit
def twice_cross(
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


@triton.jit(do_not_specialize=SIZES)
def grad_sqnorm_gram_kernel(
    act_ptr, grad_ptr, center_ptr, total_ptr, flag_ptr, partial_ptr, parts_ptr, B: tl.int64, T, E, tiles, S, I, O,
    stride_act_b: tl.int64, stride_act_t: tl.int64, stride_grad_b: tl.int64, stride_grad_t: tl.int64,
    CENTERED: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of Σ (ÃÃᵀ∘DDᵀ) of one example or of E packed ones; centred, also blocks of the terms of c.

    A group (an example, or E) has tiles·(tiles+1)/2 programs of the first kind, then ``tiles`` of the second. Launched
    twice: the subtraction would slow down the plain sum, so each launch leaves the other's tiles alone. partial is
    [B, programs of a group] or, packed, [B, 2, T].

    SPLIT: S programs a tile, each with a part of the features; parts is [tiles of all groups, S, 2, ROWS, ROWS].
    """
    triangle = tiles * (tiles + 1) // 2
    programs = triangle + tiles
    program, part = tl.program_id(0), 0
    start_I, stop_I, start_O, stop_O = 0, I, 0, O
    if SPLIT:
        program, part = tl.program_id(0) // S, tl.program_id(0) % S
        step_I, step_O = tl.cdiv(tl.cdiv(I, BLOCK), S) * BLOCK, tl.cdiv(tl.cdiv(O, BLOCK), S) * BLOCK
        start_I, start_O = part * step_I, part * step_O
        stop_I, stop_O = tl.minimum(start_I + step_I, I), tl.minimum(start_O + step_O, O)
    if CENTERED:
        group = (program // programs).to(tl.int64)
        index = program % programs
    else:
        group = (program // triangle).to(tl.int64)
        index = program % triangle
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
                sums = twice_cross(
                    act_ptr, grad_ptr, center_ptr, total_ptr, left_act, left_grad, left_example, left_live & left_flag,
                    I, O, ROWS, BLOCK,
                )  # fmt: skip
        else:
            act_gram = tl.zeros((ROWS, ROWS), tl.float32)
            if CENTERED:
                for begin in range(start_I, stop_I, BLOCK):
                    at = begin + tl.arange(0, BLOCK)
                    x = centered_rows(act_ptr, center_ptr, left_act, left_example, left_live, left_flag, at, I)
                    y = centered_rows(act_ptr, center_ptr, right_act, right_example, right_live, right_flag, at, I)
                    act_gram = product(x, tl.trans(y), act_gram, PRECISION)
            else:
                act_gram = outer(
                    act_ptr, left_act, right_act, left_live, right_live, start_I, stop_I, I, act_gram, PRECISION, BLOCK
                )  # fmt: skip
            grad_gram = tl.zeros((ROWS, ROWS), tl.float32)
            grad_gram = outer(
                grad_ptr, left_grad, right_grad, left_live, right_live, start_O, stop_O, O, grad_gram, PRECISION, BLOCK
            )  # fmt: skip
            if SPLIT:
                cell = tl.arange(0, ROWS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
                own_ptr = parts_ptr + ((group * triangle + index) * S + part) * (2 * ROWS * ROWS)
                tl.store(own_ptr + cell, act_gram)
                tl.store(own_ptr + ROWS * ROWS + cell, grad_gram)
            else:
                both = act_gram * grad_gram
                if PACKED:  # not a product with 0: another example's NaN stays its own
                    both = tl.where(left_example[:, None] == right_example[None, :], both, 0.0)
                sums = tl.sum(both, 1)
        if (not SPLIT) | cross:  # the parts of a tile meet in another launch
            if PACKED:
                tl.store(partial_ptr + slot, sums, mask=left_live & (part == 0))
            else:
                twice = tl.where(i == j, 1.0, 2.0)  # the tile above the diagonal is the same
                tl.store(partial_ptr + group * programs + index, twice * tl.sum(sums, 0), mask=part == 0)


@triton.jit(do_not_specialize=SIZES)
def grad_sqnorm_gram_join_kernel(
    parts_ptr, partial_ptr, B: tl.int64, T, E, tiles, S, PACKED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The S parts of one tile's two Gram matrices, added up, multiplied and summed as a program without parts does."""
    triangle = tiles * (tiles + 1) // 2
    group = (tl.program_id(0) // triangle).to(tl.int64)
    index = tl.program_id(0) % triangle
    tile_ptr = parts_ptr + tl.program_id(0).to(tl.int64) * S * (2 * ROWS * ROWS)
    i = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    j = index - i * (i + 1) // 2
    column = tl.arange(0, ROWS)
    right_example = group * E + (j * ROWS + column) // T
    tile_sum = 0.0
    for begin in range(0, ROWS, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        cell = row[:, None] * ROWS + column[None, :]
        act_gram = tl.zeros((BLOCK, ROWS), tl.float32)
        grad_gram = tl.zeros((BLOCK, ROWS), tl.float32)
        for part in range(0, S):
            act_gram += tl.load(tile_ptr + part * (2 * ROWS * ROWS) + cell)
            grad_gram += tl.load(tile_ptr + part * (2 * ROWS * ROWS) + ROWS * ROWS + cell)
        both = act_gram * grad_gram
        if PACKED:
            left = i * ROWS + row
            left_example = group * E + left // T
            both = tl.where(left_example[:, None] == right_example[None, :], both, 0.0)
            live = (left < E * T) & (left_example < B)
            tl.store(partial_ptr + left_example * (2 * T) + left % T, tl.sum(both, 1), mask=live)
        else:
            tile_sum += tl.sum(tl.sum(both, 1), 0)
    if not PACKED:
        twice = tl.where(i == j, 1.0, 2.0)
        tl.store(partial_ptr + group * (triangle + tiles) + index, twice * tile_sum)


@triton.jit(do_not_specialize=SIZES)
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


def gram_tiles(
    B: int, T: int, dtype: torch.dtype, precision: str, target: Target, aligned: bool = True
) -> Tiles:  # fmt: skip
    """Tiles of T × T: the largest that still fill the GPU, or one of 64 rows that short examples share.

    Rows that do not start at multiples of 16 elements are loaded one by one, from as many addresses as fit registers.
    """
    if target.interpreter:
        return Tiles(64, 64, 64, 4, 1)
    if dtype == torch.float32 and precision != "tf32":  # float32 units, or three products: registers are the limit
        return Tiles(64, 64, 32 if aligned else 16, 8, 2)
    n = blocks(T, 128)
    rows = 128 if aligned and T > 64 and B * n * (n + 1) // 2 >= target.multiprocessors else 64
    return Tiles(rows, rows, 32 if dtype == torch.float32 else 64, 4 if rows == 64 and aligned else 8, 3)


def splits(programs: int, depth: int, target: Target) -> int:
    """Into how many parts of at least one step a tile's depth goes, so that every multiprocessor has a program."""
    return max(1, min(blocks(target.multiprocessors, max(1, programs)), depth))


def column_tile(T: int, target: Target) -> tuple[int, int]:
    """Positions and features of a tile that is summed over positions."""
    positions = 8 if T <= 8 else 32
    return positions, (32 if target.interpreter else max(64, 2048 // positions))


def by_gram_tiles(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor, target: Target) -> None:
    B, T, I = act.shape
    O, device = grad.shape[2], act.device
    precision = _support.float32_precision()
    UNIT = unit(*act.stride()[:2], *grad.stride()[:2])
    tiling = gram_tiles(B, T, act.dtype, precision, target, UNIT > 1)
    strides = [stride // UNIT for stride in (*act.stride()[:2], *grad.stride()[:2])]
    POSITIONS, BLOCK = column_tile(T, target)
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
    triangle = tiles * (tiles + 1) // 2
    programs = triangle + tiles
    groups = blocks(B, E)
    S = splits(groups * triangle, blocks(max(I, O), tiling.block), target)
    partial = act.new_empty(B, 2 * T if packed else programs, dtype=torch.float32)
    parts_of_tiles = partial if S == 1 else act.new_empty(groups * triangle, S, 2, tiling.rows**2, dtype=torch.float32)
    # half the depth for the subtraction: it holds its factors in registers
    for centered, count, block in ((False, triangle, tiling.block), (True, programs, max(16, tiling.block // 2))):
        launch(
            grad_sqnorm_gram_kernel, (groups * count * S,), act, grad, center, total, flag, partial, parts_of_tiles, B,
            T, E, tiles, S, I, O, *strides, centered, packed, S > 1, UNIT, precision, tiling.rows, block,
            num_warps=tiling.warps, num_stages=tiling.stages, device=device,
        )  # fmt: skip
    if S > 1:
        launch(
            grad_sqnorm_gram_join_kernel, (groups * triangle,), parts_of_tiles, partial, B, T, E, tiles, S, packed,
            tiling.rows, 16, num_warps=4, device=device,
        )  # fmt: skip
    finish(partial, center, total, flag, out, I, O, True, bias, target)


def centers_and_totals(act: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c [B, I] and s = Σ_t D[t] [B, O] of every example, in float32; see the head of this file."""
    B, T, I = act.shape
    O, device = grad.shape[2], act.device
    UNIT = unit(*act.stride()[:2], *grad.stride()[:2])
    strides = [stride // UNIT for stride in (*act.stride()[:2], *grad.stride()[:2])]
    POSITIONS, BLOCK = column_tile(T, _support.target(device))
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


def finish(
    partial: torch.Tensor, center: torch.Tensor, total: torch.Tensor, flag: torch.Tensor, out: torch.Tensor, I: int,
    O: int, gram: bool, bias: bool, target: Target,
) -> None:  # fmt: skip
    BLOCK = 64 if target.interpreter else 1024
    launch(
        grad_sqnorm_finish_kernel, (out.shape[0],), partial, center, total, flag, out, partial.shape[1], I, O, gram,
        bias, BLOCK, num_warps=4, device=out.device,
    )  # fmt: skip
