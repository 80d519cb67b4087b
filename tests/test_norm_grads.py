from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

GRID = [  # shape, options, why
    pytest.param((0, 3, 4), {}, id="empty-batch"),
    pytest.param((3, 0, 4), {}, id="no-positions"),
    pytest.param((3, 2, 0), {}, id="no-features"),
    pytest.param((5, 9), {}, id="rows"),
    pytest.param((2, 1, 2), {}, id="one-position"),
    pytest.param((3, 70, 37), {}, id="ragged-and-several-blocks-of-rows"),
    pytest.param((2, 3, 5, 16), {"eps": 0.1}, id="two-position-dims"),
    pytest.param((2, 3, 2100), {}, id="several-chunks-of-a-row"),
    pytest.param((4, 7, 19), {"rms": True, "eps": 1e-6}, id="rms"),
    pytest.param((3, 6, 5, 7), {"groups": 3}, id="groups"),
    pytest.param((3, 6, 5, 7), {"groups": 1, "eps": 0.3}, id="one-group"),
    pytest.param((2, 4, 1200), {"groups": 4}, id="a-group-a-channel"),
    pytest.param((2, 4, 0), {"groups": 2}, id="groups-without-positions"),
    pytest.param((0, 4, 3), {"groups": 2}, id="groups-of-no-batch"),
    pytest.param((2, 4), {"groups": 2}, id="channels-alone"),
]


def oracle(input, grad, groups=None, eps=1e-5, rms=False, dtype=torch.float64):
    """By autograd of the layer's own function, on one example at a time."""
    features = input.shape[1] if groups else input.shape[-1]
    rows = torch.zeros(2, input.shape[0], features, dtype=dtype)
    for b in range(input.shape[0]):
        x, d = input[b : b + 1].to(dtype), grad[b : b + 1].to(dtype)
        weight = torch.ones(features, dtype=dtype, requires_grad=True)
        bias = torch.zeros(features, dtype=dtype, requires_grad=True)
        if x.numel() == 0:
            continue
        if groups:
            out = torch.group_norm(x, groups, weight, bias, eps)
        elif rms:
            out = F.rms_norm(x, (features,), weight, eps) + bias
        else:
            out = F.layer_norm(x, (features,), weight, bias, eps)
        rows[0, b], rows[1, b] = torch.autograd.grad(out, (weight, bias), d)
    return rows


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, options", GRID)
def test_matches_one_example_at_a_time(backend, dtype, shape, options):
    input, grad = (3 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)
    found = gf.ops.norm_grads(input, grad, **options)
    exact, eager = oracle(input, grad, **options), oracle(input, grad, **options, dtype=accumulator(dtype))
    for out, expected, rough in zip(found, exact, eager, strict=True):
        assert out.dtype == accumulator(dtype)
        assert_close_to_oracle(out, expected, rough, dtype)


@pytest.mark.parametrize("options", [{}, {"groups": 2}])
def test_a_large_common_mean_costs_no_more_than_in_the_layer_itself(backend, options):
    input, grad = 300 + torch.randn(3, 4, 500), torch.randn(3, 4, 500)
    for out, expected, rough in zip(
        gf.ops.norm_grads(input, grad, **options),
        oracle(input, grad, **options),
        oracle(input, grad, **options, dtype=torch.float32),
    ):
        assert_close_to_oracle(out, expected, rough, torch.float32)


@pytest.mark.parametrize("options", [{}, {"groups": 2}])
def test_strided_inputs_read_their_own_elements(backend, options):
    input, grad = torch.randn(8, 6, 5, 4)[::2].transpose(1, 3), torch.randn(4, 4, 5, 6, 2)[..., 1]
    found = gf.ops.norm_grads(input, grad, **options)
    for out, expected in zip(found, oracle(input, grad, **options)):
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rms": True}, {"groups": 3}])
def test_nan_stays_in_its_own_row_and_bits_are_the_same(backend, options):
    input, grad = torch.randn(7, 6, 40), torch.randn(7, 6, 40)
    clean = gf.ops.norm_grads(input, grad, **options)
    input[1, 2, 3], grad[4, 0, 0] = float("nan"), float("inf")
    weight, bias = gf.ops.norm_grads(input, grad, **options)
    assert weight[1].isnan().any() and bias[1].isfinite().all() and not bias[4].isfinite().all()
    others = [0, 2, 3, 5, 6]
    assert torch.equal(weight[others], clean[0][others]) and torch.equal(bias[others], clean[1][others])


X = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    "input, grad, options, error, message",
    [
        (X.int(), X, {}, TypeError, "input must be float32, float64, bfloat16 or float16, got torch.int32"),
        (X[0, 0], X[0, 0], {}, ValueError, r"input must be \[B, \*, D\], or \[B, C, \*\] with groups, got \[3\]"),
        (X, X[:1], {}, ValueError, r"grad must be \[2, 4, 3\] like input, got \[1, 4, 3\]"),
        (X, X.double(), {}, TypeError, "grad must be torch.float32 like input, got torch.float64"),
        (X, X.to("meta"), {}, ValueError, "grad must be on cpu like input, got meta"),
        (X, X, {"groups": 3}, ValueError, "groups must be at least 1 and divide the 4 channels of input, got 3"),
        (X, X, {"groups": 0}, ValueError, "groups must be at least 1 and divide the 4 channels of input, got 0"),
        (X, X, {"groups": 2, "rms": True}, ValueError, "rms=True normalises over the last dimension"),
        (X, X, {"eps": -1.0}, ValueError, "eps must be a finite number of at least 0, got -1.0"),
    ],
)
def test_wrong_arguments_are_named(backend, input, grad, options, error, message):
    with pytest.raises(error, match=message):
        gf.ops.norm_grads(input, grad, **options)
    with pytest.raises(error, match=message):
        gf.explain("norm_grads", input, grad, **options)


def test_backward_raises(backend):
    out = gf.ops.norm_grads(X.clone().requires_grad_(), X)
    with pytest.raises(RuntimeError, match="not differentiable"):
        out[0].sum().backward()


@pytest.mark.parametrize("groups", [0, 2])
def test_opcheck(groups):
    torch.library.opcheck(torch.ops.gradclust_fast.norm_grads.default, (X, X, groups, 1e-5, False))
