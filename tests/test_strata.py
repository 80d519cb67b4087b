from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import gradclust_fast as gf
from gradclust_fast.allocation import FixedSize, allocate, water_fill


def test_counts_labels_and_empty_strata():
    strata = gf.Strata(np.array([3, 0, 0, 3, 1], dtype=np.int32), 5)
    assert strata.labels.dtype == torch.int64 and strata.labels.tolist() == [3, 0, 0, 3, 1]
    assert strata.counts.tolist() == [2, 1, 0, 2, 0]
    assert len(strata) == 5 and strata.num_clusters == 5


def test_labels_are_copied():
    labels = torch.tensor([0, 1])
    strata = gf.Strata(labels, 2)
    labels[0] = 1
    assert strata.labels.tolist() == [0, 1]


def test_statistics_of_points_match_their_definitions():
    points, labels = torch.randn(40, 6) + 1000, torch.randint(0, 5, (40,))
    strata = gf.Strata.from_points(points, labels, 7)
    x = points.double()
    J = 0.0
    for k in range(7):
        own = x[labels == k]
        if not len(own):
            assert strata.variance[k] == 0
            continue
        expected = (own - own.mean(0)).square().sum(1).mean()
        torch.testing.assert_close(strata.variance[k], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(strata.means[k], own.mean(0))
        J += 0.5 * sum((a - b).square().sum() for a in own for b in own)
    assert strata.distortion == pytest.approx(float(J), rel=1e-9)


@pytest.mark.parametrize(
    "values, labels, J",
    [([0, 1, 2, 3, 4, 9], [0, 0, 0, 1, 1, 1], None), ([-1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 1], 4.0)],
)
def test_distortion_known_answers(values, labels, J):
    points = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    best = min(
        gf.Strata.from_points(points, torch.tensor(split), 2).distortion
        for split in itertools.product([0, 1], repeat=len(values))
    )
    assert best == pytest.approx(45.0 if J is None else J)
    if J is not None:
        assert gf.Strata.from_points(points, labels, 2).distortion == pytest.approx(J)


def test_total_variance_splits_into_within_and_between():
    points, labels = torch.randn(50, 4, dtype=torch.float64), torch.randint(0, 6, (50,))
    strata = gf.Strata.from_points(points, labels, 6)
    share = strata.counts / 50
    mean = points.mean(0)
    between = (share * (strata.means - mean).square().sum(1)).sum()
    total = (points - mean).square().sum(1).mean()
    torch.testing.assert_close((share * strata.variance).sum() + between, total)


def test_state_dict_round_trip(tmp_path):
    strata = gf.Strata.from_points(torch.randn(9, 2), torch.arange(9) % 3, 4)
    torch.save(strata.state_dict(), tmp_path / "strata.pt")
    state = torch.load(tmp_path / "strata.pt", weights_only=True)
    other = gf.Strata([0], 1)
    other.load_state_dict(state)
    for copy in (gf.Strata.from_state_dict(state), other):
        for name in ("labels", "counts", "variance", "means"):
            assert torch.equal(getattr(copy, name), getattr(strata, name))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: gf.Strata([0, 1, 4], 3), ValueError, r"labels\[2\] is 4, outside 0\.\.2"),
        (lambda: gf.Strata([0, -1], 3), ValueError, r"labels\[1\] is -1"),
        (lambda: gf.Strata([0.0, 1.0], 3), TypeError, "must be integers"),
        (lambda: gf.Strata([[0], [1]], 3), ValueError, r"labels must be \[N\], got \[2, 1\]"),
        (lambda: gf.Strata([], 3), ValueError, "empty"),
        (lambda: gf.Strata([0], 0), ValueError, "num_clusters must be at least 1, got 0"),
        (lambda: gf.Strata(["a", "b"], 2), TypeError, r"labels must be \[N\] integers, got list"),
        (lambda: gf.Strata(None, 2), TypeError, r"labels must be \[N\] integers, got NoneType"),
        (lambda: gf.Strata([0], 2.0), TypeError, "num_clusters must be an integer"),
        (lambda: gf.Strata([0], 2, variance=[1.0]), ValueError, r"variance must be \[2\]"),
        (lambda: gf.Strata([0], 1, variance=[-1.0]), ValueError, r"variance\[0\] is -1"),
        (lambda: gf.Strata([0], 2, variance=[1.0, float("nan")]), ValueError, r"variance\[1\] is not finite"),
        (lambda: gf.Strata([0], 1, means=[1.0]), ValueError, r"means must be \[1, R\]"),
        (lambda: gf.Strata.from_points(torch.ones(3, 2), [0, 1], 2), ValueError, r"points must be \[N, R\] with N=2"),
        (lambda: gf.Strata([0], 1).distortion, ValueError, "carry no variances"),
        (lambda: gf.Strata.from_state_dict({"labels": [0]}), ValueError, "num_clusters"),
    ],
)
def test_wrong_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


