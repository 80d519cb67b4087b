from __future__ import annotations

import importlib

import pytest
import torch
from conv_cases import DTYPE_AND_BIAS, GRID, Case
from oracle import conv_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast.ops._conv import prepare
from gradclust_fast.ops._conv_routes import GRADIENT_ROUTES

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.")  # the oracle, with an even kernel
module = importlib.import_module("gradclust_fast.ops.conv_weight_sqnorm")
needs_kernel = pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))
# More examples than are packed together and than a part of the batch holds; several units; several blocks of positions.
LARGE = [
    pytest.param(Case(101, 40, 70, (3, 4), {"kernel_size": 3, "padding": 1}), id="many-examples"),
    pytest.param(Case(9, 70, 150, (6, 6), {"kernel_size": 3}), id="many-channels"),
    pytest.param(Case(2, 5, 37, (20, 31), {"kernel_size": 3, "padding": 1}), id="many-positions"),
    pytest.param(Case(70, 4, 3, (2, 2), {"kernel_size": 1}), id="many-small-examples"),
    pytest.param(Case(12, 24, 24, (3, 3), {"kernel_size": 3, "padding": 1, "groups": 24}), id="depthwise"),
]


@pytest.fixture(params=GRADIENT_ROUTES)
def route(request, monkeypatch):
    """The C++ version by each of its routes, whatever it would choose."""
    if _native.cpu_unavailable() is not None:
        pytest.skip(str(_native.cpu_unavailable()))
    monkeypatch.setattr(module, "cheapest", lambda _: request.param)
    with gf.backend("cpu"):
        yield request.param


def check(case: Case, dtype: torch.dtype, bias: bool) -> None:
    act, grad = case.factors(dtype)
    found = gf.ops.conv_weight_sqnorm(act, grad, bias=bias, **case.geometry)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert {each.dtype for each in found} == {acc}
    G, eager = (conv_grads(act, grad, bias, dtype=d, **case.geometry) for d in (torch.float64, acc))
    assert_close_to_oracle(found[0], G.sum(0), eager.sum(0), dtype)
    assert_close_to_oracle(found[1], G.square().sum((1, 2)), eager.square().sum((1, 2)), dtype)


@pytest.mark.parametrize("dtype, bias", DTYPE_AND_BIAS)
@pytest.mark.parametrize("case", GRID)
def test_matches_one_example_at_a_time(case, dtype, bias, backend):
    check(case, dtype, bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", [*GRID, *LARGE])
def test_every_route_is_right_on_every_geometry(case, bias, route):
    check(case, torch.float32, bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [each for each in GRID if each.id in ("all-different", "grouped", "3d")])
def test_every_route_reads_every_dtype(case, dtype, route):
    check(case, dtype, True)


def problem(B=35, C=20, O=18, size=(5, 4)):
    return torch.randn(B, C, *size), torch.randn(B, O, *size), {"kernel_size": 3, "padding": 1}


def test_strided_inputs_read_their_own_elements(route):
    act, grad, geometry = problem()
    expected = gf.ops.conv_weight_sqnorm(act, grad, **geometry)
    wide = torch.full((70, 20, 10, 4), float("nan"))
    wide[::2, :, ::2] = act
    for a, d in (
        (wide[::2, :, ::2], grad.to(memory_format=torch.channels_last)),
        (act.to(memory_format=torch.channels_last), grad.transpose(2, 3).contiguous().transpose(2, 3)),
    ):
        torch.testing.assert_close(gf.ops.conv_weight_sqnorm(a, d, **geometry), expected, rtol=1e-5, atol=1e-4)


def test_nan_stays_in_its_own_row(route):
    act, grad, geometry = problem()
    clean = gf.ops.conv_weight_sqnorm(act, grad, **geometry)[1]
    act[4, 2, 3, 1] = float("nan")
    weight_grad, sqnorm = gf.ops.conv_weight_sqnorm(act, grad, **geometry)
    rest = torch.arange(35) != 4
    assert sqnorm[4].isnan() and torch.equal(sqnorm[rest], clean[rest])
    assert weight_grad.unflatten(1, (20, 9))[:, 2].isnan().any()
    assert weight_grad.unflatten(1, (20, 9))[:, 3].isfinite().all()


@needs_kernel
@pytest.mark.parametrize("name", GRADIENT_ROUTES)
def test_the_thread_count_changes_nothing(name):
    act, grad, geometry = problem()
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(module.by_route(name, *prepare(act, grad, **geometry)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for each in results for a, b in zip(each, results[0]))


@needs_kernel
@pytest.mark.parametrize("groups, route", [(1, "direct"), (16, "one short correlation")])
def test_explain_names_the_route(groups, route):
    act, grad = torch.zeros(4, 16, 8, 8), torch.zeros(4, 16, 8, 8)
    with gf.backend("cpu"):
        found = gf.explain("conv_weight_sqnorm", act, grad, kernel_size=3, padding=1, groups=groups).route
    assert found.startswith("one pass") and route in found.split(":")[0]


def test_bad_arguments_are_those_of_every_conv_op():
    with pytest.raises(ValueError, match="grad must have spatial size"):
        gf.ops.conv_weight_sqnorm(torch.zeros(2, 3, 5, 5), torch.zeros(2, 4, 5, 5), kernel_size=3)


def test_opcheck():
    act, grad = torch.randn(3, 4, 6, 5), torch.randn(3, 6, 6, 5)
    args = prepare(act, grad, kernel_size=3, padding=1, groups=2, bias=True)
    torch.library.opcheck(torch.ops.gradclust_fast.conv_weight_sqnorm.default, args)
