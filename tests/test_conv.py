"""What all conv ops promise alike: right on every geometry, isolation of examples, determinism, errors."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conftest import DTYPES, available_backends
from conv_cases import GRID, Case
from oracle import conv_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _dispatch

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


@pytest.mark.filterwarnings("ignore:Using padding=.same.")  # from the oracle
# The outer loops are the problem's, so that its oracle is computed once for all ops and backends.
@pytest.mark.parametrize("op", VERSIONS, indirect=True, ids="-".join)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", GRID)
def test_matches_one_example_at_a_time(case, dtype, bias, op):
    act, grad, G, eager = problem(case, dtype, bias)
    tensors, quantity = OPS[op][0](*G.shape[1:], accumulator(dtype)), OPS[op][1]
    out = run(op, act, grad, tensors, bias=bias, **case.geometry)
    assert out.dtype == accumulator(dtype)
    oracle = quantity(G, *(t.double() for t in tensors))
    assert_close_to_oracle(out, oracle, quantity(eager, *tensors), dtype)
