"""conv_dot against unfold + einsum and one product with the centres."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case

from ._conv import Layer


def cases() -> Iterator[Case]:
    for sizes, K in ((dict(B=128, C=64, O=64, size=16), 16), (dict(B=64, C=64, O=128, size=8), 128)):
        layer = Layer(**sizes)
        D, A = torch.randn(K, layer.O), torch.randn(K, layer.I)
        yield Case(
            "conv_dot",
            f"{layer.label} K={K}",
            lambda layer=layer, D=D, A=A: gf.ops.conv_dot(layer.act, layer.grad, D, A, **layer.geometry),
            layer.baselines(lambda G, D=D, A=A: ((G @ A.mT) * D.mT).sum(1)) | layer.composed(gf.ops.conv_dot, D, A),
            flops=2 * layer.B * layer.T * K * (layer.I + layer.O),
            bytes=layer.bytes(K * (layer.I + layer.O) + layer.B * K),
        )
