"""Exact-move clustering of the rows of a matrix: sweeps of ``ops.exact_moves`` until nothing more is to be had."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import integer
from .._dispatch import OPS


class PointClustering(NamedTuple):
    """What :func:`cluster_points` found."""

    labels: Tensor
    """[N] int64 on the points' device."""
    history: list[float]
    """J at the start and after every sweep; never rises. ``history[-1] / N²`` is the predicted variance."""
    converged: bool
    """Whether the last sweep moved nothing: no single move lowers J."""


def cluster_points(
    points: Tensor,
    num_clusters: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
    tol: float = 0.0,
    on_sweep: Callable[[int, float], None] | None = None,
) -> PointClustering:
    """Clusters rows so that one row drawn from every cluster estimates the mean of all with little variance.

    Minimises ``J = Σ_k N_k Σ_{i∈k} ‖x_i − c_k‖²`` (N² times that variance) by moving one row at a time to where J
    becomes smallest, so J never rises. The start is random with equal sizes: on MNIST gradients (10,000 rows, K = 128)
    k-means++ seeding or a start from a subsample end within 1 % of the same J and cost one to two sweeps to compute.

    Args:
        points: [N, R], finite; gradients, sketches of them or any other features.
        num_clusters: K ≥ 1; may exceed N, the rest stays empty.
        labels: [N] integers in 0..K−1 to start from, such as those of an earlier clustering.
        seed: of the start and of the order in which rows are visited. Same seed, same labels.
        max_sweeps: sweeps over all rows at most.
        tol: stop after two sweeps in a row that each lower J by less than this fraction of it. 0: go on until nothing
            moves.
        on_sweep: called with (sweep, J) after every sweep, from 1.

    Returns:
        A :class:`PointClustering`.

    Raises:
        ValueError, TypeError: no rows, rows that are not finite (named), K < 1, labels that do not fit.

    Source:
        The guide's "clustering" page; objective: Faghri et al. 2020, arXiv:2007.04532, Proposition 3.1.

    Example:
        >>> points = torch.tensor([[-1.0], [0.0], [0.0], [0.0], [0.0], [0.0], [1.0]])
        >>> gf.cluster_points(points, 2).history[-1]
        4.0
    """
    num_clusters, seed = integer("num_clusters", num_clusters, 1), integer("seed", seed)
    max_sweeps = integer("max_sweeps", max_sweeps, 1)
    check_fraction("tol", tol)
    points = torch.as_tensor(points)
    if points.dim() != 2:
        raise ValueError(f"points must be [N, R], got {list(points.shape)}; flatten every row to a vector")
    N = len(points)
    if N == 0:
        raise ValueError("points has no rows; there is nothing to cluster")
    if labels is None:
        labels = balanced_labels(N, num_clusters, seed).to(points.device)
    else:
        labels = torch.as_tensor(labels)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype}; convert them with .long()")
        labels = labels.to(points.device, torch.int64)
    history: list[float] = []
    converged, negligible = False, 0
    for sweep in range(max_sweeps):
        labels, before, after, moved = OPS["exact_moves"].run(points, labels, num_clusters, _sweep_seed(seed, sweep))
        if not history:
            history.append(float(before))
        # No move raises J; every sweep sums it anew, so where nothing moved its last bits may differ.
        history.append(min(float(after), history[-1]))
        if on_sweep is not None:
            on_sweep(sweep + 1, history[-1])
        converged = int(moved) == 0
        # One such sweep is no sign of the end: merging clusters of equal rows leaves J as it is, then it falls again.
        negligible = negligible + 1 if history[-2] - history[-1] <= tol * history[-2] else 0
        if converged or (tol > 0 and negligible == 2):
            break
    return PointClustering(labels, history, converged)


def balanced_labels(N: int, num_clusters: int, seed: int) -> Tensor:
    """[N] random clusters whose sizes differ by at most one."""
    labels = torch.empty(N, dtype=torch.int64)
    labels[torch.randperm(N, generator=torch.Generator().manual_seed(seed))] = torch.arange(N) % num_clusters
    return labels


def _sweep_seed(seed: int, sweep: int) -> int:
    return (seed * 1_000_003 + sweep + 1) % 2**63


def check_fraction(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number, at least 0, got {value!r}")
