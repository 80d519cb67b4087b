"""``exact_moves``: one sweep of the clustering that lowers the variance of stratified mini-batches."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._point_checks import (
    check_finite,
    check_labels,
    check_points,
    check_range,
    cpu_refuses,
    points_triton_refuses,
    readable,
    threads_for,
    with_unit_stride,
)
from ._triton import triton_loses
from .cluster_sums import PIECE

Sweep = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def exact_moves(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int = 0) -> Sweep:
    """One sweep of exact moves for ``J = Σ_k N_k Σ_{i in k} ‖x_i − c_k‖²``, which is N² times the strata's variance.

    Every row is visited once, in an order that depends on ``(seed, N)`` alone, and goes to the cluster where J becomes
    smallest. J never rises. Where the best change of J is zero up to rounding (``(R + 8)·2⁻⁵²`` of the magnitudes
    compared) the row goes to the largest such cluster, of equal sizes to the lowest index, so clusters of equal rows
    merge, and an emptied cluster, free to join, is refilled. Sweeps repeated until nothing moves end. All decisions
    are float64's.

    The reference and the C++ kernel let one row move at a time, so their labels are the same, on any number of threads.
    The CUDA and Triton kernels meet about 64 blocks of rows and move together all rows of a block for which the sum of
    their changes provably bounds the joint one; a row that has to wait asks again in the next sweep. Their labels are
    their own, the same on every run; J does not rise either, and where they move nothing, no single move lowers J.

    Args:
        points: [N, R], finite. Its magnitude may be anything whose squares float64 can add up.
        labels: [N] int64, each in [0, num_clusters); the start.
        num_clusters: K ≥ 1; may exceed N.
        seed: picks the order of the visits. Use another for every sweep.

    Returns:
        ``labels`` [N] int64, and as 0-d tensors J before and after the sweep (float64) and the number of rows moved
        (int64).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a label out of range, naming the first; rows
            that are not finite, naming them.

    Source:
        The guide's "mathematics" page; a Hartigan-style move for the objective of Faghri et al. 2020, arXiv:2007.04532,
        Proposition 3.1.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [9.0]])
        >>> labels, J_before, J_after, moved = gf.ops.exact_moves(points, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
        >>> float(J_before), float(J_after)
        (68.0, 45.0)
    """
    return _op.call(points, labels, num_clusters, seed)


def _check(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> None:
    check_points("points", points)
    check_labels(labels, num_clusters, points)


def _fake(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> Sweep:
    J_before, J_after = (points.new_empty((), dtype=torch.float64) for _ in range(2))
    return labels.new_empty(labels.shape), J_before, J_after, labels.new_empty(())


def _reference(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> Sweep:
    check_range(labels, num_clusters)
    sweep = reference.exact_moves.exact_moves(points, labels, num_clusters, seed)
    _check_objective(points, sweep[1])
    return sweep


def _check_objective(points: torch.Tensor, J_before: torch.Tensor) -> None:
    """Looks for the reason only where J shows that there is one: it costs a pass over the points."""
    if readable(J_before, J_before.isfinite, "J is not finite") and not J_before.isfinite():
        check_finite("points", points)
        raise ValueError("points are too large: their squares overflow float64; divide them by their largest entry")


_op = Op(
    "exact_moves(Tensor points, Tensor labels, SymInt num_clusters, int seed) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "blocks of rows: float32 products propose, float64 decides")
def exact_moves_cpu(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> Sweep:
    check_range(labels, num_clusters)
    N = points.shape[0]
    points, labels = with_unit_stride(points), labels.clone(memory_format=torch.contiguous_format)
    center = reference.exact_moves.center(points)
    order = reference.exact_moves.visiting_order(N, seed)
    J, moved = points.new_empty(2, dtype=torch.float64), labels.new_empty(())
    _native.with_workspace(
        _native._C.exact_moves_cpu, _native.rows(points), center.data_ptr(), order.data_ptr(), num_clusters,
        labels.data_ptr(), J.data_ptr(), moved.data_ptr(), threads=threads_for(points.numel() * num_clusters),
    )  # fmt: skip
    _check_objective(points, J[0])
    return labels, J[0].clone(), J[1].clone(), moved


@_op.kernel(
    "triton",
    refuses=points_triton_refuses,
    loses=lambda points, *_: triton_loses(points),
    route=lambda *_: "blocks of rows: products in float64, then every move that cannot spoil another",
)
def exact_moves_triton(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> Sweep:
    from ..triton_kernels.exact_moves import exact_moves as sweep

    check_range(labels, num_clusters)
    points, labels = with_unit_stride(points), labels.clone(memory_format=torch.contiguous_format)
    J_before, J_after, moved = sweep(
        points, labels, num_clusters, seed, reference.exact_moves.tie_factor(points.shape[1])
    )
    _check_objective(points, J_before)
    return labels, J_before, J_after, moved


def _cuda_refuses(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> str | None:
    if num_clusters + points.shape[0] // PIECE >= 2**31:
        return f"the CUDA kernel takes fewer than 2³¹ clusters and pieces of {PIECE} rows"
    return _cuda.refuses(points)


# Chosen before Triton's: one launch a sweep where that makes some 256, each of them queued by Python.
@_op.kernel(
    "cuda",
    refuses=_cuda_refuses,
    route=lambda *_: "one launch: blocks of rows, products in float64, then every move that cannot spoil another",
)
def exact_moves_cuda(points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int) -> Sweep:
    check_range(labels, num_clusters)
    points, start = with_unit_stride(points), labels.contiguous()
    N, R = points.shape
    if N == 0:
        zero = points.new_zeros((), dtype=torch.float64)
        return labels.clone(), zero, zero.clone(), labels.new_zeros(())
    labels, device, rows = start.clone(), points.device, _native.rows(points)
    workspace = points.new_empty(_cuda.native().exact_moves_cuda_workspace(N, R, num_clusters), dtype=torch.float64)
    arrived = labels.new_zeros(3)
    center = reference.exact_moves.center(points)
    key, begin = torch.empty_like(labels), labels.new_empty(num_clusters + 1)
    _cuda.launch("visiting_keys_cuda", device, key.data_ptr(), N, seed)
    order = key.sort(stable=True).indices

    def objective(which: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """J of the labels, and the rows by cluster."""
        in_order, row = labels.to(torch.int32).sort(stable=True)
        J = points.new_empty((), dtype=torch.float64)
        _cuda.launch(
            "cluster_objective_cuda", device, rows, (in_order.data_ptr(), row.data_ptr(), begin.data_ptr()),
            num_clusters, workspace.data_ptr(), arrived[which].data_ptr(), J.data_ptr(),
        )  # fmt: skip
        return J, (in_order, row, begin)

    before, at = objective(0)
    _cuda.launch(
        "exact_moves_cuda", device, rows, tuple(each.data_ptr() for each in at), num_clusters, center.data_ptr(),
        order.data_ptr(), reference.exact_moves.tie_factor(R), workspace.data_ptr(), arrived[1].data_ptr(),
        labels.data_ptr(),
    )  # fmt: skip
    after, _ = objective(2)
    moved = (labels != start).sum()
    _check_objective(points, before)
    # No move raised J, so a sum that came out higher did so by its own rounding.
    after = torch.minimum(before, after)
    return labels, before, torch.where(moved == 0, before, after), moved