# --- allocation


def reference_water_fill(share, low, high, total):
    below, above = 0.0, 1e9
    for _ in range(300):
        middle = (below + above) / 2
        below, above = (middle, above) if np.clip(middle * share, low, high).sum() < total else (below, middle)
    return np.clip(above * share, low, high)


def test_water_fill_meets_the_total_within_bounds():
    rng = np.random.default_rng(0)
    for _ in range(200):
        M = rng.integers(1, 9)
        share, low = rng.random(M) + 1e-3, rng.random(M)
        high = low + rng.random(M)
        total = low.sum() + rng.random() * (high - low).sum()
        np.testing.assert_allclose(
            water_fill(share, low, high, total), reference_water_fill(share, low, high, total), rtol=1e-9
        )


@pytest.mark.parametrize("allocation", ["equal", "proportional", "neyman"])
@pytest.mark.parametrize("replacement", [False, True])
def test_allocations_are_full_and_within_bounds(allocation, replacement):
    rng = np.random.default_rng(1)
    for _ in range(300):
        K = rng.integers(1, 8)
        counts = rng.integers(0, 9, size=K)
        counts[rng.integers(K)] += 1
        variance = rng.random(K) * rng.integers(0, 2, size=K)
        filled = int((counts > 0).sum())
        B = int(rng.integers(filled, counts.sum() + 1)) + (int(rng.integers(0, 20)) if replacement else 0)
        m = allocate(counts, B, allocation, replacement, variance)
        assert m.sum() == B
        assert ((m >= 1) == (counts > 0)).all()
        assert replacement or (m <= counts).all()


def best_neyman(counts, variance, B, replacement):
    """The m with the least variance among all, by enumeration."""

    def value(m):
        total = 0.0
        for n, v, k in zip(counts, variance, m):
            total += n**2 * v / k * (1 if replacement else (n - k) / max(n - 1, 1))
        return total

    choices = [range(1, (B if replacement else n) + 1) for n in counts]
    return min(value(m) for m in itertools.product(*choices) if sum(m) == B), value


@pytest.mark.parametrize("replacement", [False, True])
def test_neyman_is_close_to_the_best_integers(replacement):
    rng = np.random.default_rng(2)
    for _ in range(30):
        counts, variance = rng.integers(2, 7, size=3), rng.random(3)
        B = int(rng.integers(6, 10)) if replacement else int(min(rng.integers(4, 9), counts.sum() - 1))
        best, value = best_neyman(counts, variance, B, replacement)
        ours = value(allocate(counts, B, "neyman", replacement, variance))
        assert ours <= 1.15 * best + 1e-12  # rounding by largest remainder, not by variance


