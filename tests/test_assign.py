from __future__ import annotations

import pytest
import torch
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

GRID = [  # B, K, why
    pytest.param(0, 3, id="empty-batch"),
    pytest.param(1, 1, id="one-cluster"),
    pytest.param(5, 2, id="fewer-clusters-than-lanes"),
    pytest.param(33, 8, id="one-vector"),
    pytest.param(7, 67, id="ragged-vectors"),
    pytest.param(300, 19, id="many-examples"),
]


def problem(B, K, dtype):
    """Inner products of real vectors, so that distances are distances."""
    g, c = torch.randn(B, 6), torch.randn(K, 6)
    return (g @ c.T).to(dtype), c.square().sum(1).to(dtype), g.square().sum(1).to(dtype)


def costs(dot, center_sqnorm, grad_sqnorm, counts, dtype=torch.float64):
    weight = 1 if counts is None else counts.to(dtype) + 1
    return weight * (center_sqnorm.to(dtype) - 2 * dot.to(dtype) + grad_sqnorm.to(dtype)[:, None])


@pytest.mark.parametrize("weighted", [None, "integers", "averages"])
@pytest.mark.parametrize("B, K", GRID)
def test_matches_the_rule(backend, dtype, B, K, weighted):
    args = problem(B, K, dtype)
    counts = {None: None, "integers": torch.randint(0, 50, (K,)), "averages": 40 * torch.rand(K)}[weighted]
    label, cost = gf.ops.assign(*args, counts)
    oracle = costs(*args, counts)
    assert label.dtype == torch.int64 and label.shape == (B,)
    assert cost.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eager = costs(*args, counts, cost.dtype)
    assert_close_to_oracle(cost, oracle.amin(1), eager.amin(1), dtype)
    assert_close_to_oracle(oracle.gather(1, label[:, None])[:, 0], oracle.amin(1), eager.amin(1), dtype)


def test_all_backends_agree_bit_for_bit(backend, dtype):
    args = (*problem(200, 23, dtype), torch.randint(0, 9, (23,)))
    label, cost = gf.ops.assign(*args)
    with gf.backend("reference"):
        expected = gf.ops.assign(*args)
    assert torch.equal(label, expected[0]) and torch.equal(cost, expected[1])


def test_grad_sqnorm_changes_the_choice_under_weights(backend):
    dot, center_sqnorm, counts = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([1.0, 4.0]), torch.tensor([0, 1])
    # costs 1·(1 + s) against 2·(2 + s): dropping s would be indifferent to its size
    label, cost = gf.ops.assign(dot, center_sqnorm, torch.tensor([10.0, 0.0]), counts)
    assert label.tolist() == [0, 0] and cost.tolist() == [11.0, 1.0]
    label, _ = gf.ops.assign(dot, torch.tensor([5.0, 4.0]), torch.tensor([10.0, 0.5]), counts)
    assert label.tolist() == [0, 1]


@pytest.mark.parametrize("K", [2, 9, 40])
def test_ties_go_to_the_lowest_index(backend, K):
    dot = torch.ones(4, K)
    dot[1, 1:] = 2
    label, _ = gf.ops.assign(dot, torch.full((K,), 9.0), torch.ones(4))
    assert label.tolist() == [0, 1, 0, 0]


def test_infinite_distances_tie_too(backend):
    label, cost = gf.ops.assign(torch.zeros(2, 3), torch.full((3,), float("inf")), torch.ones(2))
    assert label.tolist() == [0, 0] and cost.isinf().all()


def test_nan_is_named_by_its_lowest_cluster_and_stays_in_its_row(backend):
    dot, center_sqnorm, grad_sqnorm = problem(6, 21, torch.float32)
    clean = gf.ops.assign(dot, center_sqnorm, grad_sqnorm)
    dot[1, 17] = dot[1, 20] = float("nan")
    grad_sqnorm[4] = float("nan")
    label, cost = gf.ops.assign(dot, center_sqnorm, grad_sqnorm)
    assert label[1] == 17 and label[4] == 0 and cost[[1, 4]].isnan().all()
    others = [0, 2, 3, 5]
    assert torch.equal(label[others], clean[0][others]) and torch.equal(cost[others], clean[1][others])


def test_strided_inputs_read_their_own_elements(backend):
    dot, center_sqnorm, grad_sqnorm = problem(8, 12, torch.float32)
    whole = gf.ops.assign(dot[::2, 1::3].contiguous(), center_sqnorm[1::3].clone(), grad_sqnorm[::2].clone())
    views = gf.ops.assign(dot[::2, 1::3], center_sqnorm[1::3], grad_sqnorm[::2])
    transposed = gf.ops.assign(dot.T.contiguous().T[::2, 1::3], center_sqnorm[1::3], grad_sqnorm[::2])
    for out in (views, transposed):
        assert torch.equal(out[0], whole[0]) and torch.equal(out[1], whole[1])


def test_same_bits_every_time(backend):
    args = problem(500, 50, torch.float32)
    first = gf.ops.assign(*args)
    for _ in range(3 if backend == "triton" else 20):
        again = gf.ops.assign(*args)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


OK = (torch.ones(3, 2), torch.ones(2), torch.ones(3))


@pytest.mark.parametrize(
    "args, error, message",
    [
        ((torch.ones(3, 0), torch.ones(0), torch.ones(3)), ValueError, "K at least 1, got K=0"),
        ((torch.ones(3), torch.ones(2), torch.ones(3)), ValueError, r"dot must be \[B, K\]"),
        ((torch.ones(3, 2).long(), torch.ones(2), torch.ones(3)), TypeError, "dot must be float32"),
        ((torch.ones(3, 2), torch.ones(3), torch.ones(3)), ValueError, r"center_sqnorm must be \[K\] with K=2"),
        ((torch.ones(3, 2), torch.ones(2), torch.ones(2)), ValueError, r"grad_sqnorm must be \[B\] with B=3"),
        ((torch.ones(3, 2), torch.ones(2).double(), torch.ones(3)), TypeError, "center_sqnorm must be torch.float32"),
        ((torch.ones(3, 2), torch.ones(2), torch.ones(3).half()), TypeError, "grad_sqnorm must be torch.float32"),
        ((*OK, torch.ones(3)), ValueError, r"counts must be \[K\] with K=2"),
        ((*OK, torch.tensor([0, -1])), ValueError, r"counts\[1\] = -1"),
        ((*OK, torch.tensor([float("nan"), 1])), ValueError, r"counts\[0\] = nan"),
        ((*OK, torch.tensor([True, False])), TypeError, "counts must be integers or floats"),
        ((torch.ones(3, 2), torch.ones(2, device="meta"), torch.ones(3)), ValueError, "center_sqnorm must be on cpu"),
    ],
)
def test_wrong_arguments_are_named(backend, args, error, message):
    with pytest.raises(error, match=message):
        gf.ops.assign(*args)


def test_half_inputs_take_float32_norms(backend):
    dot, center_sqnorm, grad_sqnorm = problem(5, 4, torch.bfloat16)
    out = gf.ops.assign(dot, center_sqnorm.float(), grad_sqnorm.float())
    assert torch.equal(out[1], gf.ops.assign(dot, center_sqnorm, grad_sqnorm)[1])


def test_backward_raises(backend):
    dot = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        gf.ops.assign(dot, torch.ones(2), torch.ones(3))[1].sum().backward()


@pytest.mark.parametrize("counts", [None, torch.arange(4)])
def test_opcheck(counts):
    torch.library.opcheck(torch.ops.gradclust_fast.assign.default, (*problem(5, 4, torch.float32), counts))
