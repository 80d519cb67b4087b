"""Every op on CUDA tensors against the reference on the CPU: the same grids, the same tolerances.

Skipped without a CUDA device. ``GRADCLUST_TEST_DEVICE=cpu`` runs the same tests on CPU tensors, which proves the tests.
"""

from __future__ import annotations

import importlib
import inspect
import os
from functools import partial

import conv_cases
import pytest
import torch
from tolerances import ATOL, assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast import sketching
from gradclust_fast._dispatch import BACKENDS, OPS

DEVICE = os.environ.get("GRADCLUST_TEST_DEVICE", "cuda")
needs_device = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="torch sees no CUDA device; run it on a GPU machine"
)


def on_device(test):
    return pytest.mark.gpu(needs_device(test))


@pytest.fixture(autouse=True)
def ieee_convolutions(monkeypatch):
    """PyTorch's own convolutions round float32 to tf32 by default, which is no error of an op that takes them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


K = 5
LINEAR = [  # B, positions, I, O, why
    pytest.param(0, (), 3, 2, id="empty-batch"),
    pytest.param(1, (), 1, 1, id="all-ones"),
    pytest.param(300, (), 65, 33, id="vector-many-warps"),
    pytest.param(3, (0,), 4, 5, id="no-positions"),
    pytest.param(4, (7,), 33, 17, id="sequence-gram"),
    pytest.param(2, (67,), 5, 9, id="sequence-direct"),
    pytest.param(2, (3, 50), 130, 66, id="several-tiles"),
]
POINTS = [  # N, R, K, why
    pytest.param(0, 4, 2, id="no-points"),
    pytest.param(1, 1, 1, id="all-ones"),
    pytest.param(257, 33, 7, id="ragged"),
    pytest.param(1000, 130, 64, id="several-tiles"),
    pytest.param(5, 3, 9, id="more-clusters-than-points"),
]


def sides(I: int, O: int, dtype: torch.dtype, bias: bool) -> dict:
    return {"left": torch.randn(O, 3).to(dtype), "right": torch.randn(I + bias, 4).to(dtype)}


def centers(I: int, O: int, dtype: torch.dtype, bias: bool) -> dict:
    return {"center_grad": torch.randn(K, O).to(dtype), "center_act": torch.randn(K, I + bias).to(dtype)}


EXTRA = {  # what each quantity needs beyond act and grad
    "sqnorm": lambda *_: {},
    "gram": lambda *_: {},
    "moments": lambda *_: {},
    "weight_sqnorm": lambda *_: {},
    "sketch": sides,
    "dot": centers,
    "quantities": lambda *shape: {"sqnorm": True, **sides(*shape), **centers(*shape)},
}


def to(value, device=None, dtype=None):
    """Tensors moved and, where floating, cast; everything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device=device, dtype=dtype if value.is_floating_point() else None)


