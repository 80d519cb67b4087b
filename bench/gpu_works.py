"""The works of ``bench.gpu_bars``: tensors at the size of each bar, ours, what it is compared with, and the bars."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import gradclust_fast as gf
from bench.gpu_meter import Figure, Meter, ratio
from bench.training.models import GPU_TASKS, SMALL_TASKS
from bench.training.steps import PACKAGES, REMEDY, WAYS, plain, recorded
from gradclust_fast._dispatch import OPS
from gradclust_fast.sketching import scaled_signs

HALF = torch.bfloat16


@dataclass(frozen=True)
class Work:
    work: str
    figures: Callable[[Meter], Iterator[Figure]]


def _against(
    meter: Meter, ours: Callable[[], Any], others: dict[str, Callable[[], Any]], bars: dict[str, float] | None = None
) -> Iterator[Figure]:
    """How many times faster ours is than each of the others; one that raises is named and passed over."""
    for name, other in others.items():
        measure = f"times faster than {name}"
        try:
            times = meter.times({"ours": ours, name: other})
            yield Figure(measure, ratio(times[name], times["ours"]), least=(bars or {}).get(name))
        except Exception as error:  # a peer's fault must not cost the other rows
            yield Figure(measure, None, least=(bars or {}).get(name), error=reason(error))


def _rates(
    meter: Meter,
    ours: Callable[[], Any],
    seconds: float | None,
    measure: str,
    least: float | None,
    cold_least: float | None = None,
) -> Iterator[Figure]:
    """The share of a floor of ``seconds`` that ours reaches, with the cache hot and cold."""
    for cold in (False, True):
        time = meter.times({"ours": ours}, cold=cold)["ours"]
        bar = cold_least if cold else least
        yield Figure(f"{measure}, L2 {'cold' if cold else 'hot'}", ratio(seconds, time), least=bar)
        yield Figure(f"microseconds, L2 {'cold' if cold else 'hot'}", None if time is None else 1e6 * time)


def sequence_norms(meter: Meter) -> Iterator[Figure]:
    B, T, I, O = meter.sizes((32, 1024, 4096, 4096), (2, 20, 24, 16))
    act, grad = meter.randn(B, T, I, dtype=HALF), meter.randn(B, T, O, dtype=HALF)

    def ours() -> torch.Tensor:
        return gf.ops.grad_sqnorm(act, grad)

    def products() -> torch.Tensor:
        return ((act @ act.mT) * (grad @ grad.mT)).sum((1, 2))

    useful = min(B * T * (T + 1) * (I + O), 2 * B * T * I * O)
    yield from _rates(meter, ours, _seconds(meter, useful, HALF), "useful FLOPs ÷ measured GEMM rate", 0.45)
    yield from _against(meter, ours, {"batched GEMMs, multiply, sum": products}, {"batched GEMMs, multiply, sum": 3.0})
    peak = meter.peak(ours)
    yield Figure("workspace ÷ inputs", ratio(peak, act.nbytes + grad.nbytes), most=0.01)
    yield from _against(meter, ours, {"the same, torch.compile(max-autotune)": meter.compiled(products)})


def _seconds(meter: Meter, flops: float, dtype: torch.dtype) -> float | None:
    return flops / meter.ceilings.gemm_rate(dtype) if meter.measures else None


def _moved(meter: Meter, *tensors: torch.Tensor) -> float | None:
    """Seconds that the measured bandwidth takes for these tensors."""
    return sum(tensor.nbytes for tensor in tensors) / meter.bandwidth() if meter.measures else None


def vector_norms(meter: Meter) -> Iterator[Figure]:
    (B,) = meter.sizes((262_144,), (50,))
    act, grad = meter.randn(B, 1024), meter.randn(B, 1024)

    def ours() -> torch.Tensor:
        return gf.ops.grad_sqnorm(act, grad)

    def norms() -> torch.Tensor:
        return (torch.linalg.vector_norm(act, dim=1) * torch.linalg.vector_norm(grad, dim=1)).square()

    copied = (act.nbytes + grad.nbytes) / meter.ceilings.copy_bandwidth() if meter.measures else None
    yield from _rates(meter, ours, copied, "of the measured copy bandwidth", 0.85)
    yield from _against(meter, ours, {"vector_norm product": norms})
    yield from _against(meter, ours, {"the same, torch.compile(max-autotune)": meter.compiled(norms)})


def quantities(meter: Meter) -> Iterator[Figure]:
    B, T, I, O = meter.sizes((512, 128, 4096, 4096), (2, 8, 32, 16))
    act, grad = meter.randn(B, T, I, dtype=HALF), meter.randn(B, T, O, dtype=HALF)
    aux = {"left": (O, 16), "right": (I, 16), "center_grad": (64, O), "center_act": (64, I)}
    sides = {name: meter.randn(*shape, dtype=HALF) for name, shape in aux.items()}

    def ours() -> Any:
        return gf.ops.grad_quantities(act, grad, **sides)

    def expressions() -> Any:
        dot = ((act @ sides["center_act"].mT) * (grad @ sides["center_grad"].mT)).sum(1)
        return (grad @ sides["left"]).mT @ (act @ sides["right"]), dot

    floor = _moved(meter, act, grad)
    yield from _rates(meter, ours, floor, "of the memory floor", 0.70)
    yield from _against(meter, ours, {"two expressions": expressions})
    with_norms = meter.times({"ours": lambda: gf.ops.grad_quantities(act, grad, sqnorm=True, **sides)})["ours"]
    yield Figure("of the memory floor, norms too", ratio(floor, with_norms))
    yield from _against(meter, ours, {"the same, torch.compile(max-autotune)": meter.compiled(expressions)})


def nearest(dtype: torch.dtype) -> Callable[[Meter], Iterator[Figure]]:
    def figures(meter: Meter) -> Iterator[Figure]:
        N, R, K = meter.sizes((131_072, 128, 1024), (60, 16, 8))
        points, centers = meter.randn(N, R, dtype=dtype), meter.randn(K, R, dtype=dtype)
        sqnorm = centers.float().square().sum(1).to(dtype)

        def ours() -> Any:
            return gf.ops.assign_points(points, centers)

        def expression() -> torch.Tensor:
            return torch.addmm(sqnorm, points, centers.T, alpha=-2).argmin(1)

        yield from _rates(meter, ours, _seconds(meter, 2.0 * N * R * K, dtype), "of the measured GEMM rate", None)
        yield from _against(meter, ours, {"addmm + argmin": expression}, {"addmm + argmin": 3.0})
        peer = "flash-kmeans' assignment"
        bars = {peer: 1.0} if dtype == torch.float16 else {}
        try:
            assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
        except ImportError:
            missing = "not installed (pip install --no-deps flash-kmeans)"
            yield Figure(f"times faster than {peer}", None, least=bars.get(peer), error=missing)
        else:
            x, c, norms = points.unsqueeze(0), centers.unsqueeze(0), points.float().square().sum(1).unsqueeze(0)
            yield from _against(meter, ours, {peer: lambda: assign(x, c, norms)}, bars)
        yield from _against(meter, ours, {"the same, torch.compile(max-autotune)": meter.compiled(expression)})

    return figures


def nearest_of_few(meter: Meter) -> Iterator[Figure]:
    N, R, K = meter.sizes((65_536, 4096, 64), (60, 40, 5))
    points, centers = meter.randn(N, R, dtype=HALF), meter.randn(K, R, dtype=HALF)
    sqnorm = centers.float().square().sum(1).to(HALF)

    def ours() -> Any:
        return gf.ops.assign_points(points, centers)

    floor = _moved(meter, points, centers)
    yield from _rates(meter, ours, floor, "of the memory floor", None, 0.70)
    expression = {"addmm + argmin": lambda: torch.addmm(sqnorm, points, centers.T, alpha=-2).argmin(1)}
    yield from _against(meter, ours, expression)


def weight_gradient(meter: Meter) -> Iterator[Figure]:
    B, T, I, O = meter.sizes((32, 1024, 4096, 4096), (2, 20, 24, 16))
    act, grad = meter.randn(B, T, I, dtype=HALF), meter.randn(B, T, O, dtype=HALF)
    flat_act, flat_grad = act.flatten(0, 1), grad.flatten(0, 1)

    def ours() -> Any:
        return gf.ops.grad_weight_sqnorm(act, grad, dtype=HALF)

    def product() -> torch.Tensor:
        return flat_grad.mT @ flat_act

    for cold in (False, True):
        times = meter.times({"ours": ours, "product": product}, cold=cold)
        value = ratio(times["ours"], times["product"])
        yield Figure(
            f"÷ the library's product alone, L2 {'cold' if cold else 'hot'}", value, most=None if cold else 1.25
        )
    both = {"the product, then grad_sqnorm": lambda: (product(), gf.ops.grad_sqnorm(act, grad))}
    yield from _against(meter, ours, both)


def step(name: str, most: float, fused_most: float | None) -> Callable[[Meter], Iterator[Figure]]:
    """Forward and backward under autocast to bfloat16, with every example's norm, ÷ without."""

    def figures(meter: Meter) -> Iterator[Figure]:
        torch.manual_seed(0)
        task = GPU_TASKS[name] if meter.measures else SMALL_TASKS[name]
        model = task.build().to(meter.device)
        batch = tuple(tensor.to(meter.device) for tensor in task.batch(task.B))
        cast = replace(task, loss=autocast(task.loss, meter.device))
        base = plain(cast, model, batch)
        ways = {"recorded": recorded(cast, model, batch), "recorded, fused": recorded(cast, model, batch, fused=True)}
        times = meter.times({"plain": base, **ways})
        for way, bar in zip(ways, (most, fused_most)):
            yield Figure(f"{way} step ÷ plain step", ratio(times[way], times["plain"]), most=bar)
        yield Figure("milliseconds of the plain step", None if times["plain"] is None else 1e3 * times["plain"])
        peak = meter.peak(base)
        for way, function in ways.items():
            yield Figure(f"{way}: peak memory of the step ÷ plain", ratio(meter.peak(function), peak))
        for peer, package in PACKAGES.items():
            measure = f"{peer} step ÷ plain step"
            if importlib.util.find_spec(package) is None:
                yield Figure(measure, None, error=f"not installed ({REMEDY})")
                continue
            try:
                times = meter.times({"plain": base, peer: WAYS[peer](cast, copy.deepcopy(model), batch)})
                yield Figure(measure, ratio(times[peer], times["plain"]))
            except Exception as error:  # a peer's fault must not cost the other rows
                yield Figure(measure, None, error=reason(error))

    return figures


