"""The three routes of the C++ version, each on geometries that it would not be chosen for, and the choice itself."""

from __future__ import annotations

import importlib

import pytest
import torch
from conv_cases import DTYPE_AND_BIAS, GRID
from oracle import conv_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast.ops._conv import prepare

routes = importlib.import_module("gradclust_fast.ops.conv_sqnorm")
pytestmark = [
    pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable())),
    pytest.mark.filterwarnings("ignore:Using padding=.same."),  # the oracle, with an even kernel
]
NOT_EMPTY = [case for case in GRID if case.values[0].B and all(case.values[0].out_size())]


@pytest.mark.parametrize("dtype, bias", DTYPE_AND_BIAS)
@pytest.mark.parametrize("case", NOT_EMPTY)
def test_every_route_is_right_on_every_geometry(case, dtype, bias):
    act, grad = case.factors(dtype)
    oracle = conv_grads(act, grad, bias, **case.geometry).square().sum((1, 2))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    eager = conv_grads(act, grad, bias, dtype=accumulator, **case.geometry).square().sum((1, 2))
    for route in routes.ROUTES:
        out = routes.by_route(route, *prepare(act, grad, bias=bias, **case.geometry))
        assert_close_to_oracle(out, oracle, eager, dtype)


@pytest.mark.parametrize("route", routes.ROUTES)
@pytest.mark.parametrize("kernel_size, stride, dilation, size", [(3, 1, 1, 10), (2, 3, 1, 10), (2, 1, 4, 6)])
def test_routes_never_read_pixels_that_no_output_sees(route, kernel_size, stride, dilation, size):
    out = (size - dilation * (kernel_size - 1) - 1) // stride + 1
    act, grad = torch.randn(2, 4, size, size), torch.randn(2, 3, out, out)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[[t * stride + i * dilation for t in range(out) for i in range(kernel_size)]] = True
    args = prepare(act, grad, kernel_size=kernel_size, stride=stride, dilation=dilation)
    clean = routes.by_route(route, *args)
    act[:, :, ~seen] = float("nan")
    act[..., ~seen] = float("nan")
    assert torch.equal(routes.by_route(route, *args), clean)


@pytest.mark.parametrize("route", routes.ROUTES)
def test_the_thread_count_changes_nothing(route):
    act, grad = torch.randn(7, 6, 9, 8), torch.randn(7, 5, 9, 8)
    args = prepare(act, grad, kernel_size=3, padding=1)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(routes.by_route(route, *args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    "C, O, size, geometry, route",
    [
        (3, 32, 32, {"kernel_size": 3, "padding": 1}, "direct"),
        (64, 64, 16, {"kernel_size": 3, "padding": 1}, "structured Gram"),
        (64, 64, 16, {"kernel_size": 3, "padding": 1, "groups": 64}, "one short correlation"),
        (256, 256, 14, {"kernel_size": 3, "padding": 1}, "structured Gram"),
        (64, 64, 56, {"kernel_size": 1}, "direct"),
    ],
)
def test_explain_names_the_cheapest_route(C, O, size, geometry, route):
    explanation = gf.explain("conv_sqnorm", torch.zeros(1, C, size, size), torch.zeros(1, O, size, size), **geometry)
    assert explanation.backend == "cpu"
    assert explanation.route.startswith(route)