def test_neyman_beats_proportional_beats_uniform_for_real_shares():
    rng = np.random.default_rng(3)
    for _ in range(100):
        counts, variance, B = rng.integers(1, 50, size=6).astype(float), rng.random(6), 12
        N, share = counts.sum(), counts * np.sqrt(variance)
        neyman = (counts**2 * variance / (B * share / share.sum())).sum() / N**2
        proportional = (counts**2 * variance / (B * counts / N)).sum() / N**2
        assert neyman <= proportional * (1 + 1e-12)
        assert proportional == pytest.approx((counts / N * variance).sum() / B)  # ≤ σ²/B, the rest is between strata


def test_known_allocations():
    counts = np.array([50, 30, 20])
    assert allocate(counts, 10, "proportional", False, None).tolist() == [5, 3, 2]
    assert allocate(counts, 10, "equal", False, None).tolist() == [4, 3, 3]  # ties toward the lowest index
    assert allocate(np.array([2, 30, 20]), 10, "equal", False, None).tolist() == [2, 4, 4]  # capped, redistributed
    assert allocate(np.array([1000, 1, 1]), 10, "proportional", False, None).tolist() == [8, 1, 1]
    assert allocate(counts, 10, "neyman", True, np.array([0.0, 4.0, 9.0])).tolist() == [1, 5, 4]
    assert allocate(counts, 10, "neyman", True, np.zeros(3)).tolist() == [5, 3, 2]


# --- strata drawn with given probabilities


def test_fixed_size_design_is_exact_by_enumeration():
    rng = np.random.default_rng(4)
    for trial in range(60):
        M = int(rng.integers(2, 7))
        n = int(rng.integers(1, M))
        sizes = rng.integers(1, [3, 10, 10**6][trial % 3], size=M).astype(float)
        pi = water_fill(sizes, np.zeros(M), np.full(M, 0.999), n)
        design = FixedSize(pi)
        joint, total = np.zeros((M, M)), 0.0
        for chosen in itertools.combinations(range(M), n):  # independent coins, given n heads
            p = np.prod(np.where(np.isin(np.arange(M), chosen), design.coin, 1 - design.coin))
            joint[np.ix_(chosen, chosen)] += p
            total += p
        np.testing.assert_allclose(np.diag(joint / total), pi, rtol=1e-9)
        covariance = joint / total - np.outer(pi, pi)
        own, weight, basis = design.covariance()
        np.testing.assert_allclose(np.diag(own) + (basis * weight) @ basis.T, covariance, atol=1e-9)


def test_fixed_size_design_draws_with_its_probabilities():
    pi = np.array([0.9, 0.5, 0.3, 0.2, 0.1])
    design, rng, M = FixedSize(pi), np.random.default_rng(5), 20_000
    hits = np.zeros(5)
    for _ in range(M):
        chosen = design.draw(rng)
        assert len(chosen) == 2
        hits[chosen] += 1
    assert (np.abs(hits / M - pi) <= 4.5 * np.sqrt(pi * (1 - pi) / M)).all()  # false alarm below 1e-5 per unit


def test_fixed_size_design_stays_exact_for_many_units():
    rng = np.random.default_rng(6)
    sizes = np.floor(rng.pareto(1.2, size=600) * 10 + 1)
    pi = water_fill(sizes, np.zeros(600), np.full(600, 0.99), 100)
    design = FixedSize(pi)
    own, weight, basis = design.covariance()
    covariance = np.diag(own) + (basis * weight) @ basis.T
    np.testing.assert_allclose(covariance.sum(1), 0, atol=1e-10)  # the size is fixed
    np.testing.assert_allclose(np.diag(covariance), pi * (1 - pi), rtol=1e-9)
    assert len(weight) <= 8


def test_points_may_be_lists_and_carry_a_graph():
    strata = gf.Strata.from_points([[0.0], [2.0], [5.0]], [0, 0, 1], 2)
    graph = gf.Strata.from_points(torch.tensor([[0.0], [2.0], [5.0]], requires_grad=True), [0, 0, 1], 2)
    assert strata.distortion == graph.distortion == 4.0
    assert not graph.means.requires_grad
