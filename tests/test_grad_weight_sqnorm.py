from __future__ import annotations

import importlib

import pytest
import torch
from linear_cases import GRID, WRONG_FACTORS, eager_grads, factors, near_constant_factors, strided_factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast.triton_kernels import _support

by_kernel = importlib.import_module("gradclust_fast.ops.grad_weight_sqnorm").by_kernel


def assert_matches(found, act, grad, bias, dtype):
    weight_grad, sqnorm = found
    G, eager = linear_grads(act, grad, bias), eager_grads(act, grad, bias)
    # where the sum is asked for in a half type it is rounded once
    assert_close_to_oracle(weight_grad, G.sum(0), eager.sum(0).to(weight_grad.dtype), dtype)
    assert_close_to_oracle(sqnorm, G.square().sum((1, 2)), eager.square().sum((1, 2)), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, positions, I, O", GRID)
def test_matches_one_example_at_a_time(backend, dtype, B, positions, I, O, bias):
    act, grad = factors(B, positions, I, O, dtype)
    found = gf.ops.grad_weight_sqnorm(act, grad, bias=bias)
    assert {each.dtype for each in found} == {torch.float64 if dtype == torch.float64 else torch.float32}
    assert_matches(found, act, grad, bias, dtype)


def test_the_weight_gradient_comes_in_the_factors_dtype_too(backend):
    act, grad = factors(5, (40,), 37, 19, torch.bfloat16)
    weight_grad, sqnorm = gf.ops.grad_weight_sqnorm(act, grad, dtype=torch.bfloat16)
    assert weight_grad.dtype == torch.bfloat16 and sqnorm.dtype == torch.float32
    assert_matches((weight_grad, sqnorm), act, grad, False, torch.bfloat16)


def test_many_examples(backend):
    act, grad = factors(37, (5,), 45, 37, torch.float32)
    assert_matches(gf.ops.grad_weight_sqnorm(act, grad), act, grad, False, torch.float32)


def test_strided_inputs_read_their_own_elements(backend):
    act, grad = strided_factors()
    assert_matches(gf.ops.grad_weight_sqnorm(act, grad), act, grad, False, torch.float32)


def test_near_constant_activations_do_not_cancel(backend, dtype):
    act, grad = near_constant_factors(dtype)
    assert_matches(gf.ops.grad_weight_sqnorm(act, grad), act, grad, False, dtype)


def test_nan_stays_in_its_own_row(backend):
    act, grad = factors(6, (9,), 40, 24, torch.float32)
    clean = gf.ops.grad_weight_sqnorm(act, grad)[1]
    act[2, 3, 5] = float("nan")
    weight_grad, sqnorm = gf.ops.grad_weight_sqnorm(act, grad)
    rest = torch.arange(6) != 2
    assert sqnorm[2].isnan() and torch.equal(sqnorm[rest], clean[rest])
    assert weight_grad[:, 5].isnan().all() and weight_grad[:, :5].isfinite().all()


def test_same_bits_every_time(backend):
    act, grad = factors(29, (33,), 40, 24, torch.float32)
    first = gf.ops.grad_weight_sqnorm(act, grad)
    for _ in range(5):
        assert all(map(torch.equal, gf.ops.grad_weight_sqnorm(act, grad), first))


@pytest.mark.skipif(_support.unavailable(torch.device("cpu")) is not None, reason="needs Triton's interpreter")
@pytest.mark.parametrize("B, O", [(3, 33), (7, 33), (3, 300)], ids=["a-split-an-example", "ragged-splits", "no-split"])
def test_the_batch_is_split_where_tiles_are_few_and_rows_of_tiles_are_grouped(B, O):
    """33 × 65 is four tiles, 300 × 65 twenty: a group of eight rows of them and one of two."""
    kernel = importlib.import_module("gradclust_fast.triton_kernels.grad_weight_sqnorm")
    act, grad = factors(B, (20,), 65, O, torch.float32)
    with gf.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_support, "INTERPRETER", _support.Target((0, 0), 12))
        assert "one pass" in gf.explain("grad_weight_sqnorm", act, grad).route
        assert_matches(gf.ops.grad_weight_sqnorm(act, grad), act, grad, False, torch.float32)
        assert kernel.weight_tiles(20, act.dtype, "ieee", _support.INTERPRETER)[:2] == (32, 64)


