"""Exact moves of many rows together, in Triton and CUDA: the labels are their own; these are the guarantees."""

from __future__ import annotations

import importlib

import cuda_on_host
import pytest
import torch

import gradclust_fast as gf
from gradclust_fast.reference.exact_moves import center, tie_factor
from gradclust_fast.triton_kernels import _support

MISSING = {"triton": _support.unavailable(torch.device("cpu")), "cuda": cuda_on_host.unavailable()}


@pytest.fixture(params=[name for name, reason in MISSING.items() if reason is None])
def kernel(request):
    """Forces each backend that can run here; conftest sends "cuda" to the emulator."""
    with gf.backend(request.param):
        yield request.param


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
    if gf.explain("exact_moves", points, labels, K, seed).backend == "cuda":
        return gf.ops.exact_moves(points, labels, K, seed)[0]
    labels, moves = labels.clone(), importlib.import_module("gradclust_fast.triton_kernels.exact_moves")
    only = moves.Sweep(points, labels, K, center(points), tie_factor(points.shape[1]))
    only.move(moves.pieces(labels, K, only.PIECE), only.order(seed))
    return labels


@pytest.mark.parametrize("kind", PROBLEMS)
def test_j_never_rises(kernel, kind):
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
def test_sweeps_end_where_no_single_move_lowers_j(kernel, kind):
    n, r, K = 18, 2, 3
    points, labels = PROBLEMS[kind](n, r), torch.randint(K, (n,))
    for seed in range(40):
        labels, moved = sweep(points, labels, K, seed)
        if moved == 0:
            break
    with gf.backend("reference"):
        assert gf.ops.exact_moves(points, labels, K)[3] == 0


def test_an_emptied_cluster_is_refilled_and_duplicates_cost_nothing(kernel):
    points = torch.randn(3, 2).repeat(5, 1)
    labels = torch.zeros(15, dtype=torch.int64)
    for seed in range(40):
        labels, moved = sweep(points, labels, 4, seed)
        if moved == 0:
            break
    assert moved == 0 and objective(points, labels) <= 1e-12


def test_one_at_a_time_where_all_at_once_would_rise(kernel):
    points, labels = torch.tensor([-10.0, -10, 10, 10, 0]).unsqueeze(1), torch.tensor([0, 0, 0, 0, 1])
    assert objective(points, labels) == 1600
    labels, moved = sweep(points, labels, 2)
    assert moved >= 1 and objective(points, labels) < 1600


def test_rows_that_cannot_spoil_each_other_move_together(kernel):
    points = torch.cat([torch.randn(8, 2), 100 + torch.randn(8, 2)])
    labels = torch.arange(16) // 8
    labels[[0, 1, 8, 9]] = 1 - labels[[0, 1, 8, 9]]
    labels, moved = sweep(points, labels, 2)
    assert moved == 4 and labels.tolist() == [0] * 8 + [1] * 8


def test_constant_rows_merge_in_two_sweeps(kernel):
    points, labels = torch.full((16, 2), 0.7), torch.arange(16) % 3
    labels, moved = sweep(points, labels, 3)
    assert moved > 0 and sweep(points, labels, 3)[1] <= 5


def test_more_rows_than_a_block_and_more_features_and_clusters_than_a_tile(kernel):
    points, labels = torch.randn(40, 40), torch.randint(18, (40,))
    after, moved = sweep(points, labels, 18, 5)
    assert moved > 5
    again, _ = sweep(points, labels, 18, 5)
    assert torch.equal(after, again)
    assert not torch.equal(after, sweep(points, labels, 18, 6)[0])


def test_edges(kernel):
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


@pytest.mark.skipif(any(MISSING.values()), reason=str(MISSING))
@pytest.mark.parametrize("kind", PROBLEMS)
def test_triton_and_cuda_decide_alike(monkeypatch, kind):
    cuda_on_host.emulated(monkeypatch)
    points, labels = PROBLEMS[kind](22, 2), torch.randint(3, (22,))
    found = {}
    for name in MISSING:
        with gf.backend(name):
            found[name] = gf.ops.exact_moves(points, labels, 3, -7)
    assert torch.equal(found["cuda"][0], found["triton"][0])
    torch.testing.assert_close(found["cuda"][1:3], found["triton"][1:3], rtol=1e-9, atol=0)


CUDA_SIZES = [
    pytest.param(300, 17, 12, id="several-pieces-of-a-cluster"),
    pytest.param(200, 270, 70, id="several-tiles-of-clusters-and-strips-of-features"),
    pytest.param(4200, 3, 9, id="several-tiles-of-rows"),
    pytest.param(20, 2, 50, id="more-clusters-than-rows"),
]


@pytest.mark.skipif(MISSING["cuda"] is not None, reason=str(MISSING["cuda"]))
@pytest.mark.parametrize("n, r, K", CUDA_SIZES)
def test_the_cuda_sweep_in_every_order_of_threads(monkeypatch, n, r, K):
    emulator = cuda_on_host.emulated(monkeypatch)
    points, labels = torch.randn(n, r) + 3, torch.randint(min(K, 5), (n,))
    with gf.backend("cuda"):
        after, moved = sweep(points, labels, K, 1)
        assert moved > n // 50
        for order in (1, 2):
            emulator.set_order(order)
            assert torch.equal(sweep(points, labels, K, 1)[0], after)


@pytest.mark.skipif(MISSING["cuda"] is not None, reason=str(MISSING["cuda"]))
def test_the_cuda_sweep_takes_every_dtype_and_layout(monkeypatch, dtype):
    cuda_on_host.emulated(monkeypatch)
    points, labels = torch.randn(90, 2 * 19).to(dtype)[:, ::2], torch.randint(7, (180,))[::2]
    with gf.backend("cuda"):
        after, moved = sweep(points, labels, 7, 2)
        assert moved > 5 and torch.equal(after, sweep(points.contiguous().double(), labels, 7, 2)[0])
