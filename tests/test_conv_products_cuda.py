"""``conv_sketch`` and ``conv_dot`` in CUDA, compiled for the CPU: every side and route.

The sizes fill more than one tile, chunk, round of columns and workspace.
"""

from __future__ import annotations

import importlib

import cuda_on_host
import pytest
import torch
from oracle import conv_grads
from test_conv_cuda import BULK, LARGE, OTHER_ROUTES, channels_last
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast.ops import _conv_products
from gradclust_fast.ops._conv import prepare

sketch = importlib.import_module("gradclust_fast.ops.conv_sketch")
dot = importlib.import_module("gradclust_fast.ops.conv_dot")
pytestmark = [
    pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable())),
    pytest.mark.filterwarnings("ignore:Using padding=.same."),
]
KINDS = {  # (op, columns of left or K, columns of right or rank); None is the identity
    "right-meets-G-first": (sketch, 4, 7),
    "left-meets-G-first": (sketch, 3, 17),
    "left-alone": (sketch, 9, None),
    "right-alone": (sketch, None, 2),
    "G-itself": (sketch, None, None),
    "centres": (dot, 9, None),
    "centres-of-rank-3": (dot, 8, 3),
}


@pytest.fixture
def emulator(monkeypatch):
    with gf.backend("cuda"):
        yield cuda_on_host.emulated(monkeypatch)


def tensors(kind: str, O: int, I: int, dtype: torch.dtype) -> list[torch.Tensor | None]:
    op, first, second = KINDS[kind]
    if op is dot:
        lead = (first,) if second is None else (first, second)
        return [torch.randn(*lead, n, dtype=dtype) for n in (O, I)]
    return [None if n is None else torch.randn(size, n, dtype=dtype) for size, n in ((O, first), (I, second))]


