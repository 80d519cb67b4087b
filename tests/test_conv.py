"""What all conv ops promise alike: right on every geometry, isolation of examples, determinism, errors."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conftest import available_backends
from conv_cases import DTYPE_AND_BIAS, GRID, Case
from oracle import conv_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _dispatch

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.")  # the oracle, with an even kernel

# name: (extra tensors from [O, I (+ 1)] and the dtype, the quantity from G [B, O, I (+ 1)] and those tensors)
OPS = {
    "conv_sqnorm": (lambda O, I, dtype: [], lambda G: G.square().sum((1, 2))),
    "conv_gram": (lambda O, I, dtype: [], lambda G: G.flatten(1) @ G.flatten(1).mT),
    "conv_moments": (lambda O, I, dtype: [], lambda G: torch.stack([G.sum(0), G.square().sum(0)])),
    "conv_sketch": (
        lambda O, I, dtype: [torch.randn(O, 3, dtype=dtype), torch.randn(I, 5, dtype=dtype)],
        lambda G, left, right: left.mT @ G @ right,
    ),
    "conv_dot": (
        lambda O, I, dtype: [torch.randn(4, 2, O, dtype=dtype), torch.randn(4, 2, I, dtype=dtype)],
        lambda G, D, A: torch.einsum("boi,kro,kri->bk", G, D, A),
    ),
}
VERSIONS = [
    (name, backend) for name in OPS for backend in available_backends() if backend in _dispatch.OPS[name].kernels
]


@pytest.fixture(params=VERSIONS, ids="-".join)
def op(request):
    """The public function of every op, once per backend that it has here, forced."""
    name, backend = request.param
    with gf.backend(backend):
        yield name


def run(name, act, grad, tensors=(), **geometry):
    out = getattr(gf.ops, name)(act, grad, *tensors, **geometry)
    return torch.stack(out) if isinstance(out, tuple) else out


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=8)
def problem(case: Case, dtype: torch.dtype, bias: bool):
    """act, grad, G_b in float64, and G_b as eager torch computes it in the accumulator's dtype."""
    act, grad = case.factors(dtype)
    G = [conv_grads(act, grad, bias, dtype=d, **case.geometry) for d in (torch.float64, accumulator(dtype))]
    return act, grad, *G


# The outer loops are the problem's, so that its oracle is computed once for all ops and backends.
@pytest.mark.parametrize("op", VERSIONS, indirect=True, ids="-".join)
@pytest.mark.parametrize("dtype, bias", DTYPE_AND_BIAS)
@pytest.mark.parametrize("case", GRID)
def test_matches_one_example_at_a_time(case, dtype, bias, op):
    act, grad, G, eager = problem(case, dtype, bias)
    tensors, quantity = OPS[op][0](*G.shape[1:], accumulator(dtype)), OPS[op][1]
    out = run(op, act, grad, tensors, bias=bias, **case.geometry)
    assert out.dtype == accumulator(dtype)
    oracle = quantity(G, *(t.double() for t in tensors))
    assert_close_to_oracle(out, oracle, quantity(eager, *tensors), dtype)


def example(C=6, O=9, B=4, groups=3):
    act, grad = torch.randn(B, C, 7, 9), torch.randn(B, O, 4, 5)
    return act, grad, {"kernel_size": 3, "stride": 2, "padding": 1, "groups": groups}