def test_explain_names_the_route():
    act, grad = torch.ones(2, 8, 1024), torch.ones(2, 8, 1024)
    with gf.backend("reference"):
        assert gf.explain("grad_weight_sqnorm", act, grad).route == "pure PyTorch"
    if gf.build_info()["C++ kernels"].startswith("unavailable"):
        return
    with gf.backend("cpu"):
        assert "torch's product, then the norms: Gram" in gf.explain("grad_weight_sqnorm", act, grad).route
        long = torch.ones(2, 300, 64), torch.ones(2, 300, 64)
        assert "one pass" in gf.explain("grad_weight_sqnorm", *long).route


# Few and many positions; several parts of the batch; several blocks, the bias's column alone in one; one output.
SIZES = [(3, 2, 5, 4), (2, 300, 30, 20), (50, 3, 40, 33), (9, 20, 250, 210), (1, 7, 192, 193), (130, 2, 8, 1)]


@pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, T, I, O", SIZES)
def test_the_one_pass_is_right_where_it_would_not_be_chosen(B, T, I, O, bias, dtype):
    act, grad = factors(B, (T,), I, O, dtype)
    assert_matches(by_kernel(act, grad, bias, None), act, grad, bias, dtype)


@pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))
def test_one_pass_keeps_its_digits_its_rows_and_its_bits():
    for dtype in (torch.float32, torch.bfloat16):
        near = near_constant_factors(dtype)
        assert_matches(by_kernel(*near, False, None), *near, False, dtype)
    act, grad = factors(70, (9,), 200, 40, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(by_kernel(act, grad, True, None))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for each in results for a, b in zip(each, results[0]))
    act[4, 3, 5] = float("nan")
    sqnorm, rest = by_kernel(act, grad, True, None)[1], torch.arange(70) != 4
    assert sqnorm[4].isnan() and torch.equal(sqnorm[rest], results[0][1][rest])


@pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))
def test_one_pass_where_squares_leave_the_range_of_float32():
    act, grad = factors(4, (6,), 20, 30, torch.float32)
    scale = torch.tensor([1e-25, 1e-15, 0.0, 1.0]).reshape(4, 1, 1)
    sqnorm = by_kernel(act * scale, grad * 1e-5, False, None)[1]
    G = linear_grads(act * scale, grad * 1e-5, False)
    torch.testing.assert_close(sqnorm.double(), G.square().sum((1, 2)).float().double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("act, grad, error, message", WRONG_FACTORS)
def test_wrong_factors_are_named(backend, act, grad, error, message):
    with pytest.raises(error, match=message):
        gf.ops.grad_weight_sqnorm(act, grad)


def test_a_third_dtype_is_refused(backend):
    with pytest.raises(TypeError, match=r"dtype must be torch.bfloat16 .* or None for the latter, got torch.float64"):
        gf.ops.grad_weight_sqnorm(*factors(2, (), 3, 4, torch.bfloat16), dtype=torch.float64)


def test_backward_raises(backend):
    weight_grad, _ = gf.ops.grad_weight_sqnorm(torch.ones(3, 2, requires_grad=True), torch.ones(3, 2))
    with pytest.raises(RuntimeError, match="not differentiable"):
        weight_grad.sum().backward()


@pytest.mark.parametrize("positions", [(), (6,)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_opcheck(positions, dtype):
    act, grad = factors(3, positions, 5, 4, torch.bfloat16)
    torch.library.opcheck(torch.ops.gradclust_fast.grad_weight_sqnorm.default, (act, grad, True, dtype))


@pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))
@pytest.mark.parametrize("bias", [False, True])
def test_a_sum_over_positions_beyond_the_range_leaves_a_gradient_within_it(bias):
    act, grad = torch.randn(4, 40, 30) * 1e-3, torch.randn(4, 40, 20)
    grad[1] = 3e37
    weight_grad, sqnorm = by_kernel(act, grad, bias, None)
    G = linear_grads(act, grad, bias)
    torch.testing.assert_close(weight_grad.double()[:, :30], G.sum(0)[:, :30], rtol=1e-4, atol=1e32)
    assert sqnorm[1].isinf() and sqnorm[[0, 2, 3]].isfinite().all()
    assert not bias or weight_grad[:, 30].isinf().all()
