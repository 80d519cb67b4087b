from __future__ import annotations

import pytest
import torch
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

GRID = [  # B, K, R, why
    pytest.param(0, 3, 4, id="empty-batch"),
    pytest.param(1, 1, 1, id="all-ones"),
    pytest.param(3, 2, 0, id="no-features"),
    pytest.param(5, 7, 3, id="smaller-than-a-tile"),
    pytest.param(64, 16, 32, id="whole-tiles"),
    pytest.param(67, 19, 33, id="ragged-everywhere"),
    pytest.param(50, 130, 5, id="more-clusters-than-points"),
    pytest.param(300, 3, 70, id="few-clusters"),
]


def distances(points, centers, counts=None):
    out = (points.double()[:, None] - centers.double()[None]).square().sum(2)  # [B, K]
    return out if counts is None else out * (counts.double() + 1)


def eager(points, centers, counts):
    """What a user would write: the expansion in the op's dtype."""
    acc = torch.float64 if points.dtype == torch.float64 else torch.float32
    points, centers = points.to(acc), centers.to(acc)
    out = points.square().sum(1, keepdim=True) - 2 * points @ centers.T + centers.square().sum(1)
    return (out if counts is None else out * (counts.to(acc) + 1)).amin(1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("B, K, R", GRID)
def test_matches_all_distances(backend, dtype, B, K, R, weighted):
    points, centers = torch.randn(B, R).to(dtype), torch.randn(K, R).to(dtype)
    counts = torch.randint(0, 50, (K,)) if weighted else None
    label, cost = gf.ops.assign_points(points, centers, counts)
    oracle = distances(points, centers, counts)
    assert label.dtype == torch.int64 and cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(label, oracle.argmin(1))
    assert_close_to_oracle(cost, oracle.amin(1), eager(points, centers, counts), dtype)


def test_a_large_common_mean_costs_no_digits(backend):
    points, centers = 1000 + torch.randn(200, 20), 1000 + torch.randn(30, 20)
    label, cost = gf.ops.assign_points(points, centers)
    oracle = distances(points, centers)
    assert torch.equal(label, oracle.argmin(1))
    torch.testing.assert_close(cost.double(), oracle.amin(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("K, R", [(4, 3), (37, 50)])
def test_equal_centres_tie_toward_the_lowest_index(backend, dtype, K, R):
    centers = torch.randn(K, R).to(dtype)
    points = centers.repeat(3, 1) + torch.randn(3 * K, R).to(dtype) / 8
    label, cost = gf.ops.assign_points(points, torch.cat([centers, centers.flip(0), centers]))
    single = gf.ops.assign_points(points, centers)
    assert torch.equal(label, single[0]) and torch.equal(cost, single[1])


def test_a_row_equal_to_centres_is_at_distance_zero_whatever_their_sizes(backend, dtype):
    centers = (100 + torch.randn(9, 40)).to(dtype).repeat(2, 1)
    label, cost = gf.ops.assign_points(centers, centers, torch.arange(18).flip(0) * 1000)
    assert torch.equal(label, torch.arange(9).repeat(2)) and not cost.any()


def test_equal_costs_of_different_sizes_tie_toward_the_lowest_index(backend, dtype):
    # small whole numbers, so every cost is exact: 2 · 1² = 1 · (1² + 1²)
    points, centers = (torch.randint(-3, 4, (n, 2)).to(dtype) for n in (200, 15))
    counts = torch.randint(0, 4, (15,))
    label, cost = gf.ops.assign_points(points, centers, counts)
    oracle = distances(points, centers, counts)
    assert torch.equal(label, oracle.argmin(1)) and torch.equal(cost.double(), oracle.amin(1))


def test_constant_data_goes_to_cluster_zero(backend):
    label, cost = gf.ops.assign_points(torch.full((70, 5), 0.1), torch.full((20, 5), 0.1))
    assert not label.any() and not cost.any()


def test_counts_zero_and_huge(backend):
    points, centers = torch.randn(100, 8), torch.randn(12, 8)
    counts = torch.tensor([0, 10**6] * 6)
    label, cost = gf.ops.assign_points(points, centers, counts)
    oracle = distances(points, centers, counts)
    assert torch.equal(label, oracle.argmin(1))
    torch.testing.assert_close(cost.double(), oracle.amin(1), rtol=1e-6, atol=0)


def test_nan_and_inf_stay_in_their_own_rows(backend, dtype):
    points, centers = torch.randn(90, 11).to(dtype), torch.randn(21, 11).to(dtype)
    clean = gf.ops.assign_points(points, centers)
    points[3, 2], points[40, 10], points[70, 0] = float("nan"), float("inf"), float("-inf")
    label, cost = gf.ops.assign_points(points, centers)
    assert label[[3, 40, 70]].tolist() == [0, 0, 0]
    assert cost[3].isnan() and cost[40].isposinf() and cost[70].isposinf()
    others = points.isfinite().all(1)
    assert torch.equal(label[others], clean[0][others]) and torch.equal(cost[others], clean[1][others])


def test_a_nan_centre_takes_every_row(backend):
    points, centers = torch.randn(20, 11), torch.randn(21, 11)
    centers[[8, 15], 3] = float("nan")
    label, cost = gf.ops.assign_points(points, centers)
    assert (label == 8).all() and cost.isnan().all()


def test_an_infinite_centre_takes_none(backend):
    points, centers = torch.randn(20, 11), torch.randn(21, 11)
    centers[4, 3] = float("inf")
    others = torch.arange(21) != 4
    label, cost = gf.ops.assign_points(points, centers)
    without = gf.ops.assign_points(points, centers[others])
    assert torch.equal(label, torch.arange(21)[others][without[0]]) and torch.equal(cost, without[1])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_outside_float32_are_still_ordered(backend, scale):
    points, centers = torch.randn(40, 6) * scale, torch.randn(9, 6) * scale
    label, _ = gf.ops.assign_points(points, centers)
    assert torch.equal(label, distances(points, centers).argmin(1))


def test_strided_inputs_read_their_own_elements(backend):
    points, centers = torch.randn(30, 40), torch.randn(40, 9)
    whole = gf.ops.assign_points(points[::3, ::2].contiguous(), centers[::2].T.contiguous())
    views = gf.ops.assign_points(points[::3, ::2], centers[::2].T)
    assert torch.equal(views[0], whole[0]) and torch.equal(views[1], whole[1])


def test_rows_do_not_depend_on_the_batch_split(backend):
    points, centers = torch.randn(150, 12), torch.randn(20, 12)
    whole = gf.ops.assign_points(points, centers)
    for step in (49,) if backend == "triton" else (1, 49):  # the interpreter takes its time
        parts = [gf.ops.assign_points(chunk, centers) for chunk in points.split(step)]
        assert torch.equal(torch.cat([p[0] for p in parts]), whole[0])
        assert torch.equal(torch.cat([p[1] for p in parts]), whole[1])


def test_same_bits_every_time(backend):
    points, centers = torch.randn(333, 40), torch.randn(50, 40)
    first = gf.ops.assign_points(points, centers)
    for _ in range(2 if backend == "triton" else 20):
        again = gf.ops.assign_points(points, centers)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((torch.ones(3), torch.ones(2, 3)), ValueError, "points must be a matrix"),
        ((torch.ones(3, 2).int(), torch.ones(2, 2)), TypeError, "points must be float32"),
        ((torch.ones(3, 2), torch.ones(2, 3)), ValueError, r"centers must be \[K, R\] with R=2"),
        ((torch.ones(3, 2), torch.ones(0, 2)), ValueError, "K at least 1, got K=0"),
        ((torch.ones(3, 2), torch.ones(2, 2).double()), TypeError, "centers must be torch.float32"),
        ((torch.ones(3, 2), torch.ones(2, 2, device="meta")), ValueError, "centers must be on cpu"),
        ((torch.ones(3, 2), torch.ones(2, 2), torch.ones(3)), ValueError, r"counts must be \[K\] with K=2"),
        ((torch.ones(3, 2), torch.ones(2, 2), -torch.ones(2)), ValueError, r"counts\[0\] = -1"),
    ],
)
def test_wrong_arguments_are_named(backend, args, error, message):
    with pytest.raises(error, match=message):
        gf.ops.assign_points(*args)


def test_half_points_take_float32_centres(backend):
    points, centers = torch.randn(20, 6).half(), torch.randn(9, 6)
    label, _ = gf.ops.assign_points(points, centers)
    assert torch.equal(label, distances(points, centers).argmin(1))


def test_backward_raises(backend):
    points = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        gf.ops.assign_points(points, torch.ones(2, 2))[1].sum().backward()


@pytest.mark.parametrize("counts", [None, torch.arange(4)])
def test_opcheck(counts):
    args = (torch.randn(5, 3), torch.randn(4, 3), counts)
    torch.library.opcheck(torch.ops.gradclust_fast.assign_points.default, args)
