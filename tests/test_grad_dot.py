from __future__ import annotations

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def centers(K, I, O, bias=False, rank=None, dtype=torch.float32):
    middle = () if rank is None else (rank,)
    return torch.randn(K, *middle, O, dtype=dtype), torch.randn(K, *middle, I + bias, dtype=dtype)


def dots(G, center_grad, center_act):
    """⟨G_b, C_k⟩ with C_k as a matrix."""
    if center_grad.dim() == 2:
        center_grad, center_act = center_grad[:, None], center_act[:, None]
    C = torch.einsum("kro,kri->koi", center_grad.to(G.dtype), center_act.to(G.dtype))
    return torch.einsum("boi,koi->bk", G, C)


@pytest.mark.parametrize(
    "K, rank, bias", [(5, None, False), (1, None, True), (37, None, True), (3, 2, True), (0, None, False)]
)
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, K, rank, bias):
    act, grad = factors(B, positions, I, O, dtype)
    pair = centers(K, I, O, bias, rank, accumulator(dtype))
    out = gf.ops.grad_dot(act, grad, *pair, bias=bias)
    assert out.dtype == accumulator(dtype)
    assert_close_to_oracle(
        out, dots(linear_grads(act, grad, bias), *pair), dots(eager_grads(act, grad, bias), *pair), dtype
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_centers_in_the_factors_half_type(backend, half):
    act, grad = factors(3, (4,), 12, 8, half)
    pair = [center.to(half) for center in centers(5, 12, 8)]
    same = gf.ops.grad_dot(act, grad, *(center.float() for center in pair))
    assert torch.equal(gf.ops.grad_dot(act, grad, *pair), same)


def test_own_factors_as_centre_give_the_squared_norm(backend):
    act, grad = factors(6, (7,), 20, 11, torch.float32)
    own = gf.ops.grad_dot(act, grad, grad, act).diagonal()
    torch.testing.assert_close(own, gf.ops.grad_sqnorm(act, grad), rtol=1e-5, atol=0)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
    pair = torch.randn(7, 5).mT, torch.randn(10, 3)[::2]
    oracle = dots(linear_grads(act, grad), *pair)
    torch.testing.assert_close(gf.ops.grad_dot(act, grad, *pair).double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [(), (2,), (40,)])
def test_nan_stays_in_its_own_row(backend, positions):
    act, grad = factors(9, positions, 9, 8, torch.float32)
    pair = centers(5, 9, 8)
    clean = gf.ops.grad_dot(act, grad, *pair)
    act.view(9, -1)[1, 3] = float("nan")
    grad.view(9, -1)[4, 0] = float("inf")
    out = gf.ops.grad_dot(act, grad, *pair)
    assert not out[1].isfinite().any() and not out[4].isfinite().any()
    others = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], clean[others])


def test_same_bits_every_time(backend):
    act, grad = factors(9, (33,), 40, 24, torch.float32)
    pair = centers(19, 40, 24)
    first = gf.ops.grad_dot(act, grad, *pair)
    assert all(torch.equal(gf.ops.grad_dot(act, grad, *pair), first) for _ in range(5))


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
def test_wrong_factors_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_dot(act, grad, *centers(3, 2, 2))


@pytest.mark.parametrize(
    "center_grad, center_act, bias, error, message",
    [
        (torch.ones(8, 5), torch.ones(8, 9), False, ValueError, r"center_grad must be \[K, 4\] or \[K, r, 4\]"),
        (torch.ones(8, 4), torch.ones(7, 9), False, ValueError, r"center_act must be \[8, 9\] .*got \[7, 9\]"),
        (torch.ones(8, 2, 4), torch.ones(8, 9), False, ValueError, r"center_act must be \[8, 2, 9\]"),
        (torch.ones(8, 4), torch.ones(8, 9), True, ValueError, r"center_act must be \[8, 10\] .*constant 1"),
        (torch.ones(8, 4).double(), torch.ones(8, 9), False, TypeError, "center_grad must be torch.float32"),
    ],
)
def test_wrong_centers_are_named(backend, center_grad, center_act, bias, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_dot(torch.ones(3, 9), torch.ones(3, 4), center_grad, center_act, bias=bias)


def test_backward_raises(backend):
    out = gf.ops.grad_dot(torch.ones(3, 2, requires_grad=True), torch.ones(3, 2), *centers(4, 2, 2))
    with pytest.raises(RuntimeError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("rank", [None, 3])
def test_opcheck(rank):
    act, grad = factors(3, (6,), 5, 4, torch.float32)
    torch.library.opcheck(torch.ops.gradclust_fast.grad_dot.default, (act, grad, *centers(2, 5, 4, True, rank), True))
