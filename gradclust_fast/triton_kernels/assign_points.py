"""Nearest centre of every dense row; B×K distances are never stored.

Not measured on a GPU yet. Tensor cores propose, float64 decides:

1. Centres, and rows as they are read, are shifted by the centres' mean where that is far from 0, and rounded to the
   rows' own type (centres of half rows that are float32: to two of them; float32 is split in tf32 by the product).
2. A tile of rows meets all centres. Every distance has a lower bound, (1 − γ)(‖x‖² + ‖c‖²) − 2x·c; a thread
   keeps, of its own columns, the two smallest and where the first was. γ covers the rounding of products and sums,
   proven, and of the operands, measured. A row whose second bound is above the first one's upper bound is settled.
3. Rows with two candidates left, or with a cost that products lost digits of (below half of ‖x‖² + ‖c‖²), and all rows
   of few features, are measured by float64 differences; those with more candidates likewise, against all centres.

Products are accumulated over at most CHAIN features and such chains then added up in float32, so γ stays near 5e-5 for
any R. With few rows, products over parts of the features go to a workspace that fits the L2 cache, and a second kernel
adds them up in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import INTERPRETED
from ._support import blocks, float32_precision, launch, power_of_two, unit
from .assign_points_settle import assign_points_far_kernel, assign_points_near_kernel

WORKSPACE = 1 << 23
"""Products held at once, 32 MB: they stay in the L2 cache."""
EXACT_FEATURES = 512
"""Up to here, reading the rows again costs little beside their products or is served by the L2 cache: every cost is
measured by differences then, and depends on its row and centre alone."""
CHAIN = 128
"""Features accumulated in one go."""
OPERAND_ERROR = {"tf32x3": 2.0**-17, "tf32": 2.5 * 2.0**-9}
"""Twice what a product's rounded float32 operands can do, relative to ‖x‖‖c‖."""


@triton.jit
def shifted_rows(points_ptr, middle_ptr, row, live, feature, R, stride):
    """Rows less the middle, float32 [ROWS, BLOCK]; zeros past the end."""
    mask = live[:, None] & (feature < R)[None, :]
    x = tl.load(points_ptr + row[:, None] * stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, x - tl.load(middle_ptr + feature, mask=feature < R, other=0.0)[None, :], 0.0)


@triton.jit
def product_with(x, high_ptr, low_ptr, at, LOW: tl.constexpr, PRECISION: tl.constexpr):
    """x [ROWS, BLOCK] in the rows' type times centres [BLOCK, CLUSTERS]."""
    high = tl.load(high_ptr + at)
    if INTERPRETED:
        out = tl.dot(x.to(tl.float32), high.to(tl.float32))
        if LOW:
            out = tl.dot(x.to(tl.float32), tl.load(low_ptr + at).to(tl.float32), out)
    else:
        out = tl.dot(x, high, input_precision=PRECISION)
        if LOW:
            out = tl.dot(x, tl.load(low_ptr + at), out, input_precision=PRECISION)
    return out


