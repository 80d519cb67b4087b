from __future__ import annotations

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, near_constant_factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, bias):
    act, grad = factors(B, positions, I, O, dtype)
    first, second = gf.ops.grad_moments(act, grad, bias=bias)
    assert first.dtype == second.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    G, eager = linear_grads(act, grad, bias), eager_grads(act, grad, bias)
    assert_close_to_oracle(first, G.sum(0), eager.sum(0), dtype)
    assert_close_to_oracle(second, G.square().sum(0), eager.square().sum(0), dtype)


@pytest.mark.parametrize("positions", [(), (5,)])
def test_many_examples(backend, positions):
    act, grad = factors(301, positions, 45, 37, torch.float32)
    first, second = gf.ops.grad_moments(act, grad)
    G, eager = linear_grads(act, grad), eager_grads(act, grad)
    assert_close_to_oracle(first, G.sum(0), eager.sum(0), torch.float32)
    assert_close_to_oracle(second, G.square().sum(0), eager.square().sum(0), torch.float32)


def test_second_moments_add_up_to_the_squared_norms(backend):
    act, grad = factors(6, (7,), 20, 11, torch.float32)
    _, second = gf.ops.grad_moments(act, grad, bias=True)
    torch.testing.assert_close(second.sum(), gf.ops.grad_sqnorm(act, grad, bias=True).sum(), rtol=1e-5, atol=0)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
    first, second = gf.ops.grad_moments(act, grad)
    G = linear_grads(act, grad)
    torch.testing.assert_close(first.double(), G.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.double(), G.square().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [(), (3,)])
def test_nan_reaches_only_the_coordinates_it_enters(backend, positions):
    act, grad = factors(4, positions, 40, 24, torch.float32)
    clean = gf.ops.grad_moments(act, grad)
    act[(2, *[1] * len(positions), 5)] = float("nan")
    rest = torch.arange(40) != 5
    for out, before in zip(gf.ops.grad_moments(act, grad), clean):
        assert out[:, 5].isnan().all()
        assert torch.equal(out[:, rest], before[:, rest])


def test_near_constant_activations_do_not_cancel(backend, dtype):
    act, grad = near_constant_factors(dtype)
    first, second = gf.ops.grad_moments(act, grad)
    G, eager = linear_grads(act, grad), eager_grads(act, grad)
    assert_close_to_oracle(first, G.sum(0), eager.sum(0), dtype)
    assert_close_to_oracle(second, G.square().sum(0), eager.square().sum(0), dtype)


@pytest.mark.parametrize("positions", [(), (33,)])
def test_same_bits_every_time(backend, positions):
    act, grad = factors(29, positions, 40, 24, torch.float32)
    first = gf.ops.grad_moments(act, grad)
    for _ in range(5):
        assert all(map(torch.equal, gf.ops.grad_moments(act, grad), first))


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
def test_wrong_factors_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_moments(act, grad)


def test_backward_raises(backend):
    _, second = gf.ops.grad_moments(torch.ones(3, 2, requires_grad=True), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="not differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("positions", [(), (6,)])
def test_opcheck(positions):
    act, grad = factors(3, positions, 5, 4, torch.float32)
    torch.library.opcheck(torch.ops.gradclust_fast.grad_moments.default, (act, grad, True))
