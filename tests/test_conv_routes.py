"""The C++ versions of the conv ops by every route of theirs, also on geometries that it would not be chosen for."""

from __future__ import annotations

import importlib

import pytest
import torch
from conv_cases import GRID, Case
from oracle import conv_grads
from test_conv import OPS, accumulator
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast.ops._conv import prepare
from gradclust_fast.ops._conv_routes import GRADIENT_ROUTES

pytestmark = [
    pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable())),
    pytest.mark.filterwarnings("ignore:Using padding=.same."),  # the oracle, with an even kernel
]
MODULES = {name: importlib.import_module(f"gradclust_fast.ops.{name}") for name in OPS}
ROUTES = {
    "conv_sketch": MODULES["conv_sketch"].ROUTES,
    "conv_dot": ("filters", *GRADIENT_ROUTES),
    "conv_gram": MODULES["conv_gram"].ROUTES,
    "conv_moments": GRADIENT_ROUTES,
}
EACH = [(name, route) for name, routes in ROUTES.items() for route in routes]
NOT_EMPTY = [case for case in GRID if case.values[0].B and all(case.values[0].out_size())]
# Several units of G_b, blocks of rows and panels of columns; ranks that split a panel; several blocks of positions.
LARGE = [
    pytest.param(Case(101, 40, 70, (3, 4), {"kernel_size": 3, "padding": 1}), id="many-examples"),
    pytest.param(Case(9, 70, 150, (6, 6), {"kernel_size": 3}), id="many-channels"),
    pytest.param(Case(2, 5, 37, (20, 31), {"kernel_size": 3, "padding": 1}), id="many-positions"),
    pytest.param(Case(12, 24, 24, (3, 3), {"kernel_size": 3, "padding": 1, "groups": 24}), id="depthwise"),
]


def by_route(name, route, act, grad, tensors=(), **geometry):
    out = MODULES[name].by_route(route, *prepare(act, grad, *tensors, **geometry))
    return torch.stack(out) if isinstance(out, tuple) else out


def check(case: Case, dtype: torch.dtype, bias: bool, extra=None) -> None:
    act, grad = case.factors(dtype)
    G, eager = (conv_grads(act, grad, bias, dtype=d, **case.geometry) for d in (torch.float64, accumulator(dtype)))
    for name, route in EACH:
        tensors, quantity = OPS[name][0](*G.shape[1:], accumulator(dtype)), OPS[name][1]
        if extra and name in extra:
            tensors = extra[name](*G.shape[1:])
        out = by_route(name, route, act, grad, tensors, bias=bias, **case.geometry)
        oracle = quantity(G, *(t.double() for t in tensors))
        assert_close_to_oracle(out, oracle, quantity(eager, *tensors), dtype)


@pytest.mark.parametrize("case", NOT_EMPTY)
def test_every_route_is_right_on_every_geometry(case):
    check(case, torch.float32, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [each for each in NOT_EMPTY if each.id in ("all-different", "grouped", "3d")])
def test_every_route_reads_every_dtype(case, dtype):
    check(case, dtype, False)


@pytest.mark.parametrize("case", LARGE)
def test_every_route_is_right_where_work_is_cut_into_blocks(case):
    wide = {
        "conv_sketch": lambda O, I: [torch.randn(O, 21), torch.randn(I, 37)],
        "conv_dot": lambda O, I: [torch.randn(27, 3, O), torch.randn(27, 3, I)],
    }
    check(case, torch.float32, True, wide)


