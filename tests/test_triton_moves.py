"""The Triton sweep of exact moves: rows move together, so its labels are its own, and these are its guarantees."""

from __future__ import annotations

import pytest
import torch

import gradclust_fast as gf
from gradclust_fast.reference.exact_moves import tie_factor
from gradclust_fast.triton_kernels import _support

moves = pytest.importorskip("gradclust_fast.triton_kernels.exact_moves")  # imports Triton
pytestmark = pytest.mark.skipif(
    _support.unavailable(torch.device("cpu")) is not None,
    reason="needs Triton and its interpreter",
)


def objective(points, labels):
    """J by its definition."""
    x, J = points.double(), 0.0
    for k in labels.unique():
        members = x[labels == k]
        J += len(members) * float((members - members.mean(0)).square().sum())
    return J


def sweep(points, labels, K, seed=0):
    """One sweep, with what every sweep must satisfy."""
    start = labels.clone()
    with gf.backend("triton"):
        labels, before, after, moved = gf.ops.exact_moves(points, labels, K, seed)
    one_cluster = objective(points, torch.zeros_like(labels))
    assert before.dtype == after.dtype == torch.float64 and moved.dtype == torch.int64
    assert 0 <= after <= before
    assert abs(float(before) - objective(points, start)) <= 1e-9 * one_cluster
    assert abs(float(after) - objective(points, labels)) <= 1e-9 * one_cluster
    assert int(labels.min()) >= 0 and int(labels.max()) < K
    assert int((labels != start).sum()) == int(moved)
    return labels, int(moved)


PROBLEMS = {
    "generic": torch.randn,
    "clustered": lambda n, r: 5 * torch.randn(3, r)[torch.randint(3, (n,))] + torch.randn(n, r) / 10,
    "duplicates": lambda n, r: torch.randn(3, r)[torch.randint(3, (n,))],
    "grid": lambda n, r: torch.randint(-2, 3, (n, r)).float(),
    "off-grid": lambda n, r: torch.randint(-1, 2, (n, r)).double() / 10 + 0.1,
    "constant": lambda n, r: torch.full((n, r), 0.1),
    "far-point": lambda n, r: torch.cat([torch.randn(n - 1, r), torch.full((1, r), 1e6)]),
    "common-offset": lambda n, r: 1000 + torch.randn(n, r),
    "bfloat16": lambda n, r: torch.randn(n, r).bfloat16(),
    "wide-range": lambda n, r: torch.randn(n, r) * torch.logspace(-8, 8, n, dtype=torch.float64).unsqueeze(1),
}


def moved_rows(points, labels, K, seed):
    """The labels of a sweep alone: a third of the time that its objectives take too."""
    labels = labels.clone()
    only = moves.Sweep(points, labels, K, moves.middle(points), tie_factor(points.shape[1]))
    only.move(moves.pieces(labels, K, only.PIECE), only.order(seed))
    return labels


@pytest.mark.parametrize("kind", PROBLEMS)
def test_j_never_rises(kind):
    for trial in range(20):
        torch.manual_seed(trial)
        n, r, K = 3 + trial % 14, 1 + trial % 4, 2 + (trial % 10 == 0)
        points, labels = PROBLEMS[kind](n, r), torch.randint(K, (n,))
        if trial % 5 == 0:
            sweep(points, labels, K, trial)
            continue
        allowed = 1e-12 * objective(points, torch.zeros_like(labels))
        assert objective(points, moved_rows(points, labels, K, trial)) <= objective(points, labels) + allowed


@pytest.mark.parametrize("kind", ["generic", "duplicates", "off-grid", "far-point"])
def test_sweeps_end_where_no_single_move_lowers_j(kind):
    n, r, K = 18, 2, 3
    points, labels = PROBLEMS[kind](n, r), torch.randint(K, (n,))
    for seed in range(40):
        labels, moved = sweep(points, labels, K, seed)
        if moved == 0:
            break
    with gf.backend("reference"):
        assert gf.ops.exact_moves(points, labels, K)[3] == 0


def test_an_emptied_cluster_is_refilled_and_duplicates_cost_nothing():
    points = torch.randn(3, 2).repeat(5, 1)
    labels = torch.zeros(15, dtype=torch.int64)
    for seed in range(40):
        labels, moved = sweep(points, labels, 4, seed)
        if moved == 0:
            break
    assert moved == 0 and objective(points, labels) <= 1e-12


def test_one_at_a_time_where_all_at_once_would_rise():
    points, labels = torch.tensor([-10.0, -10, 10, 10, 0]).unsqueeze(1), torch.tensor([0, 0, 0, 0, 1])
    assert objective(points, labels) == 1600
    labels, moved = sweep(points, labels, 2)
    assert moved >= 1 and objective(points, labels) < 1600


def test_rows_that_cannot_spoil_each_other_move_together():
    points = torch.cat([torch.randn(8, 2), 100 + torch.randn(8, 2)])
    labels = torch.arange(16) // 8
    labels[[0, 1, 8, 9]] = 1 - labels[[0, 1, 8, 9]]
    labels, moved = sweep(points, labels, 2)
    assert moved == 4 and labels.tolist() == [0] * 8 + [1] * 8


def test_constant_rows_merge_in_two_sweeps():
    points, labels = torch.full((16, 2), 0.7), torch.arange(16) % 3
    labels, moved = sweep(points, labels, 3)
    assert moved > 0 and sweep(points, labels, 3)[1] <= 5


def test_more_rows_than_a_block_and_more_features_and_clusters_than_a_tile():
    points, labels = torch.randn(40, 40), torch.randint(18, (40,))
    after, moved = sweep(points, labels, 18, 5)
    assert moved > 5
    again, _ = sweep(points, labels, 18, 5)
    assert torch.equal(after, again)
    assert not torch.equal(after, sweep(points, labels, 18, 6)[0])


def test_edges():
    with gf.backend("triton"):
        labels, before, after, moved = gf.ops.exact_moves(torch.ones(0, 3), torch.ones(0, dtype=torch.int64), 2)
        assert labels.shape == (0,) and before == after == moved == 0
        labels, before, after, _ = gf.ops.exact_moves(torch.ones(4, 0), torch.tensor([1, 1, 0, 1]), 2)
        assert labels.tolist() == [1, 1, 1, 1] and before == after == 0
        labels, before, after, moved = gf.ops.exact_moves(torch.randn(5, 4), torch.arange(5), 5)
        assert labels.tolist() == [0, 1, 2, 3, 4] and before == after == moved == 0
        points, labels = torch.randn(12, 8), torch.randint(3, (12,))
        whole = gf.ops.exact_moves(points[::2, ::3].contiguous(), labels[::2].contiguous(), 3)
        views = gf.ops.exact_moves(points[::2, ::3], labels[::2], 3)
        assert all(torch.equal(a, b) for a, b in zip(whole, views))
        with pytest.raises(ValueError, match=r"labels\[1\] = 5"):
            gf.ops.exact_moves(torch.ones(3, 2), torch.tensor([0, 5, 1]), 3)
        with pytest.raises(ValueError, match="NaN or Inf in 1 of 3 rows: 1;"):
            gf.ops.exact_moves(torch.tensor([[1.0], [float("nan")], [2.0]]), torch.zeros(3, dtype=torch.int64), 2)