def outputs(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [each for each in result if each is not None]


def runnable(name: str, args: tuple, kwargs: dict) -> list[str]:
    """The backends that this op can be forced onto with these arguments."""
    found = []
    for backend in BACKENDS:
        with gf.backend(backend):
            if gf.explain(name, *args, **kwargs).backend is not None:
                found.append(backend)
    return found


def check(name: str, args: tuple, kwargs: dict, dtype: torch.dtype) -> None:
    """Every backend that runs on the device, and the automatic choice, against float64 on the CPU."""
    op = getattr(gf.ops, name)
    with gf.backend("reference"):
        double = [to(each, dtype=torch.float64) for each in args]
        oracle = outputs(op(*double, **{key: to(each, dtype=torch.float64) for key, each in kwargs.items()}))
        eager = outputs(op(*args, **kwargs))
    args = tuple(to(each, DEVICE) for each in args)
    kwargs = {key: to(each, DEVICE) for key, each in kwargs.items()}
    for backend in ["auto", *runnable(name, args, kwargs)]:
        with gf.backend(backend):
            found = outputs(op(*args, **kwargs))
            again = outputs(op(*args, **kwargs))
        for each, same, exact, rough in zip(found, again, oracle, eager, strict=True):
            assert each.device.type == DEVICE
            assert torch.equal(each.nan_to_num(), same.nan_to_num()), f"{backend}: two runs differ"
            assert each.dtype == rough.dtype
            assert_close_to_oracle(each, exact, rough, dtype)


TABLES = [  # B, positions, V, D, padding_idx, why
    pytest.param(0, (3,), 5, 4, None, id="empty-batch"),
    pytest.param(5, (), 9, 3, -1, id="one-position"),
    pytest.param(4, (7,), 3, 33, 1, id="rows-repeat"),
    pytest.param(40, (3, 30), 5000, 130, None, id="several-tiles"),
    pytest.param(3, (150,), 2, 20, None, id="rows-that-everybody-looks-up"),
]


def test_every_op_is_covered_here():
    linear = {f"grad_{what}" for what in EXTRA}
    conv = {f"conv_{what}" for what in EXTRA}
    points = {"assign", "assign_points", "cluster_sums", "exact_moves"}
    tables = {f"embedding_{what}" for what in EXTRA}
    assert set(gf.ops.__all__) <= linear | conv | tables | points | {"norm_grads", "sign_product"}
    assert set(gf.ops.__all__) == set(OPS)


@on_device
@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("B, positions, I, O", LINEAR)
@pytest.mark.parametrize("what", [what for what in EXTRA if f"grad_{what}" in OPS])
def test_linear_ops(what, dtype, B, positions, I, O, bias):
    act, grad = torch.randn(B, *positions, I).to(dtype), torch.randn(B, *positions, O).to(dtype)
    check(f"grad_{what}", (act, grad), {"bias": bias, **EXTRA[what](I, O, dtype, bias)}, dtype)


@on_device
@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("case", conv_cases.GRID)
@pytest.mark.parametrize("what", [what for what in EXTRA if f"conv_{what}" in OPS])
def test_convolution_ops(what, case, bias):
    act, grad = case.factors()
    if 0 in act.shape[2:]:
        pytest.skip("no positions")
    geometry = {"groups": 1, **case.geometry}
    size = geometry["kernel_size"]
    taps = size ** len(case.size) if isinstance(size, int) else torch.Size(size).numel()
    extra = EXTRA[what](case.C // geometry["groups"] * taps, case.O, torch.float32, bias)
    check(f"conv_{what}", (act, grad), {"bias": bias, **geometry, **extra}, torch.float32)


CONV_SIDES = {  # op and tensors from O = 72, I = 40 · 9 + 1
    "both-sides": ("conv_sketch", {"left": (72, 9), "right": (361, 5)}),
    "a-narrow-left": ("conv_sketch", {"left": (72, 3), "right": (361, 17)}),
    "left": ("conv_sketch", {"left": (72, 3)}),
    "right": ("conv_sketch", {"right": (361, 17)}),
    "no-side": ("conv_sketch", {}),
    "centres-of-rank-3": ("conv_dot", {"center_grad": (9, 3, 72), "center_act": (9, 3, 361)}),
    "norms": ("conv_sqnorm", {}),
    "moments": ("conv_moments", {}),
}


@on_device
@pytest.mark.parametrize("name, shapes", CONV_SIDES.values(), ids=CONV_SIDES)
def test_convolutions_over_several_tiles_and_in_graphs(dtype, name, shapes):
    act, grad = torch.randn(5, 40, 9, 11).to(dtype), torch.randn(5, 72, 9, 11).to(dtype)
    sides = {key: torch.randn(shape).to(dtype) for key, shape in shapes.items()}
    geometry = {"kernel_size": 3, "padding": 1, "bias": True}
    check(name, (act, grad), {**geometry, **sides}, dtype)
    if DEVICE != "cuda":
        return
    op, args, kwargs = (
        getattr(gf.ops, name),
        (act.cuda(), grad.cuda()),
        {key: to(each, DEVICE) for key, each in sides.items()},
    )
    with gf.backend("cuda"):
        expected = outputs(op(*args, **geometry, **kwargs))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs(op(*args, **geometry, **kwargs))
    for each in captured:
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@on_device
@pytest.mark.parametrize("B, positions, V, D, padding_idx", TABLES)
@pytest.mark.parametrize("what", [what for what in EXTRA if f"embedding_{what}" in OPS])
def test_embedding_ops(what, dtype, B, positions, V, D, padding_idx):
    if DEVICE == "cpu":
        B = min(B, 6)  # Triton's interpreter would take minutes
    index, grad = torch.randint(V, (B, *positions)), torch.randn(B, *positions, D).to(dtype)
    options = {"num_embeddings": V, "padding_idx": padding_idx}
    check(f"embedding_{what}", (index, grad), {**options, **looked_up_in(what, V, D, dtype)}, dtype)


def looked_up_in(what: str, V: int, D: int, dtype: torch.dtype) -> dict:
    """What an op of embedding tables needs beyond index and grad."""
    return {
        "sketch": {"left": torch.randn(V, 3).to(dtype), "right": torch.randn(D, 4).to(dtype)},
        "dot": {"center_index": torch.randn(K, V).to(dtype), "center_grad": torch.randn(K, D).to(dtype)},
    }.get(what, {})


@on_device
@pytest.mark.parametrize("B, T", [(200, 6), (24, 300)], ids=["short", "long"])
@pytest.mark.parametrize("what", [what for what in EXTRA if f"embedding_{what}" in OPS])
def test_embedding_ops_repeat_their_bits_and_are_captured_in_graphs(what, B, T):
    V, D = 40, 72
    if DEVICE != "cuda":
        B, T = 4, T // 6
    index, grad = torch.randint(V, (B, T), device=DEVICE), torch.randn(B, T, D, device=DEVICE)
    extra = {key: to(each, DEVICE) for key, each in looked_up_in(what, V, D, torch.float32).items()}
    op = partial(getattr(gf.ops, f"embedding_{what}"), num_embeddings=V, padding_idx=1, **extra)
    for backend in runnable(f"embedding_{what}", (index, grad), {"num_embeddings": V, "padding_idx": 1, **extra}):
        with gf.backend(backend):
            expected = outputs(op(index, grad))
            for _ in range(100 if DEVICE == "cuda" and backend != "reference" else 1):
                assert all(map(torch.equal, expected, outputs(op(index, grad)))), f"{backend}: two runs differ"
            if DEVICE != "cuda" or backend == "reference":
                continue
            stream = torch.cuda.Stream()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = outputs(op(index, grad))
            index.copy_(index.flip(0))
            grad.copy_(torch.randn_like(grad))
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(torch.equal, captured, outputs(op(index, grad)))), f"{backend}: a replay differs"


@on_device
@pytest.mark.parametrize(
    "shape, options", [((3, 50, 130), {}), ((70, 33), {"rms": True}), ((5, 12, 9, 7), {"groups": 4})]
)
def test_norm_grads(dtype, shape, options):
    check("norm_grads", (torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)), options, dtype)


