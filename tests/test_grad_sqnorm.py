from __future__ import annotations

import pytest
import torch
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

GRID = [  # B, positions, I, O, why
    pytest.param(0, (), 3, 2, id="empty-batch"),
    pytest.param(1, (), 1, 1, id="all-ones"),
    pytest.param(5, (), 37, 19, id="vector-ragged"),
    pytest.param(3, (1,), 129, 65, id="one-position"),
    pytest.param(3, (0,), 4, 5, id="no-positions"),
    pytest.param(4, (7,), 33, 17, id="sequence-gram"),
    pytest.param(2, (67,), 5, 9, id="sequence-direct"),
    pytest.param(2, (3, 5), 16, 32, id="two-position-dims"),
    pytest.param(2, (70,), 130, 66, id="several-tiles"),
]


def eager_sqnorm(act, grad, bias):
    T = act.shape[1:-1].numel()
    act, grad = act.reshape(act.shape[0], T, act.shape[-1]), grad.reshape(grad.shape[0], T, grad.shape[-1])
    out = torch.einsum("bto,bti->boi", grad, act).square().sum((1, 2))
    return out + grad.sum(1).square().sum(1) if bias else out


def factors(B, positions, I, O, dtype):
    return torch.randn(B, *positions, I).to(dtype), torch.randn(B, *positions, O).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, bias):
    act, grad = factors(B, positions, I, O, dtype)
    out = gf.ops.grad_sqnorm(act, grad, bias=bias)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle = linear_grads(act, grad, bias).square().sum((1, 2))
    assert_close_to_oracle(out, oracle, eager_sqnorm(act, grad, bias), dtype)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = torch.randn(6, 4, 10)[::2, :, 1::3], torch.randn(4, 3, 7).transpose(0, 1)
    oracle = linear_grads(act, grad).square().sum((1, 2))
    torch.testing.assert_close(gf.ops.grad_sqnorm(act, grad).double(), oracle, rtol=1e-5, atol=0)


def test_nan_stays_in_its_own_row(backend):
    act, grad = factors(4, (6,), 9, 8, torch.float32)
    clean = gf.ops.grad_sqnorm(act, grad)
    act[1, 2, 3] = float("nan")
    grad[3, 0, 0] = float("inf")
    out = gf.ops.grad_sqnorm(act, grad)
    assert not out[1].isfinite() and not out[3].isfinite()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def test_near_constant_activations_do_not_cancel(backend, dtype):
    act = (3 + 1e-2 * torch.randn(2, 64, 48)).to(dtype)
    grad = torch.randn(2, 64, 40)
    grad = (grad - grad.mean(1, keepdim=True)).to(dtype)
    oracle = linear_grads(act, grad).square().sum((1, 2))
    out = gf.ops.grad_sqnorm(act, grad).double()
    assert ((out - oracle).abs() / oracle).max() <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_same_bits_every_time(backend):
    act, grad = factors(9, (33,), 40, 24, torch.float32)
    first = gf.ops.grad_sqnorm(act, grad)
    assert all(torch.equal(gf.ops.grad_sqnorm(act, grad), first) for _ in range(20))


def test_rows_do_not_depend_on_the_batch_split(backend):
    act, grad = factors(7, (5,), 12, 8, torch.float32)
    whole = gf.ops.grad_sqnorm(act, grad)
    parts = torch.cat([gf.ops.grad_sqnorm(a, g) for a, g in zip(act.split(3), grad.split(3))])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "act, grad, error, message",
    [
        (torch.ones(31, 128), torch.ones(32, 8), ValueError, r"act must be \[B, \*, I\] with \[B, \*\] = \[32\]"),
        (torch.ones(3), torch.ones(3), ValueError, "add the batch dimension"),
        (torch.ones(3, 2), torch.ones(3, 2, dtype=torch.float64), TypeError, "grad must be torch.float32 like act"),
        (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2), TypeError, "act must be float32"),
    ],
)
def test_wrong_arguments_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_sqnorm(act, grad)


def test_backward_raises(backend):
    act = torch.ones(3, 2, requires_grad=True)
    out = gf.ops.grad_sqnorm(act, torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("positions", [(), (6,)])
def test_opcheck(positions):
    act, grad = factors(3, positions, 5, 4, torch.float32)
    torch.library.opcheck(torch.ops.gradclust_fast.grad_sqnorm.default, (act, grad, True))
