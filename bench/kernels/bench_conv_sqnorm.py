"""conv_sqnorm against unfold + einsum and against the layer's own forward and backward.

On a GPU also against itself without bulk tensor copies, where its tiles could be fetched by them (sm_90 and later).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import gradclust_fast as gf
from bench.harness import Case, on_gpu
from gradclust_fast.ops._conv import prepare
from gradclust_fast.ops._conv_routes import layer_of

from ._conv import GPU_LAYERS, Layer

LAYERS = (
    dict(B=256, C=64, O=64, size=16),  # structured Gram
    dict(B=128, C=3, O=32, size=32),  # few input channels: direct
    dict(B=128, C=64, O=128, size=8),
    dict(B=16, C=256, O=256, size=14),
    dict(B=16, C=128, O=256, size=28, stride=2),  # four phases
    dict(B=8, C=64, O=64, size=56),  # many positions: direct in blocks
    dict(B=128, C=64, O=64, size=16, groups=64),  # depthwise
    dict(B=128, C=64, O=64, size=16, kernel_size=1, padding=0),
)


def by_cp_async(layer: Layer, module: Any) -> dict[str, Callable[[], Any]]:
    if not on_gpu() or layer.groups > 1 or layer.C % 8 or layer.dtype.itemsize != 2:
        return {}
    args = prepare(layer.act, layer.grad, **layer.geometry)
    return {"ours by cp.async": lambda: module.by_cuda_route("tiles_cp_async", *args)}


def cases() -> Iterator[Case]:
    module = importlib.import_module("gradclust_fast.ops.conv_sqnorm")
    for sizes in GPU_LAYERS if on_gpu() else LAYERS:
        layer = Layer(**sizes)
        padding = [layer.padding] * 4
        sizes = ([layer.kernel_size] * 2, [layer.stride] * 2, padding, [1, 1], layer.groups, False)
        work = module.costs(layer_of(layer.act, layer.grad, sizes))
        route = min(work, key=work.__getitem__)
        gram = layer.B * layer.T**2 * (layer.C * layer.stride**2 + layer.O)
        yield Case(
            "conv_sqnorm",
            layer.label,
            lambda layer=layer: gf.ops.conv_sqnorm(layer.act, layer.grad, **layer.geometry),
            layer.baselines(lambda G: G.square().sum((1, 2))) | by_cp_async(layer, module),
            flops=gram if route == "gram" and not on_gpu() else layer.direct_flops,
            bytes=layer.bytes(layer.B),
            dtype=layer.dtype,
        )