@on_device
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("B, D, R", [(0, 5, 3), (3, 0, 4), (1, 127, 65), (300, 1030, 70), (70, 45, 8500)])
def test_sign_product(dtype, B, D, R, transposed):
    vectors, key = torch.randn(B, D).to(dtype), (0x12345678, 0x9ABCDEF0)
    check("sign_product", (vectors, R, key, 0.3), {"transposed": transposed}, dtype)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_with_signs_are_exact_and_the_same_in_any_batch(dtype):
    key, cpu = (0x12345678, 0x9ABCDEF0), torch.device("cpu")
    values = torch.cat([torch.randn(600, dtype=dtype), torch.tensor([3.4e38, 1e-30, 16777215.0], dtype=dtype)])
    expected = sketching.sign_matrix(8500, 603, key, dtype, cpu).T * values[:, None]
    args = (values.diag().to(DEVICE), 8500, key)
    for backend in runnable("sign_product", args, {}):
        with gf.backend(backend):
            assert torch.equal(gf.ops.sign_product(*args).cpu(), expected)
            if backend == "reference":
                continue  # a library's product depends on its shape
            vectors = torch.randn(200, 700, dtype=dtype, device=DEVICE)
            whole = gf.ops.sign_product(vectors, 8500, key)
            assert torch.equal(gf.ops.sign_product(vectors[:1], 8500, key), whole[:1])
            assert torch.equal(gf.ops.sign_product(vectors, 70, key), whole[:, :70])


@on_device
@pytest.mark.parametrize("N, R, clusters", POINTS)
def test_cluster_sums(dtype, N, R, clusters):
    points, labels = torch.randn(N, R).to(dtype), torch.randint(clusters, (N,))
    check("cluster_sums", (points, labels, clusters), {}, dtype)


