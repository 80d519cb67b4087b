from __future__ import annotations

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf


def sides(I, O, P, Q, bias, dtype=torch.float32):
    left = None if P is None else torch.randn(O, P, dtype=dtype)
    right = None if Q is None else torch.randn(I + bias, Q, dtype=dtype)
    return left, right


def project(G, left, right):
    G = G if left is None else left.to(G.dtype).mT @ G
    return G if right is None else G @ right.to(G.dtype)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize(
    "P, Q, bias", [(4, 3, False), (4, 3, True), (None, 17, True), (9, None, True), (None, None, True)]
)
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, P, Q, bias):
    act, grad = factors(B, positions, I, O, dtype)
    left, right = sides(I, O, P, Q, bias, accumulator(dtype))
    out = gf.ops.grad_sketch(act, grad, left, right, bias=bias)
    assert out.dtype == accumulator(dtype)
    oracle = project(linear_grads(act, grad, bias), left, right)
    assert_close_to_oracle(out, oracle, project(eager_grads(act, grad, bias), left, right), dtype)


def test_sides_wider_than_a_tile(backend):
    act, grad = factors(2, (9,), 40, 30, torch.float32)
    left, right = sides(40, 30, 67, 35, False)
    oracle = project(linear_grads(act, grad), left, right)
    assert_close_to_oracle(
        gf.ops.grad_sketch(act, grad, left, right), oracle, project(eager_grads(act, grad), left, right), torch.float32
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_sides_in_the_factors_half_type(backend, half):
    act, grad = factors(3, (4,), 12, 8, half)
    left, right = (side.to(half) for side in sides(12, 8, 3, 2, False))
    same = gf.ops.grad_sketch(act, grad, left.float(), right.float())
    assert torch.equal(gf.ops.grad_sketch(act, grad, left, right), same)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
    left, right = torch.randn(2, 7).mT, torch.randn(6, 3)[::2]
    oracle = project(linear_grads(act, grad), left, right)
    torch.testing.assert_close(gf.ops.grad_sketch(act, grad, left, right).double(), oracle, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [(), (2,), (40,)])
def test_nan_stays_in_its_own_row(backend, positions):
    act, grad = factors(9, positions, 9, 8, torch.float32)
    left, right = sides(9, 8, 3, 5, False)
    clean = gf.ops.grad_sketch(act, grad, left, right)
    act.view(9, -1)[1, 3] = float("nan")
    grad.view(9, -1)[4, 0] = float("inf")
    out = gf.ops.grad_sketch(act, grad, left, right)
    assert not out[1].isfinite().any() and not out[4].isfinite().any()
    others = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[others], clean[others])


def test_same_bits_every_time(backend):
    act, grad = factors(9, (33,), 40, 24, torch.float32)
    left, right = sides(40, 24, 5, 6, False)
    first = gf.ops.grad_sketch(act, grad, left, right)
    assert all(torch.equal(gf.ops.grad_sketch(act, grad, left, right), first) for _ in range(5))


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
def test_wrong_factors_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_sketch(act, grad)


@pytest.mark.parametrize(
    "left, right, bias, error, message",
    [
        (torch.ones(8, 2), None, False, ValueError, r"left must be \[4, P\] \(grad's features\), got \[8, 2\]"),
        (None, torch.ones(9), False, ValueError, r"right must be \[9, Q\] \(act's features\), got \[9\]"),
        (None, torch.ones(9, 2), True, ValueError, r"right must be \[10, Q\] \(act's features plus one for the bias\)"),
        (torch.ones(4, 2).double(), None, False, TypeError, "left must be torch.float32 for torch.float32 factors"),
        (None, torch.ones(9, 2, device="meta"), False, ValueError, "right must be on cpu like act, got meta"),
    ],
)
def test_wrong_sides_are_named(backend, left, right, bias, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_sketch(torch.ones(3, 9), torch.ones(3, 4), left, right, bias=bias)


def test_backward_raises(backend):
    out = gf.ops.grad_sketch(torch.ones(3, 2, requires_grad=True), torch.ones(3, 2), torch.ones(2, 1))
    with pytest.raises(RuntimeError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("P, Q", [(3, 2), (None, 2), (3, None), (None, None)])
def test_opcheck(P, Q):
    act, grad = factors(3, (6,), 5, 4, torch.float32)
    torch.library.opcheck(torch.ops.gradclust_fast.grad_sketch.default, (act, grad, *sides(5, 4, P, Q, True), True))
