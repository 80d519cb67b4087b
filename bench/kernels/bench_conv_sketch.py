"""conv_sketch against unfold + einsum and two products."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case

from ._conv import Layer


def cases() -> Iterator[Case]:
    for sizes, P, Q in ((dict(B=128, C=64, O=64, size=16), 16, 16), (dict(B=128, C=64, O=128, size=8), 16, 16)):
        layer = Layer(**sizes)
        left, right = torch.randn(layer.O, P), torch.randn(layer.I, Q)
        yield Case(
            "conv_sketch",
            f"{layer.label} P={P} Q={Q}",
            lambda layer=layer, left=left, right=right: gf.ops.conv_sketch(
                layer.act, layer.grad, left, right, **layer.geometry
            ),
            layer.baselines(lambda G, left=left, right=right: left.mT @ G @ right),
            flops=2 * layer.B * layer.T * (layer.I * Q + layer.O * P + P * Q),
            bytes=layer.bytes(left.numel() + right.numel() + layer.B * P * Q),
        )