@on_device
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("N, R, clusters", POINTS)
@pytest.mark.parametrize("name", ["assign", "assign_points"])
def test_assignments_reach_the_least_cost(name, dtype, N, R, clusters, counted):
    points, centers = torch.randn(N, R).to(dtype), torch.randn(clusters, R).to(dtype)
    counts = torch.randint(1, 20, (clusters,)) if counted else None
    weight = counts.double() + 1 if counted else torch.ones(clusters, dtype=torch.float64)
    costs = weight * (points.double()[:, None] - centers.double()).square().sum(2)  # [N, K]
    args = (points, centers)
    if name == "assign":
        args = (points.float() @ centers.float().T, centers.float().square().sum(1), points.float().square().sum(1))
    args = tuple(to(each, DEVICE) for each in (*args, counts))
    # the three terms of a squared distance cancel: the allowance is relative to their size, not to the cost
    scale = weight.max() * (points.double().square().sum() + centers.double().square().sum() + 1)
    for backend in ["auto", *runnable(name, args, {})]:
        with gf.backend(backend):
            label, cost = getattr(gf.ops, name)(*args)
        if N == 0:
            assert label.shape == cost.shape == (0,)
            continue
        reached = costs.gather(1, label.cpu()[:, None]).squeeze(1)
        assert (reached - costs.min(1).values).max() <= ATOL[torch.float32] * scale
        assert (cost.double().cpu() - reached).abs().max() <= ATOL[torch.float32] * scale


@on_device
@pytest.mark.parametrize("N, R, clusters", POINTS)
def test_exact_moves_lower_j_and_one_at_a_time_decide_as_on_the_cpu(N, R, clusters):
    points, labels = torch.randn(N, R), torch.randint(clusters, (N,))
    with gf.backend("reference"):
        expected = gf.ops.exact_moves(points, labels, clusters, seed=3)
    args = (points.to(DEVICE), labels.to(DEVICE), clusters, 3)
    for backend in ["auto", *runnable("exact_moves", args, {})]:
        if backend == "triton" and DEVICE == "cpu" and N * clusters > 10_000:
            continue  # its interpreter would take minutes
        with gf.backend(backend):
            chosen = gf.explain("exact_moves", *args).backend
            found = [each.cpu() for each in gf.ops.exact_moves(*args)]
            assert all(torch.equal(each, again.cpu()) for each, again in zip(found, gf.ops.exact_moves(*args)))
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-9)
        assert found[2] <= found[1] and found[3] == (found[0] != labels).sum()
        if chosen in ("triton", "cuda"):  # many rows at once: its own labels
            with gf.backend("reference"):
                J = gf.ops.exact_moves(points, found[0], clusters)[1]
            torch.testing.assert_close(found[2], J, rtol=1e-9, atol=1e-9 * float(found[1]) + 1e-12)
        else:
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[2], expected[2], rtol=1e-9, atol=1e-9)


@on_device
@pytest.mark.parametrize("name", ["assign", "assign_points", "cluster_sums", "exact_moves", "sign_product"])
def test_ops_on_points_repeat_their_bits_and_are_captured_in_graphs(name):
    N, R, clusters = (5000, 96, 40) if DEVICE == "cuda" else (50, 6, 4)
    points, labels = torch.randn(N, R, device=DEVICE), torch.randint(clusters, (N,), device=DEVICE)
    centers, counts = torch.randn(clusters, R, device=DEVICE), torch.randint(1, 9, (clusters,), device=DEVICE)
    norms = (centers.square().sum(1), points.square().sum(1))
    args = {
        "assign": (points @ centers.T, *norms, counts),
        "assign_points": (points, centers, counts),
        "cluster_sums": (points, labels, clusters),
        "exact_moves": (points, labels, clusters, 1),
        "sign_product": (points, 300 if DEVICE == "cuda" else 20, (1, 2), 0.1),
    }[name]
    op = getattr(gf.ops, name)
    for backend in runnable(name, args, {}):
        with gf.backend(backend):
            expected = outputs(op(*args))
            for _ in range(100 if DEVICE == "cuda" and backend != "reference" else 2):
                assert all(torch.equal(each, again) for each, again in zip(expected, outputs(op(*args))))
            if DEVICE != "cuda" or backend == "reference":
                continue
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = outputs(op(*args))
        for each in captured:
            each.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(each, again) for each, again in zip(expected, captured))


