"""Sums, sizes, scatters and J of clusters, in float64; what ``exact_moves`` starts from and ends with.

Not measured on a GPU yet. Like ``cluster_sums``: sorted rows, pieces, no atomics. Sums carry along what their rounding
loses, because the sweep goes on adding to them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import _support
from ._support import blocks, launch, power_of_two, unit
from .cluster_sums import Pieces

ROWS = 16


@triton.jit
def add_exactly(high, low, x):
    """(high + low) + x, normalised: |low| is at most half a unit of high's last place (Knuth's two-sum)."""
    total = high + x
    part = total - high
    rest = low + ((high - (total - part)) + (x - part))
    high = total + rest
    return high, rest - (high - total)


@triton.jit
def load_rows(points_ptr, shift_ptr, row, live, feature, R, stride_points):
    """Rows, shifted, in float64 [ROWS, BLOCK]; zeros where not live and past the last feature."""
    inside = feature < R
    at = points_ptr + row[:, None] * stride_points + feature[None, :]
    mask = live[:, None] & inside[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    shift = tl.load(shift_ptr + feature, mask=inside, other=0.0)
    return tl.where(mask, x - shift[None, :], 0.0)


@triton.jit
def load_wide_rows(points_ptr, center_ptr, sqnorm_ptr, row, live, feature, R, stride_points):
    """``load_rows`` and, as feature R, the rows' squared norms: their sum over a cluster is Q_k."""
    x = load_rows(points_ptr, center_ptr, row, live, feature, R, stride_points)
    sqnorm = tl.load(sqnorm_ptr + row, mask=live, other=0.0)
    return tl.where((feature == R)[None, :], sqnorm[:, None], x)


@triton.jit(do_not_specialize=["N", "stride_points"])
def cluster_statistics_sqnorm_kernel(
    points_ptr, center_ptr, sqnorm_ptr, N, R, stride_points, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float64)
    for begin in range(0, R, BLOCK):
        feature = begin + tl.arange(0, BLOCK).to(tl.int64)
        x = load_rows(points_ptr, center_ptr, row, row < N, feature, R, stride_points * UNIT)
        total += tl.sum(x * x, 1)
    tl.store(sqnorm_ptr + row, total, mask=row < N)


