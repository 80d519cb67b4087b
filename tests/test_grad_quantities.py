from __future__ import annotations

import itertools

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def auxiliaries(I, O, bias=False, dtype=torch.float32, P=3, Q=4, K=5):
    return {
        "left": torch.randn(O, P, dtype=dtype),
        "right": torch.randn(I + bias, Q, dtype=dtype),
        "center_grad": torch.randn(K, O, dtype=dtype),
        "center_act": torch.randn(K, I + bias, dtype=dtype),
    }


def expected(G, aux):
    aux = {name: tensor.to(G.dtype) for name, tensor in aux.items()}
    dot = torch.einsum("boi,ko,ki->bk", G, aux["center_grad"], aux["center_act"])
    return G.square().sum((1, 2)), aux["left"].mT @ G @ aux["right"], dot


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, bias):
    act, grad = factors(B, positions, I, O, dtype)
    aux = auxiliaries(I, O, bias, accumulator(dtype))
    found = gf.ops.grad_quantities(act, grad, sqnorm=True, **aux, bias=bias)
    oracle, eager = expected(linear_grads(act, grad, bias), aux), expected(eager_grads(act, grad, bias), aux)
    for out, want, rough in zip(found, oracle, eager):
        assert out.dtype == accumulator(dtype)
        assert_close_to_oracle(out, want, rough, dtype)


@pytest.mark.parametrize("positions", [(), (6,)])
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_what_was_asked_comes_back(backend, asked, positions):
    act, grad = factors(4, positions, 10, 6, torch.float32)
    sqnorm, sketch, dot = asked
    aux = auxiliaries(10, 6)
    names = (["left", "right"] if sketch else []) + (["center_grad", "center_act"] if dot else [])
    found = gf.ops.grad_quantities(act, grad, sqnorm=sqnorm, **{name: aux[name] for name in names})
    for out, want, wanted in zip(found, expected(linear_grads(act, grad), aux), asked):
        assert (out is not None) == wanted
        if wanted:
            torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_other_side_may_be_the_identity(backend, side):
    act, grad = factors(4, (5,), 10, 6, torch.float32)
    aux = {side: auxiliaries(10, 6, True)[side]}
    found = gf.ops.grad_quantities(act, grad, **aux, sqnorm=True, bias=True)
    torch.testing.assert_close(found.sketch, gf.ops.grad_sketch(act, grad, **aux, bias=True))


def test_centres_with_a_rank_dimension(backend):
    act, grad = factors(4, (5,), 10, 6, torch.float32)
    pair = {"center_grad": torch.randn(7, 3, 6), "center_act": torch.randn(7, 3, 10)}
    found = gf.ops.grad_quantities(act, grad, sqnorm=True, **pair)
    torch.testing.assert_close(found.dot, gf.ops.grad_dot(act, grad, **pair), rtol=1e-5, atol=1e-5)


def test_many_examples_and_wide_auxiliaries(backend):
    act, grad = factors(70, (), 65, 43, torch.float32)
    aux = auxiliaries(65, 43, P=18, Q=35, K=66)
    found = gf.ops.grad_quantities(act, grad, sqnorm=True, **aux)
    oracle, eager = expected(linear_grads(act, grad), aux), expected(eager_grads(act, grad), aux)
    for out, want, rough in zip(found, oracle, eager):
        assert_close_to_oracle(out, want, rough, torch.float32)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
    aux = auxiliaries(3, 7)
    found = gf.ops.grad_quantities(act, grad, sqnorm=True, **aux)
    for out, want in zip(found, expected(linear_grads(act, grad), aux)):
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("positions", [(), (2,), (40,)])
def test_nan_stays_in_its_own_row(backend, positions):
    act, grad = factors(9, positions, 9, 8, torch.float32)
    aux = auxiliaries(9, 8)
    clean = gf.ops.grad_quantities(act, grad, sqnorm=True, **aux)
    act.view(9, -1)[1, 3] = float("nan")
    grad.view(9, -1)[4, 0] = float("inf")
    others = [0, 2, 3, 5, 6, 7, 8]
    for out, before in zip(gf.ops.grad_quantities(act, grad, sqnorm=True, **aux), clean):
        assert not out[1].isfinite().any() and not out[4].isfinite().any()
        assert torch.equal(out[others], before[others])


@pytest.mark.parametrize("positions", [(), (33,)])
def test_same_bits_every_time(backend, positions):
    act, grad = factors(19, positions, 40, 24, torch.float32)
    aux = auxiliaries(40, 24)
    first = gf.ops.grad_quantities(act, grad, sqnorm=True, **aux)
    for _ in range(5):
        assert all(map(torch.equal, gf.ops.grad_quantities(act, grad, sqnorm=True, **aux), first))


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
def test_wrong_factors_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_quantities(act, grad, sqnorm=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "was asked for nothing"),
        ({"center_act": torch.ones(2, 9)}, "center_act was given without center_grad"),
        ({"center_grad": torch.ones(2, 4)}, "center_grad was given without center_act"),
        ({"left": torch.ones(3, 2)}, r"left must be \[4, P\]"),
        ({"center_grad": torch.ones(2, 4), "center_act": torch.ones(2, 8)}, r"center_act must be \[2, 9\]"),
    ],
)
def test_wrong_questions_are_named(backend, arguments, message):
    with pytest.raises(ValueError, match=message):
        gf.ops.grad_quantities(torch.ones(3, 9), torch.ones(3, 4), **arguments)


def test_backward_raises(backend):
    found = gf.ops.grad_quantities(torch.ones(3, 2, requires_grad=True), torch.ones(3, 2), sqnorm=True)
    with pytest.raises(RuntimeError, match="not differentiable"):
        found.sqnorm.sum().backward()


@pytest.mark.parametrize("sqnorm", [True, False])
def test_opcheck(sqnorm):
    act, grad = factors(3, (6,), 5, 4, torch.float32)
    aux = auxiliaries(5, 4, True)
    torch.library.opcheck(
        torch.ops.gradclust_fast.grad_quantities.default,
        (act, grad, sqnorm, None, aux["right"], aux["center_grad"], aux["center_act"], True),
    )