@on_device
def test_exact_moves_reach_a_local_optimum():
    points, labels = torch.randn(400, 6), torch.randint(12, (400,))
    points, labels = points.to(DEVICE), labels.to(DEVICE)
    for seed in range(100):
        labels, before, after, moved = gf.ops.exact_moves(points, labels, 12, seed)
        assert after <= before
        if moved == 0:
            break
    with gf.backend("reference"):
        assert gf.ops.exact_moves(points, labels, 12)[3] == 0


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, cols", [(0, 3), (1, 1), (5, 127), (300, 1000), (2000, 4096)])
def test_random_signs_are_the_bits_of_the_cpu(rows, cols, dtype):
    key, cpu = (0x12345678, 0x9ABCDEF0), torch.device("cpu")
    expected = sketching.scaled_signs(rows, cols, key, 0.3, dtype, cpu)
    for transposed in (False, True):
        found = sketching.scaled_signs(rows, cols, key, 0.3, dtype, torch.device(DEVICE), transposed)
        assert torch.equal(found.cpu(), expected.T if transposed else expected)


@on_device
def test_nan_stays_in_its_own_row_on_every_backend():
    act, grad = torch.randn(70, 33, device=DEVICE), torch.randn(70, 17, device=DEVICE)
    clean = gf.ops.grad_sqnorm(act, grad)
    act[3, 5] = float("nan")
    for backend in runnable("grad_sqnorm", (act, grad), {}):
        with gf.backend(backend):
            out = gf.ops.grad_sqnorm(act, grad)
        rest = torch.arange(70) != 3
        assert out[3].isnan()
        torch.testing.assert_close(out[rest], clean[rest], rtol=1e-5, atol=0)


@on_device
def test_kernels_run_on_the_current_stream():
    if DEVICE != "cuda":
        pytest.skip("streams are CUDA's")
    stream = torch.cuda.Stream()
    act, grad = torch.zeros(4096, 1024, device=DEVICE), torch.zeros(4096, 1024, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # the fills below are still waiting when the op is queued
        act.fill_(1)
        grad.fill_(2)
        out = gf.ops.grad_sqnorm(act, grad)
    stream.synchronize()
    assert torch.equal(out, torch.full_like(out, 1024 * 4096.0))


def linear_call(what, dtype=torch.float32, positions=(33,)):
    """The name of a linear op, and arguments on the device."""
    act, grad = torch.randn(9, *positions, 40).to(DEVICE, dtype), torch.randn(9, *positions, 24).to(DEVICE, dtype)
    extra = {key: to(each, DEVICE) for key, each in EXTRA[what](40, 24, dtype, False).items()}
    return f"grad_{what}", (act, grad), extra


@on_device
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", EXTRA)
def test_a_hundred_runs_give_the_same_bits(what, half):
    name, args, kwargs = linear_call(what, half)
    for backend in runnable(name, args, kwargs):
        with gf.backend(backend):
            first = outputs(getattr(gf.ops, name)(*args, **kwargs))
            for _ in range(99 if DEVICE == "cuda" else 2):
                again = outputs(getattr(gf.ops, name)(*args, **kwargs))
                assert all(map(torch.equal, again, first)), f"{backend}: two runs differ"


@on_device
@pytest.mark.parametrize("positions", [(), (33,)], ids=["vector", "sequence"])
@pytest.mark.parametrize("what", EXTRA)
def test_triton_kernels_are_captured_in_a_graph(what, positions):
    if DEVICE != "cuda":
        pytest.skip("graphs are CUDA's")
    name, args, kwargs = linear_call(what, positions=positions)
    op = getattr(gf.ops, name)
    if "triton" not in runnable(name, args, kwargs):
        pytest.skip(gf.explain(name, *args, **kwargs).others.get("triton", "no Triton kernel"))
    with gf.backend("triton"), torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            op(*args, **kwargs)  # compiles: not in a graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = outputs(op(*args, **kwargs))
        for tensor in args:
            tensor.copy_(torch.randn_like(tensor))
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(captured, outputs(op(*args, **kwargs)), strict=True):
            assert torch.equal(found, expected)


@on_device
@pytest.mark.parametrize("what", EXTRA)
def test_opcheck_on_the_device(what):
    name, args, kwargs = linear_call(what)
    op = OPS[name]
    torch.library.opcheck(op.overload, op.prepare(*args, **bound(name, args, kwargs)))


def bound(name, args, kwargs):
    """The keyword arguments in the op's order, with its defaults."""
    signature = inspect.signature(getattr(gf.ops, name)).bind(*args, **kwargs)
    signature.apply_defaults()
    return {key: value for key, value in signature.arguments.items() if key not in ("act", "grad")}


BULK = [  # channels-last images of 64 channels, whose tiles bulk tensor copies fetch where the device has them
    pytest.param((30, 40), {"kernel_size": 3, "padding": 1}, id="padded"),
    pytest.param((31, 41), {"kernel_size": 3, "padding": 1, "stride": 2}, id="strided"),
    pytest.param((14, 14), {"kernel_size": 1, "stride": 2}, id="every-second-pixel"),
    pytest.param((28, 28), {"kernel_size": 5, "padding": 2, "dilation": 2, "groups": 2}, id="dilated-groups"),
    pytest.param((6, 8, 32), {"kernel_size": 3, "padding": 1}, id="3d"),
]


def bulk_call(what, size, geometry):
    """The name of a convolution's op, its arguments, and it by a route of one's own choice."""
    act = torch.randn(3, *size, 64, device=DEVICE, dtype=torch.bfloat16).movedim(-1, 1)
    layer = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d][len(size) - 1](64, 128, **geometry)
    grad = torch.randn_like(layer.to(DEVICE, torch.bfloat16)(act)).movedim(1, -1).contiguous().movedim(-1, 1)
    name, module = f"conv_{what}", importlib.import_module(f"gradclust_fast.ops.conv_{what}")
    if "cuda" not in runnable(name, (act, grad), geometry):
        pytest.skip("no CUDA kernels")
    args = OPS[name].prepare(act, grad, **bound(name, (act, grad), geometry))
    return name, (act, grad), lambda route: outputs(module.by_cuda_route(route, *args))


