from __future__ import annotations

import itertools

import pytest
import torch

import gradclust_fast as gf


def objective(points, labels, K):
    """J by its definition."""
    x = points.double()
    J = 0.0
    for k in range(K):
        members = x[labels == k]
        if len(members):
            J += len(members) * float((members - members.mean(0)).square().sum())
    return J


def sweep_until_still(points, labels, K, limit=200):
    """The driver's loop, with what every sweep must satisfy."""
    one_cluster = objective(points, torch.zeros_like(labels), 1)
    running = None
    for seed in range(limit):
        start = labels
        labels, before, after, moved = gf.ops.exact_moves(points, labels, K, seed)
        assert before.dtype == after.dtype == torch.float64 and moved.dtype == torch.int64
        assert before.dim() == after.dim() == moved.dim() == 0
        assert 0 <= after <= before
        assert abs(float(before) - objective(points, start, K)) <= 1e-9 * one_cluster
        assert abs(float(after) - objective(points, labels, K)) <= 1e-9 * one_cluster
        assert running is None or abs(running - float(before)) <= 1e-9 * one_cluster
        assert int(labels.min()) >= 0 and int(labels.max()) < K
        assert int((labels != start).sum()) == int(moved)
        running = float(after)
        if moved == 0:
            assert torch.equal(labels, start) and before == after
            return labels, running, one_cluster
    raise AssertionError(f"still moving after {limit} sweeps")


def generic(n, r):
    return torch.randn(n, r)


