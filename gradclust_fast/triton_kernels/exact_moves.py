"""One sweep of exact moves, many rows at a time; the rule for a single row is that of ``reference/exact_moves.py``.

Not measured on a GPU yet. Rows are met in blocks of about N/64. Four launches a block: products of the block's rows
with all sums (float64 tensor cores); every row's destination; which rows may go together; sums, sizes and labels of the
clusters that change. The number of launches is fixed and nothing waits for the GPU.

Why J does not rise. J is the sum of ‖x_i − x_j‖² over pairs in one cluster. So rows that move together change it by the
sum of their own changes Δ_i, plus ‖x_i − x_j‖² for every pair that leaves the same cluster or enters the same one, less
as much for every pair of which one enters what the other leaves. If n rows enter cluster l, the pairs among them add
at most n·Σ‖x_i − c_l‖² (the sum over a set's pairs is its size times its scatter about its own mean, which is the
smallest about any point), and likewise for n rows that leave k. So every row with

    Δ_i + n_l·‖x_i − c_l‖² + n_k·‖x_i − c_k‖² < 0

may move at once, and together they lower J; n_l and n_k are the numbers of the block's rows that want into l and out of
k, 0 where that is the row alone. Of the others, one moves if it is the first (in visiting order) that waits for its
source and for its destination and nobody else leaves or enters either. So a block in which a row wants to move has a
move.

Why sweeps end. Moves at Δ = 0 go to clusters at least as large, of equal size to a lower index. They are let through
together only where the row equals both clusters' means up to rounding, else alone. If a block moves rows at Δ = 0 only,
Σ N_k² changes by 2·Σ(N_l − N_k) ≥ 0 plus the squares of the clusters' net gains; both are zero only for a cycle of
clusters of equal size, which the lower index rules out. So (J, −Σ N_k²) falls with every block that moves anything.
What a block holds back asks again in the next sweep: a sweep that moves nothing found no row that wants to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..reference.exact_moves import center
from ._support import blocks, power_of_two
from .cluster_statistics import Statistics, add_exactly, load_rows, load_wide_rows
from .cluster_sums import Pieces, pieces

BLOCKS = 64
"""Of a sweep: many, and little is held back; few, and launches are few."""
LEAST_ROWS = 16
MOST_COSTS = 1 << 22
"""Costs of a block, 32 MB: they stay in the L2 cache."""


@triton.jit(do_not_specialize=["N", "seed", "seed_high"])
def exact_moves_order_kernel(key_ptr, N, seed, seed_high, BLOCK: tl.constexpr):
    """key [N]: 62 random bits that depend on (seed, i) alone; sorted, they are the visiting order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b, _, _ = tl.randint4x((seed_high.to(tl.int64) << 31) | seed, i.to(tl.int32))
    key = ((a.to(tl.int64) & 0x7FFFFFFF) << 31) | (b.to(tl.int64) & 0x7FFFFFFF)
    tl.store(key_ptr + i, key, mask=i < N)


@triton.jit(do_not_specialize=["begin", "n", "K", "stride_points"])
def exact_moves_cost_kernel(
    points_ptr, center_ptr, sqnorm_ptr, order_ptr, sum_ptr, count_ptr, cost_ptr,
    begin, n, K, R, stride_points, width,
    UNIT: tl.constexpr, ROWS: tl.constexpr, CLUSTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cost [n, K]: N_k‖x‖² + Q_k − 2 s_k·x of the block's rows, which is Σ_{j in k} ‖x − x_j‖²."""
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1).to(tl.int64) * CLUSTERS + tl.arange(0, CLUSTERS)
    row = tl.load(order_ptr + begin + p, mask=p < n, other=0)
    dot = tl.zeros((ROWS, CLUSTERS), tl.float64)
    for at in range(0, R, BLOCK):
        feature = at + tl.arange(0, BLOCK).to(tl.int64)
        x = load_rows(points_ptr, center_ptr, row, p < n, feature, R, stride_points * UNIT)
        mask = (feature < R)[:, None] & (k < K)[None, :]
        sums = tl.load(sum_ptr + k[None, :] * width + feature[:, None], mask=mask, other=0.0)
        dot = tl.dot(x, sums, dot, out_dtype=tl.float64)
    sqnorm = tl.load(sqnorm_ptr + row, mask=p < n, other=0.0)
    count = tl.load(count_ptr + k, mask=k < K, other=0).to(tl.float64)
    square = tl.load(sum_ptr + k * width + R, mask=k < K, other=0.0)
    cost = (count[None, :] * sqnorm[:, None] + square[None, :]) - 2 * dot
    cost = tl.where((count > 0)[None, :], cost, 0.0)
    tl.store(cost_ptr + p[:, None] * K + k[None, :], cost, mask=(p < n)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["begin", "n", "K"])