@on_device
@pytest.mark.parametrize("size, geometry", BULK)
@pytest.mark.parametrize("what", ["sqnorm", "moments"])
def test_convolutions_fetched_by_bulk_copies_and_by_cp_async_give_the_same_bits(what, size, geometry):
    name, factors, by_route = bulk_call(what, size, geometry)
    with gf.backend("cuda"):
        route = gf.explain(name, *factors, **geometry).route
        assert ("bulk" in route) == (torch.cuda.get_device_capability() >= (9, 0)), route
    check(name, tuple(factor.cpu() for factor in factors), geometry, torch.bfloat16)
    expected = by_route("tiles_cp_async")
    for _ in range(20):
        assert all(map(torch.equal, by_route("tiles"), expected))


@on_device
@pytest.mark.parametrize("what", ["sqnorm", "moments"])
def test_the_maps_of_bulk_copies_are_part_of_a_captured_launch(what):
    _, _, by_route = bulk_call(what, *BULK[0].values)
    expected = by_route("tiles_cp_async")
    by_route("tiles")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by_route("tiles")
    for each in captured:
        each.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@on_device
def test_recording_gives_the_rows_of_the_cpu():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 10)
    ).double()
    x, y = torch.randn(9, 1, 6, 6).double(), torch.randint(10, (9,))

    def rows(device):
        copy = model.to(device)
        with gf.record(copy, sketch=gf.Sketch(dim=32, seed=1)) as rec:
            torch.nn.functional.cross_entropy(copy(x.to(device)), y.to(device)).backward()
        return rec.sq_norms.cpu(), rec.sketches.cpu()

    for found, expected in zip(rows(DEVICE), rows("cpu")):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@on_device
def test_weights_name_an_index_outside_the_strata():
    sampler = gf.StratifiedBatchSampler(gf.Strata([0, 0, 0, 1], 2), 2)
    assert sampler.weights(torch.tensor([0, 3], device=DEVICE)).tolist() == [1.5, 0.5]
    with pytest.raises(IndexError, match="index 4 is outside the 4 examples"):
        sampler.weights(torch.tensor([0, 4], device=DEVICE))
