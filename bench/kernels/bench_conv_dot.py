"""conv_dot against unfold + einsum and one product with the centres."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu

from ._conv import GPU_LAYERS, Layer

LAYERS = ((dict(B=128, C=64, O=64, size=16), 16), (dict(B=64, C=64, O=128, size=8), 128))


def cases() -> Iterator[Case]:
    for sizes, K in ((sizes, 64) for sizes in GPU_LAYERS) if on_gpu() else LAYERS:
        layer = Layer(**sizes)
        T, I, O = layer.T, layer.I, layer.O
        routes = (T * K * (layer.groups * I + O), (T + K) * I * O)  # filters; through G_b
        D, A = (torch.randn(K, n).to(layer.dtype) for n in (O, I))
        yield Case(
            "conv_dot",
            f"{layer.label} K={K}",
            lambda layer=layer, D=D, A=A: gf.ops.conv_dot(layer.act, layer.grad, D, A, **layer.geometry),
            layer.baselines(lambda G, D=D, A=A: ((G @ A.mT) * D.mT).sum(1)) | layer.composed(gf.ops.conv_dot, D, A),
            flops=2 * layer.B * (routes[1] if layer.in_cuda("conv_dot", D, A) else min(routes)),
            bytes=layer.bytes(K * (I + O) + layer.B * K),
            dtype=layer.dtype,
        )
