"""conv_sketch against unfold + einsum and two products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu

from ._conv import GPU_LAYERS, Layer

LAYERS = (
    (dict(B=128, C=64, O=64, size=16), 16, 16),
    (dict(B=128, C=64, O=128, size=8), 16, 16),
    (dict(B=128, C=64, O=64, size=16), 8, 64),  # left mixes the channels first
    (dict(B=128, C=64, O=64, size=16, groups=64), 16, 16),  # depthwise: through G_b
)


def cases() -> Iterator[Case]:
    for sizes, P, Q in ((sizes, 32, 32) for sizes in GPU_LAYERS) if on_gpu() else LAYERS:
        layer = Layer(**sizes)
        T, O, I, groups = layer.T, layer.O, layer.I, layer.groups
        routes = (
            groups * T * Q * (I + P) + T * O * P,  # filters
            T * P * (O + groups * I) + groups * P * I * Q,  # left first
            T * I * O + O * Q * (I + P),  # through G_b
        )
        left, right = torch.randn(O, P).to(layer.dtype), torch.randn(I, Q).to(layer.dtype)
        yield Case(
            "conv_sketch",
            f"{layer.label} P={P} Q={Q}",
            lambda layer=layer, left=left, right=right: gf.ops.conv_sketch(
                layer.act, layer.grad, left, right, **layer.geometry
            ),
            layer.baselines(lambda G, left=left, right=right: left.mT @ G @ right)
            | layer.composed(gf.ops.conv_sketch, left, right),
            flops=2 * layer.B * (routes[2] if layer.in_cuda("conv_sketch", left, right) else min(routes)),
            bytes=layer.bytes(left.numel() + right.numel() + layer.B * P * Q),
            dtype=layer.dtype,
        )
