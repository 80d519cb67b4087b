"""``cluster_sums``: sum and size of every cluster of rows."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._checks import accumulator
from ._point_checks import (
    check_labels,
    check_points,
    check_range,
    cpu_refuses,
    points_triton_refuses,
    threads_for,
    with_unit_stride,
)
from ._triton import triton_loses


def cluster_sums(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_{i in k} x_i and N_k of every cluster k. Added in float64 and in a fixed order: the same bits on every run.

    Args:
        points: [N, R].
        labels: [N] int64, each in [0, num_clusters).
        num_clusters: K ≥ 1.

    Returns:
        ``sums`` [K, R], float64 for float64 points, else float32, and ``counts`` [K] int64. Empty clusters are zeros;
        a NaN stays in its own cluster and column.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a label out of range, naming the first.

    Example:
        >>> sums, counts = gf.ops.cluster_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 1, 0]), 3)
        >>> sums.tolist(), counts.tolist()
        ([[4.0], [3.0], [0.0]], [1, 2, 0])
    """
    return _op.call(points, labels, num_clusters)


def _check(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> None:
    check_points("points", points)
    check_labels(labels, num_clusters, points)


def _fake(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    sums = points.new_empty(num_clusters, points.shape[1], dtype=accumulator(points.dtype))  # [K, R]
    return sums, points.new_empty(num_clusters, dtype=torch.int64)  # [K]


def _reference(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    check_range(labels, num_clusters)
    return reference.cluster_sums.cluster_sums(points, labels, num_clusters)


_op = Op(
    "cluster_sums(Tensor points, Tensor labels, SymInt num_clusters) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "rows sorted by cluster, a task per cluster and 64 features")
def cluster_sums_cpu(
    points: torch.Tensor, labels: torch.Tensor, num_clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_range(labels, num_clusters)
    sums, counts = _fake(points, labels, num_clusters)
    points, labels = with_unit_stride(points), labels.contiguous()
    _native.with_workspace(
        _native._C.cluster_sums_cpu, _native.rows(points), labels.data_ptr(), num_clusters, sums.data_ptr(),
        counts.data_ptr(), threads=threads_for(points.numel()),
    )  # fmt: skip
    return sums, counts


PIECE = 256  # csrc/cluster.h: CLUSTER_PIECE


def _cuda_refuses(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> str | None:
    if num_clusters + points.shape[0] // PIECE >= 2**31:
        return f"the CUDA kernel takes fewer than 2³¹ clusters and pieces of {PIECE} rows"
    return _cuda.refuses(points)


@_op.kernel("cuda", refuses=_cuda_refuses, route=lambda *_: f"rows sorted by cluster, pieces of {PIECE} rows")
def cluster_sums_cuda(
    points: torch.Tensor, labels: torch.Tensor, num_clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    check_range(labels, num_clusters)
    sums, counts = _fake(points, labels, num_clusters)
    points = with_unit_stride(points)
    N, R = points.shape
    sorted_labels, order = labels.to(torch.int32).contiguous().sort(stable=True)
    begin = counts.new_empty(num_clusters + 1)  # [K + 1] each cluster's first place in the sorted order
    partial = points.new_empty(N // PIECE + num_clusters, R, dtype=torch.float64)
    _cuda.launch(
        "cluster_sums_cuda", points.device, _native.rows(points), sorted_labels.data_ptr(), order.data_ptr(),
        num_clusters, begin.data_ptr(), counts.data_ptr(), partial.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return sums, counts


@_op.kernel(
    "triton",
    refuses=points_triton_refuses,
    loses=lambda points, *_: triton_loses(points),
    route=lambda *_: "rows sorted by cluster, a program per piece of a cluster, pieces added in order",
)
def cluster_sums_triton(
    points: torch.Tensor, labels: torch.Tensor, num_clusters: int
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.cluster_sums import cluster_sums as fill

    check_range(labels, num_clusters)
    sums, counts = _fake(points, labels, num_clusters)
    fill(with_unit_stride(points), labels, sums, counts)
    return sums, counts
