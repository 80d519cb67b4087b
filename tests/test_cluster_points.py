from __future__ import annotations

import itertools

import pytest
import torch

import gradclust_fast as gf
from gradclust_fast.clustering.exact import balanced_labels


def objective(points, labels, K):
    """J, literally, in float64."""
    points, total = points.double(), 0.0
    for k in range(K):
        members = points[labels == k]
        if len(members):
            total += len(members) * float((members - members.mean(0)).square().sum())
    return total


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize(
    "values, best", [((0, 1, 2, 3, 4, 9), 45.0), ((-1, 0, 0, 0, 0, 0, 1), 4.0)], ids=["outlier", "non-contiguous"]
)
def test_the_optimum_of_small_problems_is_found(values, best):
    points = column(*values)
    every = (torch.tensor(labels) for labels in itertools.product((0, 1), repeat=len(values)))
    assert min(objective(points, labels, 2) for labels in every) == pytest.approx(best)
    found = [gf.cluster_points(points, 2, seed=seed) for seed in range(5)]
    assert min(run.history[-1] for run in found) == pytest.approx(best)
    assert all(run.converged for run in found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("start", ["random", "one cluster", "split copies"])
def test_as_many_clusters_as_distinct_rows_leave_no_variance(seed, start):
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.randn(7, 5, generator=generator)
    copies = torch.randint(1, 9, (7,), generator=generator)
    points = distinct.repeat_interleave(copies, 0)
    N = len(points)
    labels = {"random": None, "one cluster": torch.zeros(N, dtype=torch.int64), "split copies": torch.arange(N) % 7}
    run = gf.cluster_points(points, 7, labels=labels[start], seed=seed)
    assert run.history[-1] <= 1e-12 * objective(points, torch.zeros(N), 1)
    assert objective(points, run.labels, 7) <= 1e-12 * objective(points, torch.zeros(N), 1)


def test_one_cluster_is_plain_sampling_and_one_each_has_no_variance():
    points = torch.randn(12, 3)
    total = 12 * float((points - points.mean(0)).double().square().sum())
    assert gf.cluster_points(points, 1).history[-1] == pytest.approx(total, rel=1e-6)
    for K in (12, 13, 100):  # the clusters beyond N stay empty
        run = gf.cluster_points(points, K)
        assert run.history[-1] == 0 and len(run.labels.unique()) == 12


def test_moves_are_made_one_at_a_time():
    # From {±10, ±10}, {0}, moving every point whose own ΔJ is negative at once raises J from 1600 to 2000.
    points, start = column(-10, -10, 10, 10, 0), torch.tensor([0, 0, 0, 0, 1])
    run = gf.cluster_points(points, 2, labels=start)
    assert run.history[0] == pytest.approx(1600)
    assert max(run.history) == run.history[0] and run.history[-1] < 1600


def test_random_equal_strata_have_their_known_expected_variance():
    N, K, draws = 24, 6, 400
    points = torch.randn(N, 3, dtype=torch.float64)
    sigma2 = float((points - points.mean(0)).square().sum()) / N
    variances = torch.tensor([objective(points, balanced_labels(N, K, seed), K) / N**2 for seed in range(draws)])
    expected = sigma2 / K * (N - K) / (N - 1)
    assert abs(variances.mean() - expected) <= 4 * variances.std() / draws**0.5


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_history_never_rises_and_ends_at_the_labels_own_objective(offset):
    for seed in range(5):
        points = torch.randn(60, 4, generator=torch.Generator().manual_seed(seed)) + offset
        run = gf.cluster_points(points, 5, seed=seed)
        assert all(later <= earlier for earlier, later in itertools.pairwise(run.history))
        assert run.history[-1] == pytest.approx(objective(points, run.labels, 5), rel=1e-9)
        assert run.history[0] == pytest.approx(objective(points, balanced_labels(60, 5, seed), 5), rel=1e-9)


def test_same_seed_same_labels_and_another_seed_another_order():
    points = torch.randn(80, 3)
    first = gf.cluster_points(points, 8, seed=3)
    again, other = gf.cluster_points(points, 8, seed=3), gf.cluster_points(points, 8, seed=4)
    assert torch.equal(first.labels, again.labels) and first.history == again.history
    assert not torch.equal(first.labels, other.labels)


def test_a_finished_clustering_is_a_fixed_start():
    points = torch.randn(50, 3)
    run = gf.cluster_points(points, 5)
    assert run.converged
    again = gf.cluster_points(points, 5, labels=run.labels, seed=9)
    assert torch.equal(again.labels, run.labels) and len(again.history) == 2


def test_sweeps_end_at_the_limit_or_when_they_gain_little():
    points = torch.randn(300, 6)
    full = gf.cluster_points(points, 10)
    assert len(gf.cluster_points(points, 10, max_sweeps=2).history) == 3
    seen = []
    short = gf.cluster_points(points, 10, tol=0.02, on_sweep=lambda *call: seen.append(call))
    assert len(short.history) < len(full.history) and not short.converged
    gains = [1 - later / earlier for earlier, later in itertools.pairwise(short.history)]
    assert max(gains[-2:]) <= 0.02 and not any(a <= 0.02 and b <= 0.02 for a, b in itertools.pairwise(gains[:-1]))
    assert seen == list(enumerate(short.history))[1:]


@pytest.mark.parametrize(
    "points, K, options, error, message",
    [
        (torch.zeros(0, 3), 2, {}, ValueError, "points has no rows"),
        (torch.zeros(3), 2, {}, ValueError, r"points must be \[N, R\], got \[3\]"),
        (torch.tensor([[0.0], [float("nan")], [1.0]]), 2, {}, ValueError, "1 of 3 rows: 1"),
        (torch.zeros(3, 1), 0, {}, ValueError, "num_clusters must be at least 1, got 0"),
        (torch.zeros(3, 1), 2.0, {}, TypeError, "num_clusters must be an integer, got 2.0"),
        (torch.zeros(3, 1), 2, {"labels": [0, 1]}, ValueError, r"labels must be \[N\] with N=3"),
        (torch.zeros(3, 1), 2, {"labels": [0, 1, 2]}, ValueError, r"labels\[2\] = 2"),
        (torch.zeros(3, 1), 2, {"labels": [0.0, 1.0, 1.5]}, TypeError, "labels must be integers"),
        (torch.zeros(3, 1), 2, {"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1"),
        (torch.zeros(3, 1), 2, {"tol": float("nan")}, ValueError, "tol must be a finite number"),
        (torch.zeros(3, 1), 2, {"seed": 2**64}, ValueError, "seed must fit into 64 bits"),
    ],
)
def test_wrong_arguments_are_named(points, K, options, error, message):
    with pytest.raises(error, match=message):
        gf.cluster_points(points, K, **options)