@pytest.mark.parametrize("route", ROUTES["conv_sketch"])
@pytest.mark.parametrize("left, right", [(True, False), (False, True), (False, False)])
def test_sketch_routes_without_a_side(route, left, right):
    if (route == "filters" and not right) or (route == "mixed" and not left):
        pytest.skip("the route is made of the side that is missing")
    geometry = {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 3, "bias": True}
    act, grad, L, M = torch.randn(4, 6, 7, 9), torch.randn(4, 60, 4, 5), torch.randn(60, 18), torch.randn(19, 20)
    out = by_route("conv_sketch", route, act, grad, (L if left else None, M if right else None), **geometry)
    G = conv_grads(act, grad, True, **{k: v for k, v in geometry.items() if k != "bias"})
    G = L.double().mT @ G if left else G
    torch.testing.assert_close(out.double(), G @ M.double() if right else G, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel_size, stride, dilation, size", [(3, 1, 1, 10), (2, 3, 1, 10), (2, 1, 4, 6)])
@pytest.mark.parametrize("name, route", EACH)
def test_routes_never_read_pixels_that_no_output_sees(name, route, kernel_size, stride, dilation, size):
    out = (size - dilation * (kernel_size - 1) - 1) // stride + 1
    act, grad = torch.randn(2, 4, size, size), torch.randn(2, 3, out, out)
    tensors = OPS[name][0](3, 4 * kernel_size**2, torch.float32)
    seen = torch.zeros(size, dtype=torch.bool)
    seen[[t * stride + i * dilation for t in range(out) for i in range(kernel_size)]] = True
    geometry = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
    clean = by_route(name, route, act, grad, tensors, **geometry)
    act[:, :, ~seen] = float("nan")
    act[..., ~seen] = float("nan")
    assert torch.equal(by_route(name, route, act, grad, tensors, **geometry), clean)


@pytest.mark.parametrize("name, route", [each for each in EACH if each[0] != "conv_moments"])
def test_nan_stays_in_its_own_row_by_every_route(name, route):
    act, grad = torch.randn(9, 8, 6, 5), torch.randn(9, 20, 6, 5)
    tensors, geometry = OPS[name][0](20, 72, torch.float32), {"kernel_size": 3, "padding": 1}
    clean = by_route(name, route, act, grad, tensors, **geometry)
    act[4, 2, 3, 4] = float("nan")
    out = by_route(name, route, act, grad, tensors, **geometry)
    others = [b for b in range(9) if b != 4]
    same = (out[others][:, others], clean[others][:, others]) if name == "conv_gram" else (out[others], clean[others])
    assert torch.equal(*same)
    assert not out[4].isfinite().any()


@pytest.mark.parametrize("kernel_size, stride, padding", [(3, 1, 1), (3, 2, 1), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("route", ROUTES["conv_gram"])
def test_near_constant_images_do_not_cancel_in_pairs(route, dtype, kernel_size, stride, padding):
    geometry = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    noise = torch.tensor([1e-2, 1e-2, 3.0, 1e-2, 3.0]).reshape(5, 1, 1, 1)  # two examples that are not near-constant
    act = (3 + noise * torch.randn(5, 48, 5, 4)).to(dtype)
    out_size = [(n + 2 * padding - kernel_size) // stride + 1 for n in (5, 4)]
    grad = torch.randn(5, 40, *out_size)
    grad = (grad - grad.mean((2, 3), keepdim=True)).to(dtype)
    G = conv_grads(act, grad, True, **geometry).flatten(1)
    out = by_route("conv_gram", route, act, grad, bias=True, **geometry).double()
    oracle, size = G @ G.mT, G.norm(dim=1)
    assert ((out - oracle).abs() / (size[:, None] * size)).max() <= (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name, route", EACH)
def test_the_thread_count_changes_nothing(name, route):
    act, grad = torch.randn(35, 20, 5, 4), torch.randn(35, 18, 5, 4)
    tensors, threads, results = OPS[name][0](18, 180, torch.float32), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(by_route(name, route, act, grad, tensors, kernel_size=3, padding=1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize(
    "C, O, size, groups, P, Q, route",
    [
        (64, 64, 16, 1, 16, 16, "filters"),
        (64, 64, 16, 1, 8, 64, "mixed"),
        (3, 32, 32, 1, 40, 256, "direct"),
        (64, 64, 16, 64, 16, 16, "one short correlation"),
    ],
)
def test_explain_names_the_cheapest_route_of_a_sketch(C, O, size, groups, P, Q, route):
    act, grad = torch.zeros(1, C, size, size), torch.zeros(1, O, size, size)
    sides = torch.zeros(O, P), torch.zeros(C // groups * 9, Q)
    with gf.backend("cpu"):
        explanation = gf.explain("conv_sketch", act, grad, *sides, kernel_size=3, padding=1, groups=groups)
    assert explanation.route.startswith(route)


@pytest.mark.parametrize("C, size, route", [(256, 4, "products of positions"), (16, 16, "direct")])
def test_explain_names_the_cheapest_route_to_a_gram(C, size, route):
    act, grad = torch.zeros(8, C, size, size), torch.zeros(8, C, size, size)
    with gf.backend("cpu"):
        assert gf.explain("conv_gram", act, grad, kernel_size=3, padding=1).route.startswith(route)


@pytest.mark.parametrize("K, route", [(4, "filters"), (400, "direct")])
def test_explain_names_the_cheapest_route_to_the_centres(K, route):
    act, grad = torch.zeros(8, 64, 16, 16), torch.zeros(8, 64, 16, 16)
    centers = torch.zeros(K, 64), torch.zeros(K, 576)
    with gf.backend("cpu"):
        assert gf.explain("conv_dot", act, grad, *centers, kernel_size=3, padding=1).route.startswith(route)


@pytest.mark.parametrize("name", ["conv_gram", "conv_moments", "conv_dot", "conv_sketch"])
def test_auto_passes_over_narrow_pointwise_groups(name):
    act, grad = torch.randn(3, 8, 4, 4), torch.randn(3, 16, 4, 4)
    tensors = OPS[name][0](16, 1, torch.float32) if name == "conv_dot" else ()
    narrow = gf.explain(name, act, grad, *tensors, kernel_size=1, groups=8)
    assert narrow.backend == "reference" and "fewer than 16 output channels a group" in narrow.others["cpu"]
    tensors = OPS[name][0](16, 8, torch.float32) if name == "conv_dot" else ()
    assert gf.explain(name, act, grad, *tensors, kernel_size=1).backend == "cpu"