PROBLEMS = {
    "generic": generic,
    "clustered": lambda n, r: 5 * torch.randn(4, r)[torch.randint(0, 4, (n,))] + generic(n, r) / 10,
    "duplicates": lambda n, r: torch.randn(5, r)[torch.randint(0, 5, (n,))],
    "inexact-duplicates": lambda n, r: (torch.randn(5, r, dtype=torch.float64) / 3 + 7)[torch.randint(0, 5, (n,))],
    "grid": lambda n, r: torch.randint(-2, 3, (n, r)).float(),
    "off-grid": lambda n, r: torch.randint(-1, 2, (n, r)).double() / 10 + 0.1,
    "constant": lambda n, r: torch.full((n, r), 0.1),
    "far-point": lambda n, r: torch.cat([generic(n - 1, r), torch.full((1, r), 1e6)]),
    "common-offset": lambda n, r: 1000 + generic(n, r),
    "half-precision": lambda n, r: generic(n, r).bfloat16(),
    "wide-range": lambda n, r: generic(n, r) * torch.logspace(-8, 8, n, dtype=torch.float64).unsqueeze(1),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_j_never_rises_and_sweeps_end(backend, kind):
    for trial, (n, r, K) in enumerate(itertools.product((2, 7, 24), (1, 3, 10), (1, 2, 5))):
        torch.manual_seed(trial)
        points = PROBLEMS[kind](n, r)
        sweep_until_still(points, torch.randint(0, K, (n,)), K)


# In "wide-range" costs differ by as little as rounding, where each backend may see a tie or not.
@pytest.mark.parametrize("kind", sorted(PROBLEMS.keys() - {"wide-range"}))
def test_all_backends_move_alike(backend, kind):
    if backend == "reference":
        pytest.skip("it is what the others are compared with")
    for n, r, K in ((60, 4, 7), (150, 33, 20), (40, 9, 60)):
        points, labels = PROBLEMS[kind](n, r), torch.randint(0, K, (n,))
        for seed in range(3):
            with gf.backend("reference"):
                expected = gf.ops.exact_moves(points, labels, K, seed)
            found = gf.ops.exact_moves(points, labels, K, seed)
            assert torch.equal(found[0], expected[0]) and found[3] == expected[3]
            torch.testing.assert_close(found[1:3], expected[1:3], rtol=1e-11, atol=1e-12 * float(expected[1]))
            labels = found[0]


@pytest.mark.parametrize("extra", [0, 1, 3])
@pytest.mark.parametrize("grid", [False, True])
def test_as_many_clusters_as_distinct_points_reach_zero_from_any_start(backend, grid, extra):
    for trial in range(12 if backend == "reference" else 60):
        torch.manual_seed(trial)
        distinct = torch.randint(-3, 4, (6, 2)).double() if grid else torch.randn(6, 2)
        distinct = distinct.unique(dim=0)
        points = distinct[torch.cat([torch.arange(len(distinct)), torch.randint(0, len(distinct), (24,))])]
        K = len(distinct) + extra
        labels = torch.zeros(len(points), dtype=torch.int64) if trial % 4 == 0 else torch.randint(0, K, (len(points),))
        labels, final, one_cluster = sweep_until_still(points, labels, K)
        assert final <= 1e-12 * one_cluster
        assert objective(points, labels, K) <= 1e-12 * one_cluster


def test_the_optimum_is_not_the_k_means_optimum(backend):
    points = torch.tensor([0.0, 1, 2, 3, 4, 9]).unsqueeze(1)
    found = min(sweep_until_still(points, torch.randint(0, 2, (6,)), 2)[1] for _ in range(20))
    assert found == pytest.approx(45, rel=1e-12)


def test_clusters_need_not_be_contiguous(backend):
    points = torch.tensor([-1.0, 0, 0, 0, 0, 0, 1]).unsqueeze(1)
    results = [sweep_until_still(points, torch.randint(0, 2, (7,)), 2) for _ in range(20)]
    best = min(results, key=lambda result: result[1])
    assert best[1] == pytest.approx(4, rel=1e-12)
    assert best[0][0] == best[0][6] != best[0][1]


def test_one_at_a_time_where_all_at_once_would_rise(backend):
    points, labels = torch.tensor([-10.0, -10, 10, 10, 0]).unsqueeze(1), torch.tensor([0, 0, 0, 0, 1])
    assert objective(points, labels, 2) == 1600
    for seed in range(20):
        _, before, after, _ = gf.ops.exact_moves(points, labels, 2, seed)
        assert before == 1600 and after < 1600


def test_random_equal_strata_start_where_theory_says(backend):
    N, K = 12, 3
    points = torch.randn(N, 2, dtype=torch.float64)
    sigma2 = float((points - points.mean(0)).square().sum(1).mean())
    total = 0.0
    trials = 100 if backend == "reference" else 1000
    for _ in range(trials):
        labels = torch.randperm(N) % K
        total += float(gf.ops.exact_moves(points, labels, K)[1]) / N**2
    assert total / trials == pytest.approx(sigma2 / K * (N - K) / (N - 1), rel=0.05)


def test_one_cluster_and_a_cluster_each(backend):
    points = torch.randn(9, 4)
    labels, before, after, moved = gf.ops.exact_moves(points, torch.zeros(9, dtype=torch.int64), 1)
    sigma2 = (points.double() - points.double().mean(0)).square().sum(1).mean()
    assert not labels.any() and moved == 0 and after == before
    torch.testing.assert_close(before / 81, sigma2, rtol=1e-12, atol=0)
    labels, before, after, moved = gf.ops.exact_moves(points, torch.arange(9), 9)
    assert torch.equal(labels, torch.arange(9)) and before == after == moved == 0


def test_singletons_of_equal_points_merge_into_the_lowest(backend):
    labels, before, after, moved = gf.ops.exact_moves(torch.full((5, 2), 0.7), torch.tensor([4, 3, 2, 1, 0]), 6)
    assert labels.unique().numel() <= 2 and before == after == 0 and moved > 0
    labels, *_ = sweep_until_still(torch.full((5, 2), 0.7), labels, 6)
    assert labels.unique().numel() == 1


def test_no_points(backend):
    labels, before, after, moved = gf.ops.exact_moves(torch.ones(0, 3), torch.ones(0, dtype=torch.int64), 2)
    assert labels.shape == (0,) and before == after == moved == 0


def test_no_features(backend):
    labels, before, after, _ = gf.ops.exact_moves(torch.ones(4, 0), torch.tensor([1, 1, 0, 1]), 2)
    assert labels.tolist() == [1, 1, 1, 1] and before == after == 0


def test_inputs_are_left_alone(backend):
    points, labels = torch.randn(30, 3), torch.randint(0, 4, (30,))
    kept = points.clone(), labels.clone()
    out = gf.ops.exact_moves(points, labels, 4)
    assert out[3] > 0 and torch.equal(points, kept[0]) and torch.equal(labels, kept[1])


def test_the_order_depends_on_the_seed_alone(backend):
    points, labels = torch.randn(300, 6), torch.randint(0, 9, (300,))
    first = gf.ops.exact_moves(points, labels, 9, seed=3)
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    again = gf.ops.exact_moves(points, labels, 9, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(gf.ops.exact_moves(points, labels, 9, seed=4)[0], first[0])


def test_same_bits_every_time_and_on_any_number_of_threads(backend):
    n = 60 if backend == "reference" else 4000  # more than what one thread does alone
    points, labels = torch.randn(n, 17), torch.randint(0, 30, (n,))
    first = gf.ops.exact_moves(points, labels, 30)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for _ in range(4):
                assert all(torch.equal(a, b) for a, b in zip(gf.ops.exact_moves(points, labels, 30), first))
    finally:
        torch.set_num_threads(threads)


def test_strided_inputs_read_their_own_elements(backend):
    points, labels = torch.randn(80, 12), torch.randint(0, 5, (80,))
    whole = gf.ops.exact_moves(points[::2, ::3].contiguous(), labels[::2].contiguous(), 5)
    views = gf.ops.exact_moves(points[::2, ::3], labels[::2], 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, views))


P, L = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64)
NAN = torch.ones(4, 2)
NAN[1, 0], NAN[3, 1] = float("nan"), float("inf")


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((NAN, L, 2), ValueError, "NaN or Inf in 2 of 4 rows: 1, 3;"),
        ((P, torch.tensor([0, 5, 1, 0]), 3), ValueError, r"labels\[1\] = 5"),
        ((P, L.int(), 3), TypeError, "labels must be int64, got torch.int32"),
        ((P, L[:3], 3), ValueError, r"labels must be \[N\] with N=4"),
        ((P, L, -1), ValueError, "num_clusters must be at least 1, got -1"),
        ((P[0], L, 2), ValueError, "points must be a matrix"),
        ((P.long(), L, 2), TypeError, "points must be float32"),
        ((P, L.to("meta"), 2), ValueError, "labels must be on cpu"),
        ((1e200 * torch.eye(4).double(), L, 2), ValueError, "points are too large"),
    ],
)
def test_wrong_arguments_are_named(backend, args, error, message):
    with pytest.raises(error, match=message):
        gf.ops.exact_moves(*args)


def test_backward_raises(backend):
    points = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        gf.ops.exact_moves(points, torch.zeros(3, dtype=torch.int64), 2)[1].backward()


def test_opcheck():
    args = (torch.randn(6, 3), torch.tensor([0, 2, 1, 1, 0, 0]), 4, 1)
    torch.library.opcheck(torch.ops.gradclust_fast.exact_moves.default, args)
