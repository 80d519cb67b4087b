"""Sums and sizes of clusters, without atomics.

Not measured on a GPU yet. Memory-bound: points are read once. A stable sort lists every cluster's rows in ascending
order; a list is cut into pieces of at most PIECE rows, so one long cluster fills the GPU as well as many short ones; a
program sums one piece over a block of features in float64, and a second kernel adds a cluster's pieces in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._support import blocks, launch, power_of_two, unit


class Pieces(NamedTuple):
    """Which rows belong together; everything on the labels' device, of a size known without looking at them."""

    rows: torch.Tensor
    """[N] rows sorted by cluster, ascending within one."""
    begin: torch.Tensor
    """[K + 1] where a cluster's rows begin."""
    first: torch.Tensor
    """[K + 1] the first piece of a cluster."""
    cluster: torch.Tensor
    """[K + N // PIECE] the cluster of a piece; K where there is none."""


def pieces(labels: torch.Tensor, K: int, length: int) -> Pieces:
    sorted_labels, rows = torch.sort(labels, stable=True)
    begin = torch.searchsorted(sorted_labels, torch.arange(K + 1, device=labels.device))  # [K + 1]
    number = (begin[1:] - begin[:-1] + (length - 1)) // length  # [K]
    first = torch.zeros_like(begin)
    torch.cumsum(number, 0, out=first[1:])
    every = torch.arange(K + labels.shape[0] // length, device=labels.device)
    return Pieces(rows, begin, first, torch.searchsorted(first[1:], every, right=True))


@triton.jit(do_not_specialize=["K", "stride_points"])
def cluster_sums_pieces_kernel(
    points_ptr, rows_ptr, begin_ptr, first_ptr, cluster_ptr, part_ptr, K, R, stride_points,
    UNIT: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """part [pieces, R]: the sum of one piece's rows."""
    piece = tl.program_id(0).to(tl.int64)
    k = tl.load(cluster_ptr + piece)
    if k < K:
        feature = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        begin = tl.load(begin_ptr + k) + (piece - tl.load(first_ptr + k)) * PIECE
        end = tl.minimum(begin + PIECE, tl.load(begin_ptr + k + 1))
        total = tl.zeros((BLOCK,), tl.float64)
        for at in range(0, PIECE, ROWS):
            m = begin + at + tl.arange(0, ROWS)
            row = tl.load(rows_ptr + m, mask=m < end, other=0)
            from_ptr = points_ptr + row[:, None] * (stride_points * UNIT) + feature[None, :]
            x = tl.load(from_ptr, mask=(m < end)[:, None] & (feature < R)[None, :], other=0.0)
            total += tl.sum(x.to(tl.float64), 0)
        tl.store(part_ptr + piece * R + feature, total, mask=feature < R)


@triton.jit
def cluster_sums_total_kernel(part_ptr, first_ptr, sums_ptr, R, BLOCK: tl.constexpr):
    """sums [K, R] from the pieces in order."""
    k = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for piece in range(tl.load(first_ptr + k), tl.load(first_ptr + k + 1)):
        total += tl.load(part_ptr + piece * R + feature, mask=feature < R, other=0.0)
    tl.store(sums_ptr + k * R + feature, total.to(sums_ptr.dtype.element_ty), mask=feature < R)


def cluster_sums(points: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor) -> None:
    """points [N, R] with feature stride 1, labels [N]; fills sums [K, R] and counts [K]."""
    R = points.shape[1]
    K = sums.shape[0]
    small = _support.target(points.device).interpreter
    PIECE = 512  # partial sums cost little, and a few thousand pieces fill any GPU
    at = pieces(labels, K, PIECE)
    torch.sub(at.begin[1:], at.begin[:-1], out=counts)
    part = points.new_empty(at.cluster.shape[0], R, dtype=torch.float64)  # [pieces, R]
    BLOCK = power_of_two(R, 16, 64 if small else 128)
    ROWS = 256 if small else max(8, 2048 // BLOCK)
    UNIT = unit(points.stride(0))
    launch(
        cluster_sums_pieces_kernel, (at.cluster.shape[0], blocks(R, BLOCK)), points, at.rows, at.begin, at.first,
        at.cluster, part, K, R, points.stride(0) // UNIT, UNIT, PIECE, ROWS, BLOCK, num_warps=4, device=points.device,
    )  # fmt: skip
    launch(
        cluster_sums_total_kernel, (K, blocks(R, BLOCK)), part, at.first, sums, R, BLOCK, num_warps=1,
        device=points.device,
    )  # fmt: skip
