from __future__ import annotations

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, near_constant_factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf


def gram(G):
    rows = G.flatten(1)
    return rows @ rows.mT


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, bias):
    act, grad = factors(B, positions, I, O, dtype)
    out = gf.ops.grad_gram(act, grad, bias=bias)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_to_oracle(out, gram(linear_grads(act, grad, bias)), gram(eager_grads(act, grad, bias)), dtype)


@pytest.mark.parametrize("B, positions, I, O", [(150, (), 8, 12), (40, (5,), 30, 20), (67, (2,), 3, 200)])
def test_more_examples_than_a_tile_and_bit_symmetric(backend, B, positions, I, O):
    act, grad = factors(B, positions, I, O, torch.float32)
    out = gf.ops.grad_gram(act, grad)
    assert torch.equal(out, out.mT)
    assert_close_to_oracle(out, gram(linear_grads(act, grad)), gram(eager_grads(act, grad)), torch.float32)


def test_diagonal_is_the_squared_norm(backend):
    act, grad = factors(6, (7,), 20, 11, torch.float32)
    diagonal = gf.ops.grad_gram(act, grad, bias=True).diagonal()
    torch.testing.assert_close(diagonal, gf.ops.grad_sqnorm(act, grad, bias=True), rtol=1e-5, atol=0)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
    oracle = gram(linear_grads(act, grad))
    torch.testing.assert_close(gf.ops.grad_gram(act, grad).double(), oracle, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("positions", [(), (3,), (40,)])
def test_nan_stays_in_its_own_row_and_column(backend, positions):
    act, grad = factors(9, positions, 9, 8, torch.float32)
    clean = gf.ops.grad_gram(act, grad)
    act.view(9, -1)[1, 3] = float("nan")
    out = gf.ops.grad_gram(act, grad)
    others = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8])
    assert not out[1].isfinite().any() and not out[:, 1].isfinite().any()
    assert torch.equal(out[others][:, others], clean[others][:, others])


def test_near_constant_activations_do_not_cancel(backend, dtype):
    act, grad = near_constant_factors(dtype)
    oracle = gram(linear_grads(act, grad))
    error = (gf.ops.grad_gram(act, grad).double() - oracle).abs().max() / oracle.abs().max()
    assert error <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_same_bits_every_time(backend):
    act, grad = factors(9, (33,), 40, 24, torch.float32)
    first = gf.ops.grad_gram(act, grad)
    assert all(torch.equal(gf.ops.grad_gram(act, grad), first) for _ in range(5))


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
def test_wrong_factors_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_gram(act, grad)


def test_backward_raises(backend):
    out = gf.ops.grad_gram(torch.ones(3, 2, requires_grad=True), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("positions", [(), (6,)])
def test_opcheck(positions):
    act, grad = factors(3, positions, 5, 4, torch.float32)
    torch.library.opcheck(torch.ops.gradclust_fast.grad_gram.default, (act, grad, True))


def test_auto_makes_gradients_in_pieces_when_pairs_of_positions_cost_more():
    long = torch.ones(4, 400, 8), torch.ones(4, 400, 8)
    choice = gf.explain("grad_gram", *long)
    assert choice.backend == "reference" and (choice.others.get("cpu") or "").strip()
    torch.testing.assert_close(gf.ops.grad_gram(*long), gram(linear_grads(*long)).float())
