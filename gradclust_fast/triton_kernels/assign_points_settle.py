"""The float64 end of ``assign_points``: distances by differences, for the rows that products did not settle.

Not measured on a GPU yet. A fixed number of programs goes through lists whose lengths only the GPU knows. Lists are
filled in any order, but what is computed for a row depends on that row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .assign import cheaper, first_cheapest


@triton.jit(do_not_specialize=["programs", "stride_points", "stride_counts"])
def assign_points_near_kernel(
    points_ptr, centers_ptr, counts_ptr, label_ptr, cost_ptr, other_ptr, near_ptr, facts_ptr, R, programs,
    stride_points, stride_centers, stride_counts, UNIT: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the near list: the better of centres ``label`` and ``other``."""
    n = tl.load(facts_ptr + 1)
    for chunk in range(tl.program_id(0), (n + ROWS - 1) // ROWS, programs):
        slot = chunk * ROWS + tl.arange(0, ROWS)
        live = slot < n
        row = tl.load(near_ptr + slot, mask=live, other=0).to(tl.int64)
        first = tl.load(label_ptr + row, mask=live, other=0)
        other = tl.load(other_ptr + row, mask=live, other=0).to(tl.int64)
        cost = tl.zeros((ROWS,), tl.float64)
        other_cost = tl.zeros((ROWS,), tl.float64)
        for begin in range(0, R, BLOCK):
            feature = begin + tl.arange(0, BLOCK).to(tl.int64)
            mask = live[:, None] & (feature < R)[None, :]
            x = tl.load(points_ptr + row[:, None] * (stride_points * UNIT) + feature[None, :], mask=mask, other=0.0).to(
                tl.float64
            )
            c = tl.load(centers_ptr + first[:, None] * stride_centers + feature[None, :], mask=mask, other=0.0)
            difference = x - c.to(tl.float64)
            cost += tl.sum(difference * difference, 1)
            two = mask & (first != other)[:, None]
            c = tl.load(centers_ptr + other[:, None] * stride_centers + feature[None, :], mask=two, other=0.0)
            difference = x - c.to(tl.float64)
            other_cost += tl.sum(difference * difference, 1)
        if WEIGHTED:
            cost *= tl.load(counts_ptr + first * stride_counts, mask=live, other=0).to(tl.float64) + 1
            other_cost *= tl.load(counts_ptr + other * stride_counts, mask=live, other=0).to(tl.float64) + 1
        switch = (other_cost < cost) | ((other_cost == cost) & (other < first))
        switch = switch & (first != other)
        tl.store(label_ptr + row, tl.where(switch, other, first), mask=live)
        tl.store(cost_ptr + row, tl.where(switch, other_cost, cost).to(cost_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["B", "K", "programs", "stride_points", "stride_counts"])
def assign_points_far_kernel(
    points_ptr, centers_ptr, counts_ptr, label_ptr, cost_ptr, far_ptr, facts_ptr, B, K, R, programs, stride_points,
    stride_centers, stride_counts, UNIT: tl.constexpr, WEIGHTED: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr,
    CLUSTERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the far list, or ALL rows, against all centres."""
    n = B
    if not ALL:
        n = tl.load(facts_ptr + 2)
    for chunk in range(tl.program_id(0), (n + ROWS - 1) // ROWS, programs):
        slot = chunk * ROWS + tl.arange(0, ROWS)
        live = slot < n
        row = slot.to(tl.int64)
        if not ALL:
            row = tl.load(far_ptr + slot, mask=live, other=0).to(tl.int64)
        best = tl.full((ROWS, CLUSTERS), float("inf"), tl.float64)
        best_index = tl.zeros((ROWS, CLUSTERS), tl.int32) + tl.arange(0, CLUSTERS)[None, :]
        for start in range(0, K, CLUSTERS):
            k = start + tl.arange(0, CLUSTERS)
            distance = tl.zeros((ROWS, CLUSTERS), tl.float64)
            for begin in range(0, R, BLOCK):
                feature = begin + tl.arange(0, BLOCK).to(tl.int64)
                inside = (feature < R)[None, :]
                x = tl.load(
                    points_ptr + row[:, None] * (stride_points * UNIT) + feature[None, :], mask=live[:, None] & inside,
                    other=0.0,
                ).to(tl.float64)  # fmt: skip
                c = tl.load(
                    centers_ptr + k.to(tl.int64)[:, None] * stride_centers + feature[None, :],
                    mask=(k < K)[:, None] & inside, other=0.0,
                ).to(tl.float64)  # fmt: skip
                difference = x[:, None, :] - c[None, :, :]
                distance += tl.sum(difference * difference, 2)
            if WEIGHTED:
                weight = tl.load(counts_ptr + k * stride_counts, mask=k < K, other=0).to(tl.float64) + 1
                distance *= weight[None, :]
            distance = tl.where((k < K)[None, :], distance, float("inf"))
            index = tl.zeros((ROWS, CLUSTERS), tl.int32) + k[None, :].to(tl.int32)
            take = cheaper(distance, index, best, best_index)
            best = tl.where(take, distance, best)
            best_index = tl.where(take, index, best_index)
        cost, label = first_cheapest(best, best_index)
        tl.store(label_ptr + row, label.to(tl.int64), mask=live)
        tl.store(cost_ptr + row, cost.to(cost_ptr.dtype.element_ty), mask=live)