def exact_moves_choose_kernel(
    sqnorm_ptr, order_ptr, labels_ptr, sum_ptr, count_ptr, scatter_ptr, cost_ptr, source_ptr, target_ptr, slack_ptr,
    reach_ptr, entering_ptr, leaving_ptr, begin, n, K, R, width, tie,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """source, target [n]: where a row is and wants to be (−1: it stays); slack: how much others may cost it;
    reach [2, n]: bounds of ‖x − c‖² of both clusters; entering, leaving [K]: how many rows want to."""
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = p < n
    row = tl.load(order_ptr + begin + p, mask=live, other=0)
    sqnorm = tl.load(sqnorm_ptr + row, mask=live, other=0.0)
    own = tl.load(labels_ptr + row, mask=live, other=0)
    column = tl.arange(0, BLOCK)
    best = tl.full((ROWS, BLOCK), float("inf"), tl.float64)
    best_at = tl.zeros((ROWS, BLOCK), tl.int64) + column[None, :]
    for start in range(0, K, BLOCK):
        k = start + column.to(tl.int64)
        mask = live[:, None] & (k < K)[None, :]
        cost = tl.load(cost_ptr + p[:, None] * K + k[None, :], mask=mask, other=float("inf"))
        less = cost < best
        best = tl.where(less, cost, best)
        best_at = tl.where(less, k[None, :], best_at)
    lowest = tl.min(best, 1)
    cheapest = tl.min(tl.where(best == lowest[:, None], best_at, K), 1)
    cheapest = tl.where(cheapest < K, cheapest, 0)  # of rows whose costs are all NaN; the caller refuses them
    count = tl.load(count_ptr + cheapest).to(tl.float64)
    lowest_magnitude = count * sqnorm + tl.load(sum_ptr + cheapest * width + R)
    # of the clusters that tie for cheapest the largest, then the lowest index
    best_count = tl.full((ROWS, BLOCK), -1, tl.int64)
    best_at = tl.zeros((ROWS, BLOCK), tl.int64) + column[None, :]
    for start in range(0, K, BLOCK):
        k = start + column.to(tl.int64)
        mask = live[:, None] & (k < K)[None, :]
        cost = tl.load(cost_ptr + p[:, None] * K + k[None, :], mask=mask, other=float("inf"))
        members = tl.load(count_ptr + k, mask=k < K, other=0)
        magnitude = members.to(tl.float64)[None, :] * sqnorm[:, None]
        magnitude += tl.load(sum_ptr + k * width + R, mask=k < K, other=0.0)[None, :]
        ties = mask & (cost - lowest[:, None] <= tie * (magnitude + lowest_magnitude[:, None]))
        more = ties & (members[None, :] > best_count)
        best_count = tl.where(more, members[None, :], best_count)
        best_at = tl.where(more, k[None, :], best_at)
    most = tl.max(best_count, 1)
    largest = tl.min(tl.where(best_count == most[:, None], best_at, K), 1)
    largest = tl.where((most >= 0) & (largest < K), largest, cheapest)

    own_count = tl.load(count_ptr + own, mask=live, other=1).to(tl.float64)
    own_cost = tl.load(cost_ptr + p * K + own, mask=live, other=0.0)
    own_magnitude = own_count * sqnorm + tl.load(sum_ptr + own * width + R)
    own_ties = own_cost - lowest <= tie * (own_magnitude + lowest_magnitude)
    largest_cost = tl.load(cost_ptr + p * K + largest, mask=live, other=0.0)
    magnitude = tl.load(count_ptr + largest).to(tl.float64) * sqnorm + tl.load(sum_ptr + largest * width + R)
    falls = own_cost - largest_cost > tie * (own_magnitude + magnitude)
    target = tl.where(own_ties | falls, largest, cheapest)
    wants = live & (target != own)

    count = tl.load(count_ptr + target).to(tl.float64)
    cost = tl.load(cost_ptr + p * K + target, mask=live, other=0.0)
    magnitude = count * sqnorm + tl.load(sum_ptr + target * width + R)
    rounding = tie * magnitude
    own_rounding = tie * own_magnitude
    around = cost - tl.load(scatter_ptr + target)  # N_l‖x − c_l‖²
    own_around = own_cost - tl.load(scatter_ptr + own)
    at_both_means = own_ties & (around <= 4 * rounding) & (own_around <= 4 * own_rounding)
    slack = tl.where(at_both_means, float("inf"), tl.where(own_ties, 0.0, own_cost - cost - rounding - own_rounding))
    # nothing is known about the mean of an empty cluster
    reach = tl.where(count > 0, (tl.maximum(around, 0.0) + rounding) / tl.maximum(count, 1.0), float("inf"))
    own_reach = (tl.maximum(own_around, 0.0) + own_rounding) / own_count
    tl.store(source_ptr + p, own.to(tl.int32), mask=live)
    tl.store(target_ptr + p, tl.where(wants, target, -1).to(tl.int32), mask=live)
    tl.store(slack_ptr + p, slack, mask=live)
    tl.store(reach_ptr + p, reach, mask=live)
    tl.store(reach_ptr + n + p, own_reach, mask=live)
    one = tl.full((ROWS,), 1, tl.int32)
    tl.atomic_add(entering_ptr + target, one, mask=wants, sem="relaxed")
    tl.atomic_add(leaving_ptr + own, one, mask=wants, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def exact_moves_admit_kernel(
    source_ptr, target_ptr, slack_ptr, reach_ptr, entering_ptr, leaving_ptr, admitted_ptr, moving_ptr, first_ptr,
    n, ROWS: tl.constexpr,
):  # fmt: skip
    """admitted [n]: rows that may move together; moving [K]: how many of them touch a cluster; first [K]: the first of
    the others that does."""
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(target_ptr + p, mask=p < n, other=-1)
    wants = target >= 0
    target = tl.where(wants, target, 0)
    source = tl.load(source_ptr + p, mask=wants, other=0)
    entering = tl.load(entering_ptr + target, mask=wants, other=0)
    leaving = tl.load(leaving_ptr + source, mask=wants, other=0)
    reach = tl.load(reach_ptr + p, mask=wants, other=0.0)
    own_reach = tl.load(reach_ptr + n + p, mask=wants, other=0.0)
    extra = tl.where(entering > 1, entering.to(tl.float64) * reach, 0.0)
    extra += tl.where(leaving > 1, leaving.to(tl.float64) * own_reach, 0.0)
    admitted = wants & (extra < tl.load(slack_ptr + p, mask=wants, other=0.0))
    tl.store(admitted_ptr + p, admitted.to(tl.int32), mask=p < n)
    one = tl.full((ROWS,), 1, tl.int32)
    tl.atomic_add(moving_ptr + source, one, mask=admitted, sem="relaxed")
    tl.atomic_add(moving_ptr + target, one, mask=admitted, sem="relaxed")
    waits = wants & (admitted == 0)
    tl.atomic_min(first_ptr + source, p.to(tl.int32), mask=waits, sem="relaxed")
    tl.atomic_min(first_ptr + target, p.to(tl.int32), mask=waits, sem="relaxed")


@triton.jit
def sign_of_move(source_ptr, target_ptr, admitted_ptr, moving_ptr, first_ptr, p, n, k):
    """[ROWS] float64: +1 where row p enters cluster k, −1 where it leaves it; 0 where it does not move or not here."""
    target = tl.load(target_ptr + p, mask=p < n, other=-1)
    source = tl.load(source_ptr + p, mask=target >= 0, other=-1)
    here = (target >= 0) & ((target == k) | (source == k))
    admitted = tl.load(admitted_ptr + p, mask=here, other=0) != 0
    alone = here & (admitted == 0)
    free = (tl.load(moving_ptr + source, mask=alone, other=1) == 0) & (
        tl.load(moving_ptr + target, mask=alone, other=1) == 0
    )
    first = (tl.load(first_ptr + source, mask=alone, other=-1) == p) & (
        tl.load(first_ptr + target, mask=alone, other=-1) == p
    )
    goes = admitted | (alone & free & first)
    return tl.where(goes, tl.where(target == k, 1.0, -1.0), 0.0).to(tl.float64)


@triton.jit(do_not_specialize=["begin", "n", "stride_state", "stride_points"])
def exact_moves_apply_kernel(
    points_ptr, center_ptr, sqnorm_ptr, order_ptr, labels_ptr, sum_ptr, sum_low_ptr, count_ptr, scatter_ptr,
    source_ptr, target_ptr, admitted_ptr, state_ptr, next_state_ptr,
    begin, n, stride_state, R, stride_points, width,
    UNIT: tl.constexpr, SCAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is a cluster: its size, its sums in visiting order, labels of the rows that leave it."""
    k = tl.program_id(0).to(tl.int64)
    for slot in tl.static_range(4):  # entering, leaving, moving, first: ready for the next block
        tl.store(next_state_ptr + slot * stride_state + k, 2147483647 if slot == 3 else 0)
    moving_ptr = state_ptr + 2 * stride_state
    first_ptr = state_ptr + 3 * stride_state
    gain = tl.zeros((SCAN,), tl.float64)
    touched = tl.zeros((SCAN,), tl.int32)
    for at in range(0, n, SCAN):
        p = at + tl.arange(0, SCAN).to(tl.int64)
        sign = sign_of_move(source_ptr, target_ptr, admitted_ptr, moving_ptr, first_ptr, p, n, k)
        gain += sign
        touched |= (sign != 0).to(tl.int32)
        row = tl.load(order_ptr + begin + p, mask=sign < 0, other=0)
        target = tl.load(target_ptr + p, mask=sign < 0, other=0)
        tl.store(labels_ptr + row, target.to(tl.int64), mask=sign < 0)
    if tl.max(touched) != 0:
        count = tl.load(count_ptr + k) + tl.sum(gain).to(tl.int64)
        squares = tl.zeros((BLOCK,), tl.float64)
        square = tl.zeros((BLOCK,), tl.float64)
        for feature_begin in range(0, width, BLOCK):
            feature = feature_begin + tl.arange(0, BLOCK).to(tl.int64)
            high = tl.load(sum_ptr + k * width + feature, mask=feature < width, other=0.0)
            low = tl.load(sum_low_ptr + k * width + feature, mask=feature < width, other=0.0)
            for at in range(0, n, ROWS):
                p = at + tl.arange(0, ROWS).to(tl.int64)
                sign = sign_of_move(source_ptr, target_ptr, admitted_ptr, moving_ptr, first_ptr, p, n, k)
                if tl.max(tl.abs(sign)) > 0:
                    row = tl.load(order_ptr + begin + p, mask=sign != 0, other=0)
                    x = load_wide_rows(
                        points_ptr, center_ptr, sqnorm_ptr, row, sign != 0, feature, R, stride_points * UNIT
                    )
                    high, low = add_exactly(high, low, tl.sum(sign[:, None] * x, 0))
            if count == 0:  # exactly nothing, not what rounding left
                high = tl.zeros((BLOCK,), tl.float64)
                low = tl.zeros((BLOCK,), tl.float64)
            tl.store(sum_ptr + k * width + feature, high, mask=feature < width)
            tl.store(sum_low_ptr + k * width + feature, low, mask=feature < width)
            squares += tl.where(feature < R, high * high, 0.0)
            square += tl.where(feature == R, high, 0.0)
        tl.store(count_ptr + k, count)
        tl.store(scatter_ptr + k, tl.sum(square) - tl.sum(squares) / tl.maximum(count, 1).to(tl.float64))


class Sweep(Statistics):
    """The launches of one sweep; changes labels."""

    def __init__(self, points: torch.Tensor, labels: torch.Tensor, K: int, center: torch.Tensor, tie: float) -> None:
        super().__init__(points, K)
        self.labels, self.center, self.tie = labels, center, tie

    def order(self, seed: int) -> torch.Tensor:
        """[N] A permutation that depends on N and the seed alone."""
        key = self.new(self.N, dtype=torch.int64)
        grid = (blocks(self.N, 256),)
        self.launch(exact_moves_order_kernel, grid, key, self.N, seed % 2**31, seed // 2**31 % 2**31, 256, num_warps=4)
        return torch.sort(key, stable=True).indices

    def move(self, at: Pieces, order: torch.Tensor) -> None:
        """Changes labels."""
        N, K, R = self.N, self.K, self.R
        small = self.target.interpreter
        sqnorm = self.sqnorms(self.center)
        total, total_low, count, scatter = self.sums(at, self.center, sqnorm)
        length = min(max(LEAST_ROWS, blocks(N, BLOCKS)), max(LEAST_ROWS, MOST_COSTS // K))
        # entering, leaving, moving, first; rows start at 16 bytes whatever K is, which Triton compiles for
        state = self.new(2, 4, 4 * blocks(K, 4), dtype=torch.int32).zero_()
        state[:, 3] = 2**31 - 1
        cost, slack, reach = self.new(length, K), self.new(length), self.new(2, length)
        source, target, admitted = (self.new(length, dtype=torch.int32) for _ in range(3))
        TILE = 16 if small else 64 if blocks(length, 64) * blocks(K, 64) >= self.target.multiprocessors else 32
        COLUMNS = power_of_two(K, 16, 16 if small else 64)
        SCAN, CHOOSERS = (16, 16) if small else (128, 8)
        for index, begin in enumerate(range(0, N, length)):
            n = min(length, N - begin)
            now, later = state[index % 2], state[1 - index % 2]
            entering, leaving, moving, first = now.unbind(0)
            self.launch(
                exact_moves_cost_kernel, (blocks(n, TILE), blocks(K, TILE)), self.points, self.center, sqnorm, order,
                total, count, cost, begin, n, K, R, self.stride, R + 1, self.UNIT, TILE, TILE, 16, num_warps=4,
            )  # fmt: skip
            self.launch(
                exact_moves_choose_kernel, (blocks(n, CHOOSERS),), sqnorm, order, self.labels, total, count, scatter,
                cost, source, target, slack, reach, entering, leaving, begin, n, K, R, R + 1, self.tie, CHOOSERS,
                COLUMNS, num_warps=4,
            )  # fmt: skip
            self.launch(
                exact_moves_admit_kernel, (blocks(n, SCAN),), source, target, slack, reach, entering, leaving, admitted,
                moving, first, n, SCAN, num_warps=4,
            )  # fmt: skip
            self.launch(
                exact_moves_apply_kernel, (K,), self.points, self.center, sqnorm, order, self.labels, total, total_low,
                count, scatter, source, target, admitted, now, later, begin, n, now.stride(0), R, self.stride, R + 1,
                self.UNIT, SCAN, 16, self.BLOCK, num_warps=4,
            )  # fmt: skip


def exact_moves(
    points: torch.Tensor, labels: torch.Tensor, K: int, seed: int, tie: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """points [N, R] with feature stride 1; changes labels [N]; (J before, J after, moved)."""
    sweep = Sweep(points, labels, K, center(points), tie)
    start = labels.clone()
    at = pieces(labels, K, sweep.PIECE)
    before = sweep.objective(at)
    sweep.move(at, sweep.order(seed))
    moved = (labels != start).sum()
    # No move raised J, so a sum that came out higher did so by its own rounding.
    after = torch.minimum(before, sweep.objective(pieces(labels, K, sweep.PIECE)))
    return before, torch.where(moved == 0, before, after), moved
