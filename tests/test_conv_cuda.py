"""The CUDA kernels of convolutions, compiled for the CPU, on sizes that fill more than one tile, chunk and stage."""

from __future__ import annotations

import importlib

import cuda_on_host
import pytest
import torch
from conv_cases import GRID, case
from oracle import conv_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast.ops import _conv_cuda
from gradclust_fast.ops._conv import prepare

sqnorm = importlib.import_module("gradclust_fast.ops.conv_sqnorm")
moments = importlib.import_module("gradclust_fast.ops.conv_moments")
pytestmark = [
    pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable())),
    pytest.mark.filterwarnings("ignore:Using padding=.same."),
]
NOT_EMPTY = [each for each in GRID if each.values[0].B and all(each.values[0].out_size())]
LARGE = [
    case(2, 104, 70, (5, 6), "several-channel-and-row-tiles", kernel_size=(2, 5), padding=2),
    case(2, 8, 16, (70,), "several-tap-tiles", kernel_size=30),
    case(1, 16, 33, (300,), "a-row-in-pieces", kernel_size=3, padding=1),
    case(1, 8, 8, (40, 20), "many-chunks", kernel_size=3, padding=1),
    case(1, 8, 12, (1500,), "elements-too-far-apart-to-share-a-segment", kernel_size=3, dilation=700),
    case(1, 16, 8, (9, 23), "stride-and-dilation-share-a-factor", kernel_size=3, stride=4, dilation=2, padding=3),
    case(1, 200, 8, (4, 5), "1x1-many-channels", kernel_size=1),
    case(1, 16, 24, (5, 4, 6), "3d-grouped-aligned", kernel_size=(2, 3, 3), padding=1, groups=2),
    case(2, 40, 40, (7, 9), "depthwise-many-taps", kernel_size=(3, 5), padding=2, groups=40),
    case(1, 36, 72, (6, 5), "depthwise-multiplier", kernel_size=3, stride=2, padding=1, groups=36),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture
def emulator(monkeypatch):
    with gf.backend("cuda"):
        yield cuda_on_host.emulated(monkeypatch)


def by_route(route, act, grad, geometry, bias=False):
    return sqnorm.by_cuda_route(route, *prepare(act, grad, bias=bias, **geometry))


def check(route, act, grad, geometry, dtype, bias=False):
    oracle = conv_grads(act, grad, bias, **geometry).square().sum((1, 2))
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    eager = conv_grads(act, grad, bias, dtype=accumulator, **geometry).square().sum((1, 2))
    out = by_route(route, act, grad, geometry, bias)
    assert_close_to_oracle(out, oracle, eager, dtype)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("each", LARGE)
def test_several_tiles_chunks_and_stages(emulator, each, dtype):
    act, grad = each.factors(dtype)
    route = "tiles" if each.geometry.get("groups", 1) < 3 else "correlate"
    first = check(route, act, grad, each.geometry, dtype)
    for order in (1, 2):
        emulator.set_order(order)
        assert torch.equal(by_route(route, act, grad, each.geometry), first), "the order of threads shows"


BULK = [  # 16-bit factors whose tiles bulk tensor copies fetch
    case(1, 64, 64, (8, 9), "lines-of-128-bytes", kernel_size=3, padding=1),
    case(3, 32, 16, (9, 10), "lines-of-64-and-32-bytes", kernel_size=5, padding=2),
    case(2, 16, 24, (12, 11), "a-line-of-32-bytes-strided", kernel_size=3, stride=2, padding=1),
    case(2, 8, 40, (13, 20), "a-line-of-16-bytes-rows-and-positions-left-over", kernel_size=3, padding=(2, 1)),
    case(1, 368, 96, (6, 7), "1x1-several-panels-and-tiles", kernel_size=1),
    case(2, 64, 32, (10, 12), "1x1-every-second-pixel", kernel_size=1, stride=2),
    case(1, 24, 32, (15, 18), "dilated-lines-with-a-gap", kernel_size=3, dilation=2, padding=3),
    case(1, 32, 48, (300,), "a-row-in-pieces", kernel_size=3, padding=1),
    case(2, 128, 128, (7, 5), "groups", kernel_size=3, padding=1, groups=2),
    case(2, 48, 80, (5, 9), "groups-smaller-than-a-tile", kernel_size=3, padding=1, groups=2),
    case(1, 16, 32, (3, 16, 30), "3d", kernel_size=3, stride=(1, 2, 1), padding=1),
    case(1, 16, 16, (30, 50), "many-chunks", kernel_size=3, padding=1),
]
NOT_BULK = [
    case(2, 3, 64, (9, 9), "few-channels", kernel_size=3),
    case(2, 20, 32, (9, 9), "rows-of-40-bytes", kernel_size=3),
    case(2, 40, 32, (9, 9), "most-of-a-line-unused", kernel_size=1),
    case(1, 16, 16, (3, 5, 40), "chunks-over-two-depths", kernel_size=3, padding=1),
    case(1, 16, 16, (40, 30), "more-than-every-eighth-pixel", kernel_size=1, stride=(9, 1)),
]


def channels_last(*factors):
    return [factor.movedim(1, -1).contiguous().movedim(-1, 1) for factor in factors]


def in_bulk(what, act, grad, geometry):
    text = gf.explain(f"conv_{what}", act, grad, **geometry).route
    assert text.endswith(("fetched by bulk tensor copies", "fetched by cp.async"))
    return text.endswith("bulk tensor copies")


@pytest.mark.parametrize(
    "each, dtype",
    [
        pytest.param(*each.values, dtype, id=f"{each.id}-{dtype}")
        for dtype, cases in ((torch.bfloat16, BULK), (torch.float16, BULK[:2]))
        for each in cases
    ],
)
def test_bulk_copies_and_cp_async_give_the_same_bits(emulator, each, dtype):
    act, grad = channels_last(*each.factors(dtype))
    assert in_bulk("sqnorm", act, grad, each.geometry)
    first = check("tiles", act, grad, each.geometry, dtype)
    assert torch.equal(by_route("tiles_cp_async", act, grad, each.geometry), first)
    for order in (1, 2):
        emulator.set_order(order)
        assert torch.equal(by_route("tiles", act, grad, each.geometry), first), "the order of threads shows"


SEVERAL_EXAMPLES_A_BLOCK = case(5, 512, 512, (3, 3), "groups", kernel_size=3, padding=1, groups=64)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("each", [*BULK[:3], SEVERAL_EXAMPLES_A_BLOCK])
def test_bulk_copies_for_moments(emulator, each, order):
    act, grad = channels_last(*each.factors(torch.bfloat16))
    assert in_bulk("moments", act, grad, each.geometry)
    expected = both_moments("tiles_cp_async", act, grad, each.geometry, True)
    emulator.set_order(order)
    assert torch.equal(both_moments("tiles", act, grad, each.geometry, True), expected)


def test_what_the_device_and_the_layout_cannot_is_fetched_by_cp_async(emulator):
    act, grad = channels_last(*BULK[0].values[0].factors(torch.bfloat16))
    geometry = BULK[0].values[0].geometry
    first = by_route("tiles", act, grad, geometry)
    assert in_bulk("sqnorm", act, grad, geometry)
    assert in_bulk("sqnorm", *BULK[0].values[0].factors(torch.bfloat16), geometry), "copied to channels-last first"
    for capability, encodes in ((8, True), (9, False)):
        emulator.set_device(capability, encodes)
        assert not in_bulk("sqnorm", act, grad, geometry) and not in_bulk("moments", act, grad, geometry)
        assert torch.equal(by_route("tiles", act, grad, geometry), first)
    emulator.set_device(9, True)
    expanded = grad[:, :, :1, :1].expand_as(grad)
    for a, g in ((act, expanded), (act.float(), grad.float()), (act.double(), grad.double())):
        assert not in_bulk("sqnorm", a, g, geometry)
        check("tiles", a, g, geometry, a.dtype)


@pytest.mark.parametrize("each", NOT_BULK)
def test_shapes_that_bulk_copies_do_not_fit(emulator, each):
    act, grad = channels_last(*each.factors(torch.bfloat16))
    assert not in_bulk("sqnorm", act, grad, each.geometry)
    check("tiles", act, grad, each.geometry, torch.bfloat16)


OTHER_ROUTES = [
    pytest.param(route, *each.values, id=f"{route}-{each.id}")
    for route, cases in (("tiles_tf32", [*NOT_EMPTY, *LARGE[:8]]), ("correlate", NOT_EMPTY))
    for each in cases
]


@pytest.mark.parametrize("route, each", OTHER_ROUTES)
def test_routes_are_right_where_they_would_not_be_chosen(emulator, each, route):
    act, grad = (factor.bfloat16().float() for factor in each.factors())  # exact in tf32
    check(route, act, grad, each.geometry, torch.float32, bias=True)


def test_tf32_rounds_to_nearest(emulator):
    act, grad = torch.randn(3, 16, 9, 9), torch.randn(3, 24, 9, 9)
    geometry = {"kernel_size": 3, "padding": 1}
    oracle = conv_grads(act, grad, **geometry).square().sum((1, 2))
    error = (by_route("tiles_tf32", act, grad, geometry) - oracle).abs() / oracle
    assert 1e-7 < error.max() < 3e-4, "rounded to 11 bits, without a bias"


def test_torchs_precision_setting_chooses_tensor_cores(emulator, monkeypatch):
    act, grad = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 4, 4)
    for setting, route in (("highest", "tiles"), ("high", "tiles"), ("medium", "tiles_tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert _conv_cuda.choose(act, grad, 1) == route
        assert _conv_cuda.choose(act.double(), grad.double(), 1) == "tiles"
        assert _conv_cuda.choose(act.bfloat16(), grad.bfloat16(), 1) == "tiles"
        assert _conv_cuda.choose(act, grad, 8) == "correlate"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_any_layout_gives_the_same_bits(emulator, groups, dtype):
    act, grad = torch.randn(2, 16, 7, 9).to(dtype), torch.randn(2, 32, 7, 9).to(dtype)
    geometry = {"kernel_size": 3, "padding": 1, "groups": groups}
    first = check("tiles", act, grad, geometry, dtype)
    last = act.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last)
    odd = torch.zeros(2, 7, 9, 17, dtype=dtype)  # channels side by side, but no row starts at a multiple of 16 bytes
    odd[..., 1:] = act.movedim(1, -1)
    flipped = act.transpose(2, 3).contiguous().transpose(2, 3), grad[:, :, :, :]
    for a, g in (last, (odd[..., 1:].movedim(-1, 1), last[1]), flipped, (act, last[1])):
        assert torch.equal(by_route("tiles", a, g, geometry), first)


@pytest.mark.parametrize("route", ["tiles", "tiles_tf32", "correlate"])
def test_non_finite_factors_stay_in_their_own_row(emulator, route):
    act, grad = torch.randn(4, 12, 6, 7), torch.randn(4, 9, 6, 7)
    geometry = {"kernel_size": 3, "padding": 1, "groups": 3}
    clean = by_route(route, act, grad, geometry)
    act[1, 2, 0, 0], grad[3, 8, 5, 6] = float("nan"), float("inf")
    out = by_route(route, act, grad, geometry)
    assert torch.equal(out[::2], clean[::2]) and not out[1::2].isfinite().any()


def both_moments(route, act, grad, geometry, bias):
    return torch.stack(moments.by_cuda_route(route, *prepare(act, grad, bias=bias, **geometry)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("each", LARGE)
def test_moments_over_several_tiles_chunks_and_slices(emulator, each, dtype):
    act, grad = each.factors(dtype)
    act, grad = (torch.cat([factor, factor.flip(2), factor * 2]) for factor in (act, grad))
    route, bias = "tiles" if each.geometry.get("groups", 1) < 3 else "correlate", dtype == torch.float32
    exact, rough = (
        torch.stack([G.sum(0), G.square().sum(0)])
        for G in (conv_grads(act, grad, bias, dtype=d, **each.geometry) for d in (torch.float64, torch.float32))
    )
    first = both_moments(route, act, grad, each.geometry, bias)
    for found, oracle, eager in zip(first, exact, rough):
        assert_close_to_oracle(found, oracle, eager, dtype)
    emulator.set_order(2)
    assert torch.equal(both_moments(route, act, grad, each.geometry, bias), first), "the order of threads shows"


@pytest.mark.parametrize("route, each", OTHER_ROUTES[::3])
def test_moments_by_routes_that_would_not_be_chosen(emulator, each, route):
    act, grad = (factor.bfloat16().float() for factor in each.factors())
    exact, rough = (
        torch.stack([G.sum(0), G.square().sum(0)])
        for G in (conv_grads(act, grad, True, dtype=d, **each.geometry) for d in (torch.float64, torch.float32))
    )
    for found, oracle, eager in zip(both_moments(route, act, grad, each.geometry, True), exact, rough):
        assert_close_to_oracle(found, oracle, eager, torch.float32)