@triton.jit(do_not_specialize=["K", "step"])
def assign_points_middle_kernel(
    centers_ptr, middle_ptr, K, R, step, stride_centers, kind_ptr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """middle [R], values of kind's type: the mean of every ``step``-th centre where it dwarfs their spread, else 0."""
    feature = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, K, ROWS * step):
        k = begin + tl.arange(0, ROWS).to(tl.int64) * step
        mask = (k < K)[:, None] & (feature < R)[None, :]
        c = tl.load(centers_ptr + k[:, None] * stride_centers + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(c, 0)
        square += tl.sum(c * c, 0)
    number = ((K + step - 1) // step).to(tl.float32)
    mean = total / number
    dwarfs = 65 * mean * mean > 64 * (square / number)  # mean² > 64·variance; false for NaN
    rounded = mean.to(kind_ptr.dtype.element_ty).to(tl.float32)
    use = dwarfs & (tl.abs(rounded) < 1e18)
    tl.store(middle_ptr + feature, tl.where(use, rounded, 0.0), mask=feature < R)


@triton.jit(do_not_specialize=["K", "stride_counts"])
def assign_points_centers_kernel(
    centers_ptr, middle_ptr, counts_ptr, high_ptr, low_ptr, sqnorm_ptr, weight_ptr, facts_ptr,
    K, R, width, stride_centers, stride_counts, WEIGHTED: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """high (and low) [padded K, width]: shifted centres in the rows' type; sqnorm, weight [padded K]; facts[0]: bits of
    the largest relative rounding error of a centre, squared, or of Inf where float32 is out of its depth."""
    k = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kind = high_ptr.dtype.element_ty
    sqnorm = tl.zeros((ROWS,), tl.float32)
    error = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, width, BLOCK):
        feature = begin + tl.arange(0, BLOCK).to(tl.int64)
        c = shifted_rows(centers_ptr, middle_ptr, k, k < K, feature, R, stride_centers)
        high = c.to(kind)
        rest = c - high.to(tl.float32)
        at = k[:, None] * width + feature[None, :]
        tl.store(high_ptr + at, high)
        if LOW:
            low = rest.to(kind)
            tl.store(low_ptr + at, low)
            rest -= low.to(tl.float32)
        sqnorm += tl.sum(c * c, 1)
        error += tl.sum(rest * rest, 1)
    weight = tl.full((ROWS,), 1, tl.float32)
    if WEIGHTED:
        weight = tl.load(counts_ptr + k * stride_counts, mask=k < K, other=0).to(tl.float32) + 1
    safe = (sqnorm < 1.2e24) & (weight < 1.1e12)  # 2^80 and 2^40: nothing overflows
    relative = tl.where(safe, tl.where(error > 0, error / sqnorm, 0.0), float("inf"))
    tl.atomic_max(facts_ptr, tl.max(relative.to(tl.int32, bitcast=True)), sem="relaxed")
    tl.store(sqnorm_ptr + k, tl.where(k < K, sqnorm, float("inf")))
    tl.store(weight_ptr + k, weight)


@triton.jit(do_not_specialize=["B", "stride_points"])
def assign_points_rows_kernel(
    points_ptr, middle_ptr, sqnorm_ptr, error_ptr, B, R, stride_points, UNIT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sqnorm, error [B]: ‖x‖² of shifted rows, and of what rounding them to their own type loses."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sqnorm = tl.zeros((ROWS,), tl.float32)
    error = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, R, BLOCK):
        feature = begin + tl.arange(0, BLOCK).to(tl.int64)
        x = shifted_rows(points_ptr, middle_ptr, row, row < B, feature, R, stride_points * UNIT)
        rest = x - x.to(points_ptr.dtype.element_ty).to(tl.float32)
        sqnorm += tl.sum(x * x, 1)
        error += tl.sum(rest * rest, 1)
    tl.store(sqnorm_ptr + row, sqnorm, mask=row < B)
    tl.store(error_ptr + row, error, mask=row < B)


@triton.jit
def uncertainty(sqnorm, error, facts_ptr, slack):
    """[ROWS] γ: how far a distance may be from the computed one, relative to ‖x‖² + ‖c‖²."""
    of_centers = tl.sqrt(tl.load(facts_ptr).to(tl.float32, bitcast=True))
    of_rows = tl.sqrt(tl.where(error > 0, error / sqnorm, 0.0))
    return slack + 1.25 * (of_centers + of_rows)


@triton.jit
def three_smallest(bound, rest, index):
    """Of every row of [ROWS, CLUSTERS]: the smallest, the second, where they are, and the third, of ``rest`` too."""
    far_away = 2147483647
    infinity = float("inf")
    v1 = tl.min(bound, 1)
    i1 = tl.min(tl.where(bound == v1[:, None], index, far_away), 1)
    others = tl.where(index == i1[:, None], infinity, bound)
    v2 = tl.min(others, 1)
    i2 = tl.min(tl.where(others == v2[:, None], index, far_away), 1)
    v3 = tl.minimum(tl.min(tl.where(index == i2[:, None], infinity, others), 1), tl.min(rest, 1))
    return v1, i1, v2, i2, v3


@triton.jit
def merge_three(v1, i1, v2, i2, v3, w1, j1, w2, j2, w3):
    """Of two such results, the first of lower indices."""
    ahead = w1 < v1
    new_v3 = tl.where(
        ahead,
        tl.where(v1 <= w2, tl.minimum(v2, w2), tl.minimum(v1, w3)),
        tl.where(v2 <= w1, tl.minimum(v3, w1), tl.minimum(v2, w2)),
    )
    new_i2 = tl.where(ahead, tl.where(v1 <= w2, i1, j2), tl.where(v2 <= w1, i2, j1))
    new_v2 = tl.where(ahead, tl.minimum(v1, w2), tl.minimum(v2, w1))
    return tl.where(ahead, w1, v1), tl.where(ahead, j1, i1), new_v2, new_i2, new_v3


@triton.jit
def finish(
    v1, i1, v2, i2, v3, sqnorm, gamma, row, live, center_sqnorm_ptr, weight_ptr, label_ptr, cost_ptr, other_ptr,
    near_ptr, far_ptr, facts_ptr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """From the smallest lower bounds: settled rows (none if EXACT), and lists of those that are not."""
    far_away = 2147483647
    found = i1 < far_away
    i1 = tl.where(found, i1, 0)
    scale = sqnorm + tl.load(center_sqnorm_ptr + i1)
    weight = tl.full((ROWS,), 1, tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_ptr + i1)
    upper = v1 + 2 * gamma * weight * scale
    cost = v1 + gamma * weight * scale
    # every comparison is false for NaN, so a doubtful row is measured again
    sound = found & (sqnorm < 1.2e24) & (scale > 1e-27) & (gamma < 0.25) & (upper < float("inf"))
    few = sound & (v3 > upper)
    alone = few & (v2 > upper)
    near = live & few
    if not EXACT:  # a cost far below its terms has lost digits, and so has one of operands that were rounded
        near = near & ((alone & (cost >= 0.5 * weight * scale) & (gamma < 1.7e-4)) == 0)
    far = live & (few == 0)
    tl.store(label_ptr + row, i1.to(tl.int64), mask=live)
    tl.store(cost_ptr + row, cost, mask=live)
    tl.store(other_ptr + row, tl.where(alone | (i2 == far_away), i1, i2), mask=live)
    base = tl.atomic_add(facts_ptr + 1, tl.sum(near.to(tl.int32)), sem="relaxed")
    tl.store(near_ptr + base + tl.cumsum(near.to(tl.int32), 0) - 1, row.to(tl.int32), mask=near)
    base = tl.atomic_add(facts_ptr + 2, tl.sum(far.to(tl.int32)), sem="relaxed")
    tl.store(far_ptr + base + tl.cumsum(far.to(tl.int32), 0) - 1, row.to(tl.int32), mask=far)


@triton.jit
def lower_bounds(dot, sqnorm, gamma, center_sqnorm_ptr, weight_ptr, k, WEIGHTED: tl.constexpr):
    """[ROWS, CLUSTERS] from products; Inf past the last centre."""
    center_sqnorm = tl.load(center_sqnorm_ptr + k)
    bound = (1 - gamma)[:, None] * (sqnorm[:, None] + center_sqnorm[None, :]) - 2 * dot
    if WEIGHTED:
        bound *= tl.load(weight_ptr + k)[None, :]
    return bound


@triton.jit
def dot_of_tile(
    points_ptr, middle_ptr, high_ptr, low_ptr, row, live, at, begin, end, R, stride, LOW: tl.constexpr,
    PRECISION: tl.constexpr, LONG: tl.constexpr, NORMS: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Products over features begin .. end, and with NORMS the rows' squared norms and rounding errors."""
    piece = tl.arange(0, BLOCK)
    dot = tl.zeros((ROWS, CLUSTERS), tl.float32)
    sqnorm = tl.zeros((ROWS,), tl.float32)
    error = tl.zeros((ROWS,), tl.float32)
    for start in range(begin, end, BLOCK):
        x = shifted_rows(points_ptr, middle_ptr, row, live, start + piece, R, stride)
        part = x.to(points_ptr.dtype.element_ty)
        if NORMS:
            rest = x - part.to(tl.float32)
            sqnorm += tl.sum(x * x, 1)
            error += tl.sum(rest * rest, 1)
        if LONG:  # minus, as the compiler makes one long accumulation, which rounds more, of a sum
            dot -= product_with(part, high_ptr, low_ptr, at + start, LOW, PRECISION)
        else:
            dot += product_with(part, high_ptr, low_ptr, at + start, LOW, PRECISION)
    return -dot if LONG else dot, sqnorm, error


@triton.jit(do_not_specialize=["B", "K", "stride_points"])
def assign_points_scan_kernel(
    points_ptr, middle_ptr, high_ptr, low_ptr, center_sqnorm_ptr, weight_ptr, sqnorm_ptr, error_ptr, label_ptr,
    cost_ptr, other_ptr, near_ptr, far_ptr, facts_ptr, B, K, R, width, stride_points, slack,
    UNIT: tl.constexpr, WEIGHTED: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, ONCE: tl.constexpr,
    SINGLE: tl.constexpr, LONG: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ONCE: a row tile fits one BLOCK and is read once. Else SINGLE: K ≤ CLUSTERS; otherwise rows' norms are given."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < B
    column = tl.arange(0, CLUSTERS)
    piece = tl.arange(0, BLOCK)
    stride = stride_points * UNIT
    infinity = tl.full((ROWS, CLUSTERS), float("inf"), tl.float32)
    index = tl.zeros((ROWS, CLUSTERS), tl.int32) + column[None, :]
    if ONCE:
        x = shifted_rows(points_ptr, middle_ptr, row, live, piece, R, stride)
        part = x.to(points_ptr.dtype.element_ty)
        rest = x - part.to(tl.float32)
        sqnorm = tl.sum(x * x, 1)
        gamma = uncertainty(sqnorm, tl.sum(rest * rest, 1), facts_ptr, slack)
        best = infinity
        second = infinity
        tile = tl.zeros((ROWS, CLUSTERS), tl.int32)
        for begin in range(0, K, CLUSTERS):  # columns meet once, after the last tile
            k = begin + column
            at = k.to(tl.int64)[None, :] * width + piece[:, None]
            dot = product_with(part, high_ptr, low_ptr, at, LOW, PRECISION)
            bound = lower_bounds(dot, sqnorm, gamma, center_sqnorm_ptr, weight_ptr, k, WEIGHTED)
            less = bound < best
            second = tl.minimum(second, tl.maximum(best, bound))
            best = tl.where(less, bound, best)
            tile = tl.where(less, begin, tile)
        v1, i1, v2, i2, v3 = three_smallest(best, second, tile + index)
    elif SINGLE:
        at = column.to(tl.int64)[None, :] * width + piece[:, None]
        dot, sqnorm, error = dot_of_tile(
            points_ptr, middle_ptr, high_ptr, low_ptr, row, live, at, 0, R, R, stride, LOW, PRECISION, LONG, True, ROWS,
            CLUSTERS, BLOCK,
        )  # fmt: skip
        gamma = uncertainty(sqnorm, error, facts_ptr, slack)
        bound = lower_bounds(dot, sqnorm, gamma, center_sqnorm_ptr, weight_ptr, column, WEIGHTED)
        v1, i1, v2, i2, v3 = three_smallest(bound, infinity, index)
    else:
        sqnorm = tl.load(sqnorm_ptr + row, mask=live, other=0.0)
        gamma = uncertainty(sqnorm, tl.load(error_ptr + row, mask=live, other=0.0), facts_ptr, slack)
        v1 = tl.full((ROWS,), float("inf"), tl.float32)
        v2, v3 = v1, v1
        i1 = tl.full((ROWS,), 2147483647, tl.int32)
        i2 = i1
        for begin in range(0, K, CLUSTERS):
            k = begin + column
            at = k.to(tl.int64)[None, :] * width + piece[:, None]
            dot, _, _ = dot_of_tile(
                points_ptr, middle_ptr, high_ptr, low_ptr, row, live, at, 0, R, R, stride, LOW, PRECISION, LONG, False,
                ROWS, CLUSTERS, BLOCK,
            )  # fmt: skip
            bound = lower_bounds(dot, sqnorm, gamma, center_sqnorm_ptr, weight_ptr, k, WEIGHTED)
            w1, j1, w2, j2, w3 = three_smallest(bound, infinity, begin + index)
            v1, i1, v2, i2, v3 = merge_three(v1, i1, v2, i2, v3, w1, j1, w2, j2, w3)
    finish(
        v1, i1, v2, i2, v3, sqnorm, gamma, row, live, center_sqnorm_ptr, weight_ptr, label_ptr, cost_ptr, other_ptr,
        near_ptr, far_ptr, facts_ptr, ROWS, WEIGHTED, EXACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "stride_points"])
def assign_points_parts_kernel(
    points_ptr, middle_ptr, high_ptr, low_ptr, part_ptr, B, R, width, depth, padded_K, stride_points,
    UNIT: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr, LONG: tl.constexpr, ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part [splits, B, padded K]: products over ``depth`` features."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1).to(tl.int64) * CLUSTERS + tl.arange(0, CLUSTERS)
    split = tl.program_id(2).to(tl.int64)
    begin = tl.program_id(2) * depth
    at = k[None, :] * width + tl.arange(0, BLOCK)[:, None]
    dot, _, _ = dot_of_tile(
        points_ptr, middle_ptr, high_ptr, low_ptr, row, row < B, at, begin, tl.minimum(begin + depth, R), R,
        stride_points * UNIT, LOW, PRECISION, LONG, False, ROWS, CLUSTERS, BLOCK,
    )  # fmt: skip
    tl.store(part_ptr + (split * B + row)[:, None] * padded_K + k[None, :], dot, mask=(row < B)[:, None])


@triton.jit(do_not_specialize=["B", "K", "splits"])
def assign_points_merge_kernel(
    part_ptr, center_sqnorm_ptr, weight_ptr, sqnorm_ptr, error_ptr, label_ptr, cost_ptr, other_ptr, near_ptr, far_ptr,
    facts_ptr, B, K, padded_K, splits, slack, WEIGHTED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr,
):  # fmt: skip
    """The end of the scan, from parts added in order."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < B
    column = tl.arange(0, CLUSTERS)
    infinity = tl.full((ROWS, CLUSTERS), float("inf"), tl.float32)
    index = tl.zeros((ROWS, CLUSTERS), tl.int32) + column[None, :]
    sqnorm = tl.load(sqnorm_ptr + row, mask=live, other=0.0)
    gamma = uncertainty(sqnorm, tl.load(error_ptr + row, mask=live, other=0.0), facts_ptr, slack)
    v1 = tl.full((ROWS,), float("inf"), tl.float32)
    v2, v3 = v1, v1
    i1 = tl.full((ROWS,), 2147483647, tl.int32)
    i2 = i1
    for begin in range(0, K, CLUSTERS):
        k = begin + column
        dot = tl.zeros((ROWS, CLUSTERS), tl.float32)
        for split in range(0, splits):
            at = part_ptr + (split * B + row)[:, None] * padded_K + k[None, :]
            dot += tl.load(at, mask=live[:, None], other=0.0)
        bound = lower_bounds(dot, sqnorm, gamma, center_sqnorm_ptr, weight_ptr, k, WEIGHTED)
        w1, j1, w2, j2, w3 = three_smallest(bound, infinity, begin + index)
        v1, i1, v2, i2, v3 = merge_three(v1, i1, v2, i2, v3, w1, j1, w2, j2, w3)
    finish(
        v1, i1, v2, i2, v3, sqnorm, gamma, row, live, center_sqnorm_ptr, weight_ptr, label_ptr, cost_ptr, other_ptr,
        near_ptr, far_ptr, facts_ptr, ROWS, WEIGHTED, EXACT,
    )  # fmt: skip


class Problem:
    """The launches of one call: points [B, R] and centers [K, R] with feature stride 1."""

    def __init__(
        self, points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None, label: torch.Tensor,
        cost: torch.Tensor,
    ) -> None:  # fmt: skip
        self.points, self.centers, self.label, self.cost = points, centers, label, cost
        self.B, self.R = points.shape
        self.K = centers.shape[0]
        self.weighted = counts is not None
        self.counts = counts if counts is not None else label  # a pointer that is not read
        self.stride_counts = counts.stride(0) if counts is not None else 0
        self.target = _support.target(points.device)
        self.small = self.target.interpreter
        self.UNIT = unit(points.stride(0))
        self.stride = points.stride(0) // self.UNIT

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.points.new_empty(shape, dtype=dtype)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch(kernel, grid, *args, device=self.points.device, **meta)

    def far(self, rows: torch.Tensor | None, facts: torch.Tensor) -> None:
        """All rows (None), or those of the list, by differences."""
        ROWS, CLUSTERS, BLOCK = (32, 32, 64) if self.small else (4, 16, 32)
        programs = min(blocks(self.B, ROWS), 8 * self.target.multiprocessors)
        self.launch(
            assign_points_far_kernel, (programs,), self.points, self.centers, self.counts, self.label, self.cost,
            facts if rows is None else rows, facts, self.B, self.K, self.R, programs, self.stride,
            self.centers.stride(0), self.stride_counts, self.UNIT, self.weighted, rows is None, ROWS, CLUSTERS, BLOCK,
            num_warps=4,
        )  # fmt: skip

    def near(self, rows: torch.Tensor, other: torch.Tensor, facts: torch.Tensor) -> None:
        ROWS, BLOCK = (128, 64) if self.small else (8, 128)
        programs = min(blocks(self.B, ROWS), 8 * self.target.multiprocessors)
        self.launch(
            assign_points_near_kernel, (programs,), self.points, self.centers, self.counts, self.label, self.cost,
            other, rows, facts, self.R, programs, self.stride, self.centers.stride(0), self.stride_counts, self.UNIT,
            self.weighted, ROWS, BLOCK, num_warps=4,
        )  # fmt: skip

    def run(self) -> None:
        B, K, R, points = self.B, self.K, self.R, self.points
        wide = points.dtype == torch.float32
        LOW = not wide and self.centers.dtype == torch.float32
        PRECISION = "tf32" if float32_precision() == "tf32" else "tf32x3"
        scan = configuration(B, K, R, points.dtype, LOW, self.target)
        padded_K = scan.CLUSTERS * blocks(K, scan.CLUSTERS)
        width = scan.BLOCK * max(1, blocks(R, scan.BLOCK))
        facts = torch.zeros(4, dtype=torch.int32, device=points.device)  # rounding error, rows near, rows far
        middle = self.new(R)
        high = self.new(padded_K, width, dtype=points.dtype)
        low = self.new(padded_K, width, dtype=points.dtype) if LOW else high
        center_sqnorm, weight = self.new(padded_K), self.new(padded_K)
        self.launch(
            assign_points_middle_kernel, (blocks(R, 64),), self.centers, middle, K, R, blocks(K, 1024),
            self.centers.stride(0), points, 32, 64, num_warps=4,
        )  # fmt: skip
        self.launch(
            assign_points_centers_kernel, (blocks(padded_K, 16),), self.centers, middle, self.counts, high, low,
            center_sqnorm, weight, facts, K, R, width, self.centers.stride(0), self.stride_counts, self.weighted, LOW,
            16, scan.BLOCK, num_warps=4,
        )  # fmt: skip
        norms = scan.splits > 1 or (R > scan.BLOCK and K > scan.CLUSTERS)
        sqnorm, error = (self.new(B if norms else 1) for _ in range(2))
        if norms:
            self.launch(
                assign_points_rows_kernel, (blocks(B, 16),), points, middle, sqnorm, error, B, R, self.stride,
                self.UNIT, 16, scan.BLOCK, num_warps=4,
            )  # fmt: skip
        LONG, EXACT = R > CHAIN, R <= EXACT_FEATURES
        # a chain of multiply-adds, some of them double or triple; chains and parts added up; norms likewise
        chain = 2 * (scan.BLOCK if LONG else CHAIN) * (2 if LOW else 3 if wide else 1) + 4 * blocks(R, scan.BLOCK) + 64
        slack = 2 * chain * 2.0**-24 + (OPERAND_ERROR[PRECISION] if wide else 0.0)
        other, near, far = (self.new(B, dtype=torch.int32) for _ in range(3))
        ends = (self.label, self.cost, other, near, far, facts)
        rows = blocks(B, scan.ROWS)
        if scan.splits > 1:
            part = self.new(scan.splits, B, padded_K)
            self.launch(
                assign_points_parts_kernel, (rows, padded_K // scan.CLUSTERS, scan.splits), points, middle, high, low,
                part, B, R, width, scan.BLOCK * blocks(blocks(R, scan.splits), scan.BLOCK), padded_K, self.stride,
                self.UNIT, LOW, PRECISION, LONG, scan.ROWS, scan.CLUSTERS, scan.BLOCK, num_warps=scan.warps,
                num_stages=scan.stages,
            )  # fmt: skip
            ROWS = 16
            self.launch(
                assign_points_merge_kernel, (blocks(B, ROWS),), part, center_sqnorm, weight, sqnorm, error, *ends, B, K,
                padded_K, scan.splits, slack, self.weighted, EXACT, ROWS, scan.CLUSTERS, num_warps=4,
            )  # fmt: skip
        else:
            self.launch(
                assign_points_scan_kernel, (rows,), points, middle, high, low, center_sqnorm, weight, sqnorm, error,
                *ends, B, K, R, width, self.stride, slack, self.UNIT, self.weighted, LOW, PRECISION, R <= scan.BLOCK,
                not norms, LONG, EXACT, scan.ROWS, scan.CLUSTERS, scan.BLOCK, num_warps=scan.warps,
                num_stages=scan.stages,
            )  # fmt: skip
        self.near(near, other, facts)
        self.far(far, facts)


class Configuration(NamedTuple):
    ROWS: int
    CLUSTERS: int
    BLOCK: int
    warps: int
    stages: int
    splits: int
    """Parts that the features are cut into; 1: none."""


def configuration(B: int, K: int, R: int, dtype: torch.dtype, low: bool, target: _support.Target) -> Configuration:
    if target.interpreter:
        ROWS, CLUSTERS, BLOCK, warps, stages = 64, 32, 64, 4, 1
    else:
        hopper = target.capability >= (9, 0)
        CLUSTERS = power_of_two(K, 16, 64 if hopper or dtype != torch.float32 else 32)  # more would spill registers
        ROWS, warps = 128 if hopper else 64, 8
        if dtype == torch.float32:
            BLOCK, stages = power_of_two(R, 16, 32), 3
        else:
            # one tile of centres: memory-bound, so more rows are kept on their way
            BLOCK, stages = power_of_two(R, 16, 128 if R <= 128 else 64), 4 if K <= CLUSTERS else 3
    tiles = blocks(B, ROWS) * blocks(K, CLUSTERS)
    room = WORKSPACE // max(1, B * CLUSTERS * blocks(K, CLUSTERS))
    splits = min(target.multiprocessors // max(1, tiles), blocks(R, 4 * BLOCK), room)
    few = 2 * blocks(B, ROWS) <= target.multiprocessors  # row tiles alone leave half of the GPU idle
    return Configuration(ROWS, CLUSTERS, BLOCK, warps, stages, max(1, splits) if few else 1)


def assign_points(
    points: torch.Tensor,
    centers: torch.Tensor,
    counts: torch.Tensor | None,
    label: torch.Tensor,
    cost: torch.Tensor,
) -> None:
    """points [B, R], centers [K, R], both with feature stride 1; fills label [B] and cost [B]."""
    problem = Problem(points, centers, counts, label, cost)
    if points.dtype == torch.float64:
        problem.far(None, label)
    else:
        problem.run()