def quantity(kind: str, G: torch.Tensor, first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor:
    first, second = (each if each is None else each.to(G.dtype) for each in (first, second))
    if KINDS[kind][0] is dot:
        first, second = (each.reshape(each.shape[0], -1, each.shape[-1]) for each in (first, second))
        return torch.einsum("boi,kro,kri->bk", G, first, second)
    G = G if first is None else first.mT @ G
    return G if second is None else G @ second


def by_route(kind, route, act, grad, sides, geometry, bias=False):
    return KINDS[kind][0].by_cuda_route(route, *prepare(act, grad, *sides, bias=bias, **geometry))


def check(emulator, route, act, grad, geometry, dtype, bias=False, kinds=KINDS):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact, rough = (conv_grads(act, grad, bias, dtype=d, **geometry) for d in (torch.float64, wide))
    for kind in kinds:
        sides = tensors(kind, *exact.shape[1:], wide)
        results = []
        for order in (0, 2):
            emulator.set_order(order)
            results.append(by_route(kind, route, act, grad, sides, geometry, bias))
        assert torch.equal(*results), f"{kind}: the order of threads shows"
        assert results[0].dtype == wide
        assert_close_to_oracle(results[0], quantity(kind, exact, *sides), quantity(kind, rough, *sides), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("each", LARGE)
def test_several_tiles_chunks_and_rounds(emulator, each, dtype):
    route = "tiles" if each.geometry.get("groups", 1) < 3 else "correlate"
    kinds = list(KINDS)[:: 1 if dtype == torch.float32 else 2]
    check(emulator, route, *each.factors(dtype), each.geometry, dtype, dtype != torch.bfloat16, kinds)


@pytest.mark.parametrize("route, each", OTHER_ROUTES[1::3])
def test_routes_are_right_where_they_would_not_be_chosen(emulator, each, route):
    act, grad = (factor.bfloat16().float() for factor in each.factors())  # exact in tf32
    check(emulator, route, act, grad, each.geometry, torch.float32, True, list(KINDS)[1::2])


@pytest.mark.parametrize("each", [BULK[i] for i in (1, 4, 8)])
def test_tiles_fetched_by_bulk_copies_give_the_same_bits(emulator, each):
    act, grad = channels_last(*each.factors(torch.bfloat16))
    for kind in KINDS:
        G = conv_grads(act[:1], grad[:1], **each.geometry)
        sides = tensors(kind, *G.shape[1:], torch.float32)
        found = by_route(kind, "tiles", act, grad, sides, each.geometry)
        assert torch.equal(found, by_route(kind, "tiles_cp_async", act, grad, sides, each.geometry))
        expected = quantity(kind, G, *sides)
        assert (found[:1] - expected).abs().max() <= 1e-5 * expected.abs().max()


def example(B: int = 5) -> tuple[torch.Tensor, torch.Tensor, dict]:
    return torch.randn(B, 12, 6, 7), torch.randn(B, 9, 6, 7), {"kernel_size": 3, "padding": 1, "groups": 3}


@pytest.mark.parametrize("route", ["tiles", "correlate"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_small_workspace_takes_the_batch_in_parts(emulator, monkeypatch, kind, route):
    act, grad, geometry = example()
    sides = tensors(kind, 9, 37, torch.float32)
    whole = by_route(kind, route, act, grad, sides, geometry, True)
    taken, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: taken.append(size) or empty(*size, **kw))
    for room, counts in ((1, [1] * 5), (2, [2, 2, 1])):
        taken.clear()
        monkeypatch.setattr(_conv_products, "WORKSPACE", 1 << 27)
        by_route(kind, route, act, grad, sides, geometry, True)
        example_bytes = 4 * torch.Size(taken.pop()[1:]).numel()
        monkeypatch.setattr(_conv_products, "WORKSPACE", room * example_bytes + 3)
        parts = by_route(kind, route, act, grad, sides, geometry, True)
        assert [size[0] for size in taken] == counts
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)  # torch's products may add in another order
    monkeypatch.setattr(_conv_products, "WORKSPACE", 1)
    taken.clear()
    by_route(kind, route, act, grad, sides, geometry, True)
    assert [size[0] for size in taken] == [1] * 5, "one example at the least"


@pytest.mark.parametrize("route", ["tiles", "tiles_tf32", "correlate"])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_factors_stay_in_their_own_row(emulator, kind, route):
    act, grad, geometry = example(4)
    sides = tensors(kind, 9, 37, torch.float32)
    clean = by_route(kind, route, act, grad, sides, geometry, True)
    act[1, 2, 0, 0], grad[3, 8, 5, 6] = float("nan"), float("inf")
    out = by_route(kind, route, act, grad, sides, geometry, True)
    assert torch.equal(out[::2], clean[::2])
    assert not out[1].isfinite().all() and not out[3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_of_factors_and_sides_gives_the_same_bits(emulator, dtype):
    act, grad, geometry = torch.randn(2, 16, 5, 6).to(dtype), torch.randn(2, 32, 5, 6).to(dtype), {"kernel_size": 2}
    grad = grad[:, :, 1:, 1:]
    last = act.to(memory_format=torch.channels_last), grad.to(memory_format=torch.channels_last)
    for kind in KINDS:
        sides = [each if each is None else each.to(dtype) for each in tensors(kind, 32, 64, torch.float32)]
        odd = [each if each is None else torch.cat([each[:1], each])[1:] for each in sides]  # starts anywhere
        wide = [each if each is None else each.float() for each in sides]
        flipped = [each if each is None else each.mT.contiguous().mT for each in sides]
        first = by_route(kind, "tiles", act, grad, sides, geometry)
        for factors, given in ((last, sides), ((act, grad), odd), ((act, grad), wide)):
            assert torch.equal(by_route(kind, "tiles", *factors, given, geometry), first)
        close = by_route(kind, "tiles", act, grad, flipped, geometry)
        torch.testing.assert_close(close, first, rtol=1e-5, atol=1e-4)  # torch's product of the second side


def plan(op: str, C: int, O: int, size: int, dtype: torch.dtype, *columns: int, kernel_size: int = 3, groups: int = 1):
    act, grad = torch.zeros(1, C, size, size, dtype=dtype), torch.zeros(1, O, size, size, dtype=dtype)
    I = C // groups * kernel_size**2
    shapes = zip((O, I), columns) if op == "conv_sketch" else ((columns[0], O), (columns[0], I))
    sides = [torch.zeros(shape) for shape in shapes]
    with gf.backend("auto"):
        return gf.explain(op, act, grad, *sides, kernel_size=kernel_size, padding=kernel_size // 2, groups=groups)


def test_explain_says_where_filters_take_fewer_flops(emulator):
    for op, columns in (("conv_sketch", (32, 32)), ("conv_dot", (32,))):
        many = plan(op, 64, 64, 56, torch.bfloat16, *columns)
        assert many.backend == "cuda" and "fetched by bulk tensor copies, multiplied on the chip" in many.route
        few = plan(op, 512, 512, 7, torch.bfloat16, *columns)
        assert few.backend != "cuda" and "as filters of torch's convolution it takes" in few.others["cuda"]
        assert plan(op, 64, 64, 56, torch.float32, *columns).backend != "cuda", "float32 has no tensor cores"
        depthwise = plan(op, 384, 384, 14, torch.bfloat16, *columns, groups=384)
        assert depthwise.backend == "cuda" and depthwise.route.startswith("one short correlation")
    with gf.backend("cuda"):
        act, grad = torch.zeros(2, 0, 5, 5), torch.zeros(2, 4, 5, 5)
        assert gf.explain("conv_sketch", act, grad, kernel_size=1).route.startswith("nothing to sum")


def test_more_columns_than_offsets_reach_are_refused(emulator):
    act, grad = torch.zeros(1, 1, 1, 1).expand(1, 1 << 29, 1, 1), torch.zeros(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"conv_sketch: .*takes fewer than 2²⁸ columns of G_b"):
        gf.ops.conv_sketch(act, grad, torch.zeros(1, 1), None, kernel_size=1)


def test_empty_results(emulator):
    geometry = {"kernel_size": 3, "padding": 1, "groups": 2, "bias": True}
    for B, C, O in ((0, 4, 6), (3, 0, 6), (3, 4, 0)):
        act, grad = torch.randn(B, C, 5, 5), torch.randn(B, O, 5, 5)
        I = C // 2 * 9 + 1
        for P, Q in ((2, 3), (0, 3), (2, 0)):
            out = gf.ops.conv_sketch(act, grad, torch.ones(O, P), torch.ones(I, Q), **geometry)
            assert out.shape == (B, P, Q)
            if C == 0:  # the bias is all that is left
                torch.testing.assert_close(
                    out, grad.sum((1, 2, 3))[:, None, None].expand(B, P, Q), rtol=1e-5, atol=1e-4
                )
        for K, rank in ((4, 2), (4, 0), (0, 2)):
            out = gf.ops.conv_dot(act, grad, torch.ones(K, rank, O), torch.ones(K, rank, I), **geometry)
            assert out.shape == (B, K) and (rank or not out.any())