@pytest.mark.parametrize("op", VERSIONS, indirect=True, ids="-".join)
def test_strided_inputs_read_their_own_elements(op):
    act, grad, geometry = example()
    tensors = OPS[op][0](9, 18, torch.float32)
    expected = run(op, act, grad, tensors, **geometry)
    wide = torch.full((8, 6, 14, 9), float("nan"))
    wide[::2, :, ::2] = act
    views = [
        (wide[::2, :, ::2], grad.to(memory_format=torch.channels_last)),
        (act.to(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().transpose(2, 3)),
    ]
    for a, g in views:
        torch.testing.assert_close(run(op, a, g, tensors, **geometry), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", [v for v in VERSIONS if v[0] != "conv_moments"], indirect=True, ids="-".join)
def test_nan_stays_in_its_own_row(op):
    act, grad, geometry = example()
    tensors = OPS[op][0](9, 18, torch.float32)
    clean = run(op, act, grad, tensors, **geometry)
    act[1, 2, 3, 4] = float("nan")
    grad[3, 0, 0, 0] = float("inf")
    out = run(op, act, grad, tensors, **geometry)
    others = (slice(0, 3, 2), slice(0, 3, 2)) if op == "conv_gram" else slice(0, 3, 2)
    assert torch.equal(out[others], clean[others])
    assert not out[1].isfinite().all() and not out[3].isfinite().all()


@pytest.mark.parametrize("op", VERSIONS, indirect=True, ids="-".join)
def test_pixels_that_no_output_sees_do_not_count(op):
    act, grad = torch.randn(2, 4, 6, 8), torch.randn(2, 5, 2, 3)
    tensors = OPS[op][0](5, 36, torch.float32)
    clean = run(op, act, grad, tensors, kernel_size=3, stride=2)
    act[:, :, 5] = float("nan")
    act[..., 7] = float("inf")
    assert torch.equal(run(op, act, grad, tensors, kernel_size=3, stride=2), clean)


@pytest.mark.parametrize("op", VERSIONS, indirect=True, ids="-".join)
def test_same_bits_every_time(op):
    act, grad, geometry = example(B=9)
    tensors = OPS[op][0](9, 18, torch.float32)
    first = run(op, act, grad, tensors, **geometry)
    assert all(torch.equal(run(op, act, grad, tensors, **geometry), first) for _ in range(10))


@pytest.mark.parametrize("op", [v for v in VERSIONS if v[0] == "conv_sqnorm"], indirect=True, ids="-".join)
@pytest.mark.parametrize("kernel_size, stride, out", [(1, 1, 9), (3, 1, 7), (3, 2, 4), (7, 2, 2)])
def test_near_constant_images_do_not_cancel(op, dtype, kernel_size, stride, out):
    act = (3 + 1e-2 * torch.randn(2, 48, 9, 9)).to(dtype)
    grad = torch.randn(2, 40, out, out)
    grad = (grad - grad.mean((2, 3), keepdim=True)).to(dtype)
    oracle = conv_grads(act, grad, kernel_size=kernel_size, stride=stride).square().sum((1, 2))
    sqnorm = run(op, act, grad, kernel_size=kernel_size, stride=stride).double()
    assert ((sqnorm - oracle).abs() / oracle).max() <= (1e-10 if dtype == torch.float64 else 1e-5)


def test_near_constant_images_do_not_cancel_in_pairs(dtype):
    act = (3 + 1e-2 * torch.randn(3, 48, 4, 4)).to(dtype)
    grad = torch.randn(3, 40, 2, 2)
    grad = (grad - grad.mean((2, 3), keepdim=True)).to(dtype)
    G = conv_grads(act, grad, kernel_size=3).flatten(1)
    oracle = G @ G.mT
    out = gf.ops.conv_gram(act, grad, kernel_size=3).double()
    assert (out - oracle).abs().max() <= oracle.max() * (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("op", VERSIONS, indirect=True, ids="-".join)
def test_backward_raises(op):
    act, grad, geometry = example()
    out = run(op, act.requires_grad_(), grad, OPS[op][0](9, 18, torch.float32), **geometry)
    with pytest.raises(RuntimeError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    act, grad, _ = example()
    args = (act, grad, *OPS[name][0](9, 19, torch.float32), [3, 3], [2, 2], [1, 1, 1, 1], [1, 1], 3, True)
    torch.library.opcheck(getattr(torch.ops.gradclust_fast, name).default, args)


IMAGE, MAP = torch.ones(2, 4, 6, 5), torch.ones(2, 6, 4, 3)


@pytest.mark.parametrize(
    "act, grad, geometry, error, message",
    [
        (IMAGE[0, 0], MAP, {}, ValueError, r"act must be \[B, C_in, \*spatial\] with 1 to 3 spatial"),
        (IMAGE, MAP[0], {}, ValueError, "with 2 spatial dimensions"),
        (IMAGE[:1], MAP, {}, ValueError, r"act must be \[B, C_in, \*spatial\] with B=2"),
        (IMAGE, MAP, {"padding": 1}, ValueError, r"grad must have spatial size \[6, 5\] .* got \[2, 6, 4, 3\]"),
        (IMAGE, MAP, {"groups": 3}, ValueError, "act must have a number of channels divisible by groups=3, got 4"),
        (IMAGE, MAP[:, :5], {"groups": 2}, ValueError, "grad must have a number of channels divisible by groups=2"),
        (IMAGE, MAP, {"groups": 0}, ValueError, "groups must be at least 1"),
        (IMAGE, MAP, {"stride": 0}, ValueError, "stride must be an integer ≥ 1"),
        (IMAGE, MAP, {"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an integer ≥ 1, or 2 of them"),
        (IMAGE, MAP, {"padding": "full"}, ValueError, "padding must be integers, 'same' or 'valid'"),
        (IMAGE, MAP, {"padding": "same", "stride": 2}, ValueError, "padding='same' needs stride 1"),
        (IMAGE, MAP, {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of zeros, circular"),
        (IMAGE, MAP.double(), {}, TypeError, "grad must be torch.float32 like act"),
        (IMAGE.long(), MAP, {}, TypeError, "act must be float32"),
    ],
)
def test_wrong_arguments_are_named(act, grad, geometry, error, message):
    with pytest.raises(error, match=message):
        gf.ops.conv_sqnorm(act, grad, **{"kernel_size": 3, **geometry})


@pytest.mark.parametrize(
    "op, shapes, bias, message",
    [
        ("conv_sketch", [(5, 2), (36, 2)], False, r"left must be \[6, P\]"),
        ("conv_sketch", [(6, 2), (36, 2)], True, r"right must be \[37, Q\] .* \+ 1 for the bias"),
        ("conv_dot", [(3, 5), (3, 36)], False, r"center_grad must be \[K, 6\]"),
        ("conv_dot", [(3, 6), (2, 36)], False, r"center_act must be \[3, 36\]"),
    ],
)
def test_wrong_auxiliary_matrices_are_named(op, shapes, bias, message):
    with pytest.raises(ValueError, match=message):
        run(op, IMAGE, MAP, [torch.ones(s) for s in shapes], kernel_size=3, bias=bias)
    with pytest.raises(TypeError, match=r"must be torch\.float32"):
        run(op, IMAGE, MAP, [torch.ones(6, s, dtype=torch.int64) for s in (6, 36)], kernel_size=3)


@pytest.mark.parametrize("left, right", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("groups", [1, 3])
def test_sketch_without_a_side_is_the_identity_there(left, right, groups):
    act, grad, geometry = example(groups=groups)
    L, M = torch.randn(9, 3), torch.randn(6 // groups * 9 + 1, 4)
    out = gf.ops.conv_sketch(act, grad, L if left else None, M if right else None, bias=True, **geometry)
    G = conv_grads(act, grad, True, **geometry)
    G = L.double().mT @ G if left else G
    torch.testing.assert_close(out.double(), G @ M.double() if right else G, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("K", [1, 200], ids=["by-filters", "through-G"])
def test_dot_is_the_same_by_both_routes(K):
    act, grad = torch.randn(3, 4, 12, 12), torch.randn(3, 5, 12, 12)
    D, A = torch.randn(K, 5), torch.randn(K, 37)
    out = gf.ops.conv_dot(act, grad, D, A, kernel_size=3, padding="same", bias=True)
    G = conv_grads(act, grad, True, kernel_size=3, padding=1)
    oracle = torch.einsum("boi,ko,ki->bk", G, D.double(), A.double())
    assert (out - oracle).abs().max() <= 1e-5 * oracle.abs().max()


def test_no_centres_and_no_columns_give_empty_rows():
    act, grad = torch.randn(3, 4, 6, 6), torch.randn(3, 6, 6, 6)
    geometry = {"kernel_size": 3, "padding": 1, "groups": 2, "bias": True}
    assert gf.ops.conv_dot(act, grad, torch.ones(0, 6), torch.ones(0, 19), **geometry).shape == (3, 0)
    assert gf.ops.conv_sketch(act, grad, None, torch.ones(19, 0), **geometry).shape == (3, 6, 0)
    assert gf.ops.conv_sketch(act, grad, torch.ones(6, 0), torch.ones(19, 2), **geometry).shape == (3, 0, 2)
