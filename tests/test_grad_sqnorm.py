from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, near_constant_factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _native


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, bias):
    act, grad = factors(B, positions, I, O, dtype)
    out = gf.ops.grad_sqnorm(act, grad, bias=bias)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    oracle = linear_grads(act, grad, bias).square().sum((1, 2))
    eager = eager_grads(act, grad, bias).square().sum((1, 2))
    assert_close_to_oracle(out, oracle, eager, dtype)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
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
    act, grad = near_constant_factors(dtype)
    oracle = linear_grads(act, grad).square().sum((1, 2))
    out = gf.ops.grad_sqnorm(act, grad).double()
    assert ((out - oracle).abs() / oracle).max() <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_same_bits_every_time(backend):
    act, grad = factors(9, (33,), 40, 24, torch.float32)
    first = gf.ops.grad_sqnorm(act, grad)
    assert all(torch.equal(gf.ops.grad_sqnorm(act, grad), first) for _ in range(5))


def test_rows_do_not_depend_on_the_batch_split(backend):
    act, grad = factors(7, (5,), 12, 8, torch.float32)
    whole = gf.ops.grad_sqnorm(act, grad)
    parts = torch.cat([gf.ops.grad_sqnorm(a, g) for a, g in zip(act.split(3), grad.split(3))])
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0)


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
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


@pytest.mark.parametrize("T, I, O, name", [(4, 64, 64, "Gram"), (300, 8, 8, "direct"), (1, 8, 8, "rank 1")])
def test_explain_names_the_route(T, I, O, name):
    if _native.cpu_unavailable():
        pytest.skip(_native.cpu_unavailable())
    choice = gf.explain("grad_sqnorm", torch.ones(2, T, I), torch.ones(2, T, O))
    assert choice.backend == "cpu" and name in choice.route


def _child(act, grad, queue):
    with gf.backend("cpu"):
        queue.put((_native.num_threads(), gf.ops.grad_sqnorm(act, grad).tolist()))


@pytest.mark.skipif(not hasattr(os, "fork") or _native.cpu_unavailable() is not None, reason="needs fork and _C")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_kernel_runs_in_a_forked_child_after_the_parent_used_threads():
    act, grad = factors(6, (7,), 20, 11, torch.float32)
    with gf.backend("cpu"):
        before = gf.ops.grad_sqnorm(act, grad).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(act, grad, queue), daemon=True)
    child.start()
    child.join(60)
    hung = child.exitcode is None
    child.kill()
    assert not hung and child.exitcode == 0
    assert queue.get() == (1, before)


def test_new_python_threads_give_the_same_bits(backend):
    act, grad = factors(6, (7,), 20, 11, torch.float32)
    first = gf.ops.grad_sqnorm(act, grad)
    name = backend

    def work(_):
        with gf.backend(name):
            return gf.ops.grad_sqnorm(act, grad)

    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(out, first) for out in pool.map(work, range(6)))