def autocast(loss: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    def under(*args: Any) -> torch.Tensor:
        with torch.autocast(device, HALF):
            return loss(*args)

    return under


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def launches(meter: Meter) -> Iterator[Figure]:
    """Small tensors, so that the queue never fills: what is left is the host's part of a call."""
    act, grad = meter.randn(8, 16, 64), meter.randn(8, 16, 32)
    vectors, others = meter.randn(64, 64), meter.randn(64, 32)
    left, right = meter.randn(32, 4), meter.randn(64, 4)
    centers = meter.randn(5, 64)
    index = torch.randint(50, (8, 16), device=meter.device)
    labels = torch.randint(5, (64,), device=meter.device)
    calls: dict[str, tuple[str, tuple]] = {
        "grad_sqnorm, vectors": ("grad_sqnorm", (vectors, others, False)),
        "grad_sqnorm, sequences": ("grad_sqnorm", (act, grad, False)),
        "grad_weight_sqnorm": ("grad_weight_sqnorm", (act, grad, False, None)),
        "grad_sketch": ("grad_sketch", (act, grad, left, right, False)),
        "grad_dot": ("grad_dot", (act, grad, meter.randn(5, 32), centers, False)),
        "grad_gram": ("grad_gram", (act, grad, False)),
        "grad_moments": ("grad_moments", (act, grad, False)),
        "embedding_sqnorm": ("embedding_sqnorm", (index, grad, 50, None)),
        "embedding_sketch": ("embedding_sketch", (index, grad, meter.randn(50, 4), left, 50, None)),
        "embedding_dot": ("embedding_dot", (index, grad, meter.randn(5, 50), meter.randn(5, 32), 50, None)),
        "embedding_gram": ("embedding_gram", (index, grad, 50, None)),
        "embedding_moments": ("embedding_moments", (index, grad, 50, None)),
        "norm_grads": ("norm_grads", OPS["norm_grads"].prepare(act, act, None, 1e-5, False)),
        "assign_points": ("assign_points", (vectors, centers, None)),
        "cluster_sums": ("cluster_sums", (vectors, labels, 5)),
        "sign_product": ("sign_product", (vectors, 256, 1, 2, 0.5, False)),
    }
    yield Figure("host microseconds: torch.mm", meter.host_microseconds(lambda: torch.mm(vectors, right)))
    for label, (name, args) in calls.items():
        op = OPS[name]
        yield Figure(f"host microseconds: {label}", meter.host_microseconds(lambda op=op, args=args: op.call(*args)))
        yield Figure(
            f"host microseconds: {label}, in a record", meter.host_microseconds(lambda op=op, args=args: op.run(*args))
        )


def random_signs(meter: Meter) -> Iterator[Figure]:
    """Stored, against writing as much; made on the way, against the product with the stored matrix."""
    rows, cols = meter.sizes((65_536, 4096), (20, 300))
    device, target = torch.device(meter.device), meter.randn(rows, cols)
    for transposed, layout in ((False, ""), (True, ", transposed")):

        def make(transposed: bool = transposed) -> torch.Tensor:
            return scaled_signs(rows, cols, (1, 2), 0.5, torch.float32, device, transposed)

        times = meter.times({"ours": make, "fill": lambda: target.fill_(0.5)}, cold=True)
        yield Figure(f"of the write bandwidth of fill_{layout}", ratio(times["fill"], times["ours"]), least=0.80)
    for most, size in ((1.05, (16_384, 4096, 2048)), (None, (4096, 1024, 256)), (None, (256, 1024, 256))):
        label = "B={} D={} R={}".format(*size)
        B, D, R = meter.sizes(size, (5, 300, 20))
        vectors = meter.randn(B, D)
        signs = scaled_signs(R, D, (1, 2), R**-0.5, torch.float32, device, transposed=True)

        def product(vectors: torch.Tensor = vectors, signs: torch.Tensor = signs) -> torch.Tensor:
            return vectors @ signs

        def ours(vectors: torch.Tensor = vectors, R: int = R) -> torch.Tensor:
            return gf.ops.sign_product(vectors, R, (1, 2), R**-0.5)

        halves, half_signs = vectors.bfloat16(), signs.bfloat16()

        def pieces(halves: torch.Tensor = halves, half_signs: torch.Tensor = half_signs) -> None:
            for _ in range(3):
                halves @ half_signs

        times = meter.times({"ours": ours, "product": product, "pieces": pieces})
        share = ratio(times["ours"], times["product"])
        yield Figure(f"fused ÷ the product with stored signs, {label}", share, most=most)
        yield Figure(f"fused ÷ three bfloat16 products, {label}", ratio(times["ours"], times["pieces"]))
        yield Figure(f"microseconds, {label}", None if times["ours"] is None else 1e6 * times["ours"])


WORKS = {
    "norms-of-sequences": Work("grad_sqnorm bf16 B=32 T=1024 4096→4096", sequence_norms),
    "norms-of-vectors": Work("grad_sqnorm float32 T=1 B=262,144 1024→1024", vector_norms),
    "quantities": Work("grad_quantities bf16 B=512 T=128 4096→4096, sketch 16×16, dot K=64", quantities),
    "nearest-float16": Work("assign_points float16 131,072×128 K=1024", nearest(torch.float16)),
    "nearest-float32": Work("assign_points float32 131,072×128 K=1024", nearest(torch.float32)),
    "nearest-of-few": Work("assign_points bf16 65,536×4096 K=64", nearest_of_few),
    "weight-gradient": Work("grad_weight_sqnorm bf16 B=32 T=1024 4096→4096", weight_gradient),
    "gpt2-step": Work("GPT-2 small, B=8 T=1024, a step in bf16", step("gpt2-small", 1.40, 1.10)),
    "vit-step": Work("ViT-B of 12 layers, B=64 T=197, a step in bf16", step("vit-b", 1.15, None)),
    "random-signs": Work("signs: stored 65,536×4096 float32; sign_product float32", random_signs),
    "launches": Work("the launch path: small tensors, kernels not waited for", launches),
}