@triton.jit(do_not_specialize=["K", "stride_points", "stride_shift"])
def cluster_statistics_pieces_kernel(
    points_ptr, shift_ptr, sqnorm_ptr, rows_ptr, begin_ptr, first_ptr, cluster_ptr, high_ptr, low_ptr,
    K, R, stride_points, stride_shift, width,
    UNIT: tl.constexpr, WIDE: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """high, low [pieces, width]: sums of one piece's rows, less the cluster's shift; WIDE: with squared norms."""
    piece = tl.program_id(0).to(tl.int64)
    k = tl.load(cluster_ptr + piece)
    if k < K:
        feature = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        shift_ptr += k * stride_shift
        begin = tl.load(begin_ptr + k) + (piece - tl.load(first_ptr + k)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(begin_ptr + k + 1))
        high = tl.zeros((BLOCK,), tl.float64)
        low = tl.zeros((BLOCK,), tl.float64)
        for at in range(begin, end, ROWS):
            m = at + tl.arange(0, ROWS)
            row = tl.load(rows_ptr + m, mask=m < end, other=0)
            if WIDE:
                x = load_wide_rows(points_ptr, shift_ptr, sqnorm_ptr, row, m < end, feature, R, stride_points * UNIT)
            else:
                x = load_rows(points_ptr, shift_ptr, row, m < end, feature, R, stride_points * UNIT)
            high, low = add_exactly(high, low, tl.sum(x, 0))
        tl.store(high_ptr + piece * width + feature, high, mask=feature < width)
        tl.store(low_ptr + piece * width + feature, low, mask=feature < width)


@triton.jit(do_not_specialize=["R", "width"])
def cluster_statistics_total_kernel(
    high_ptr, low_ptr, first_ptr, begin_ptr, sum_ptr, sum_low_ptr, count_ptr, scatter_ptr, R, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum, sum_low [K, width] from the pieces in order; count [K]; scatter [K], Q_k − ‖s_k‖²/N_k (with column R)."""
    k = tl.program_id(0).to(tl.int64)
    count = tl.load(begin_ptr + k + 1) - tl.load(begin_ptr + k)
    begin = tl.load(first_ptr + k)
    end = tl.load(first_ptr + k + 1)
    squares = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for at in range(0, width, BLOCK):
        feature = at + tl.arange(0, BLOCK).to(tl.int64)
        high = tl.zeros((BLOCK,), tl.float64)
        low = tl.zeros((BLOCK,), tl.float64)
        for piece in range(begin, end):
            mask = feature < width
            high, low = add_exactly(high, low, tl.load(high_ptr + piece * width + feature, mask=mask, other=0.0))
            high, low = add_exactly(high, low, tl.load(low_ptr + piece * width + feature, mask=mask, other=0.0))
        tl.store(sum_ptr + k * width + feature, high, mask=feature < width)
        tl.store(sum_low_ptr + k * width + feature, low, mask=feature < width)
        squares += tl.where(feature < R, high * high, 0.0)
        square += tl.where(feature == R, high, 0.0)
    tl.store(count_ptr + k, count)
    tl.store(scatter_ptr + k, tl.sum(square) - tl.sum(squares) / tl.maximum(count, 1).to(tl.float64))


@triton.jit(do_not_specialize=["K", "stride_points", "stride_shift"])
def cluster_statistics_within_kernel(
    points_ptr, shift_ptr, sum_ptr, rows_ptr, begin_ptr, first_ptr, cluster_ptr, within_ptr,
    K, R, stride_points, stride_shift,
    UNIT: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """within [pieces]: squared deviations of one piece's rows from the cluster's mean, times the cluster's size."""
    piece = tl.program_id(0).to(tl.int64)
    k = tl.load(cluster_ptr + piece)
    total = tl.zeros((ROWS,), tl.float64)
    size = tl.zeros((ROWS,), tl.float64)
    if k < K:
        shift_ptr += k * stride_shift
        first = tl.load(begin_ptr + k)
        last = tl.load(begin_ptr + k + 1)
        size += (last - first).to(tl.float64)
        begin = first + (piece - tl.load(first_ptr + k)) * PIECE
        end = tl.minimum(begin + PIECE, last)
        for at in range(begin, end, ROWS):
            m = at + tl.arange(0, ROWS)
            row = tl.load(rows_ptr + m, mask=m < end, other=0)
            for feature_begin in range(0, R, BLOCK):
                feature = feature_begin + tl.arange(0, BLOCK).to(tl.int64)
                x = load_rows(points_ptr, shift_ptr, row, m < end, feature, R, stride_points * UNIT)
                sums = tl.load(sum_ptr + k * R + feature, mask=feature < R, other=0.0)
                mean = sums / (last - first).to(tl.float64)
                deviation = tl.where((m < end)[:, None], x - mean[None, :], 0.0)
                total += tl.sum(deviation * deviation, 1)
    tl.store(within_ptr + piece, tl.sum(total) * tl.max(size))


class Statistics:
    """Launches over one clustering of points [N, R] with feature stride 1 in K clusters."""

    def __init__(self, points: torch.Tensor, K: int) -> None:
        self.points, self.K = points, K
        self.N, self.R = points.shape
        self.target = _support.target(points.device)
        self.PIECE = 32 if self.target.interpreter else 256
        self.BLOCK = power_of_two(self.R + 1, 16, 32 if self.target.interpreter else 64)
        self.UNIT = unit(points.stride(0))
        self.stride = points.stride(0) // self.UNIT

    def new(self, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return self.points.new_empty(shape, dtype=dtype)

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch(kernel, grid, *args, device=self.points.device, **meta)

    def sqnorms(self, center: torch.Tensor) -> torch.Tensor:
        """[N] ‖x − center‖²."""
        sqnorm = self.new(self.N)
        self.launch(
            cluster_statistics_sqnorm_kernel, (blocks(self.N, ROWS),), self.points, center, sqnorm, self.N, self.R,
            self.stride, self.UNIT, ROWS, self.BLOCK, num_warps=4,
        )  # fmt: skip
        return sqnorm

    def sums(self, at: Pieces, shift: torch.Tensor, sqnorm: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Per cluster (sum, sum_low, count, scatter) of rows less shift; with sqnorm one column more."""
        K, R = self.K, self.R
        width = R if sqnorm is None else R + 1
        P = at.cluster.shape[0]
        high, low = self.new(P, width), self.new(P, width)
        total, total_low, scatter = self.new(K, width), self.new(K, width), self.new(K)
        count = self.new(K, dtype=torch.int64)
        self.launch(
            cluster_statistics_pieces_kernel, (P, blocks(width, self.BLOCK)), self.points, shift,
            shift if sqnorm is None else sqnorm, *at, high, low, K, R, self.stride, shift.stride(0) * (shift.dim() - 1),
            width, self.UNIT, sqnorm is not None, self.PIECE, ROWS, self.BLOCK, num_warps=4,
        )  # fmt: skip
        self.launch(
            cluster_statistics_total_kernel, (K,), high, low, at.first, at.begin, total, total_low, count, scatter, R,
            width, self.BLOCK, num_warps=2,
        )  # fmt: skip
        return total, total_low, count, scatter

    def objective(self, at: Pieces) -> torch.Tensor:
        """J. Deviations are taken from a member first: a cluster of equal rows costs exactly 0."""
        if self.N == 0:
            return self.points.new_zeros((), dtype=torch.float64)
        member = at.rows[at.begin[:-1].clamp(max=self.N - 1)]  # [K]; any row for an empty cluster
        shift = self.points[member].double()  # [K, R]
        total, *_ = self.sums(at, shift, None)
        within = self.new(at.cluster.shape[0])
        self.launch(
            cluster_statistics_within_kernel, (at.cluster.shape[0],), self.points, shift, total, *at, within, self.K,
            self.R, self.stride, shift.stride(0), self.UNIT, self.PIECE, ROWS, self.BLOCK, num_warps=4,
        )  # fmt: skip
        return within.sum()
