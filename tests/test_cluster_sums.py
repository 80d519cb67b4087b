from __future__ import annotations

import pytest
import torch
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

GRID = [  # N, R, K, why
    pytest.param(0, 3, 2, id="no-points"),
    pytest.param(1, 1, 1, id="all-ones"),
    pytest.param(6, 0, 3, id="no-features"),
    pytest.param(40, 7, 5, id="ragged"),
    pytest.param(10, 33, 64, id="more-clusters-than-points"),
    pytest.param(9000, 5, 2, id="long-clusters"),
]


def oracle(points, labels, K):
    sums = torch.zeros(K, points.shape[1], dtype=torch.float64)
    counts = torch.zeros(K, dtype=torch.int64)
    for x, k in zip(points.double(), labels.tolist()):
        sums[k] += x
        counts[k] += 1
    return sums, counts


def eager(points, labels, K):
    acc = torch.float64 if points.dtype == torch.float64 else torch.float32
    return torch.zeros(K, points.shape[1], dtype=acc).index_add_(0, labels, points.to(acc))


@pytest.mark.parametrize("N, R, K", GRID)
def test_matches_one_row_at_a_time(backend, dtype, N, R, K):
    points, labels = torch.randn(N, R).to(dtype), torch.randint(0, K, (N,))
    sums, counts = gf.ops.cluster_sums(points, labels, K)
    expected, expected_counts = oracle(points, labels, K)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert counts.dtype == torch.int64 and torch.equal(counts, expected_counts)
    assert_close_to_oracle(sums, expected, eager(points, labels, K), dtype)


def test_empty_clusters_are_zeros(backend):
    sums, counts = gf.ops.cluster_sums(torch.randn(5, 3), torch.tensor([1, 1, 3, 3, 1]), 6)
    assert counts.tolist() == [0, 3, 0, 2, 0, 0]
    assert not sums[[0, 2, 4, 5]].any()


def test_a_large_common_mean_costs_no_digits(backend):
    points = 1000 + torch.randn(20000, 2)
    sums, _ = gf.ops.cluster_sums(points, torch.zeros(20000, dtype=torch.int64), 1)
    torch.testing.assert_close(sums[0].double(), points.double().sum(0), rtol=1e-7, atol=0)


def test_nan_stays_in_its_own_cluster_and_column(backend):
    points, labels = torch.randn(30, 4), torch.arange(30) % 5
    clean, _ = gf.ops.cluster_sums(points, labels, 5)
    points[7, 2] = float("nan")
    sums, _ = gf.ops.cluster_sums(points, labels, 5)
    assert sums[2, 2].isnan()
    sums[2, 2] = clean[2, 2]
    assert torch.equal(sums, clean)


def test_strided_inputs_read_their_own_elements(backend):
    points, labels = torch.randn(20, 9), torch.randint(0, 3, (20,))
    whole = gf.ops.cluster_sums(points[::2, ::2].contiguous(), labels[::2].contiguous(), 3)
    views = gf.ops.cluster_sums(points[::2, ::2], labels[::2], 3)
    assert torch.equal(views[0], whole[0]) and torch.equal(views[1], whole[1])


def test_same_bits_every_time_and_on_any_number_of_threads(backend):
    points, labels = torch.randn(20000, 6) * torch.rand(20000, 1).exp2(), torch.randint(0, 3, (20000,))
    first, _ = gf.ops.cluster_sums(points, labels, 3)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(gf.ops.cluster_sums(points, labels, 3)[0], first) for _ in range(5))
    finally:
        torch.set_num_threads(threads)


P = torch.ones(4, 2)


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((P, torch.tensor([0, 1, 3, -1]), 3), ValueError, r"labels\[2\] = 3"),
        ((P, torch.tensor([0, -1, 3, 1]), 3), ValueError, r"labels must lie in \[0, 3\), got labels\[1\] = -1"),
        ((P, torch.zeros(4), 3), TypeError, "labels must be int64, got torch.float32"),
        ((P, torch.zeros(3).long(), 3), ValueError, r"labels must be \[N\] with N=4"),
        ((P, torch.zeros(4).long(), 0), ValueError, "num_clusters must be at least 1, got 0"),
        ((P[0], torch.zeros(4).long(), 1), ValueError, "points must be a matrix"),
        ((P.int(), torch.zeros(4).long(), 1), TypeError, "points must be float32"),
        ((P, torch.zeros(4, device="meta").long(), 1), ValueError, "labels must be on cpu"),
    ],
)
def test_wrong_arguments_are_named(backend, args, error, message):
    with pytest.raises(error, match=message):
        gf.ops.cluster_sums(*args)


def test_backward_raises(backend):
    points = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        gf.ops.cluster_sums(points, torch.zeros(3, dtype=torch.int64), 1)[0].sum().backward()


def test_opcheck():
    args = (torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0]), 4)
    torch.library.opcheck(torch.ops.gradclust_fast.cluster_sums.default, args)
