"""conv_moments against unfold + einsum and two sums over the batch."""

from __future__ import annotations

from collections.abc import Iterator

import gradclust_fast as gf
from bench.harness import Case

from ._conv import Layer

LAYERS = (
    dict(B=128, C=64, O=64, size=16),
    dict(B=64, C=64, O=128, size=8),
    dict(B=128, C=64, O=64, size=16, groups=64),  # depthwise: short correlations
    dict(B=64, C=64, O=64, size=16, kernel_size=1, padding=0, groups=8),  # auto leaves it to torch's products
)


def cases() -> Iterator[Case]:
    for sizes in LAYERS:
        layer = Layer(**sizes)
        yield Case(
            "conv_moments",
            layer.label,
            lambda layer=layer: gf.ops.conv_moments(layer.act, layer.grad, **layer.geometry),
            layer.baselines(lambda G: (G.sum(0), G.square().sum(0))) | layer.composed(gf.ops.conv_moments),
            flops=layer.direct_flops,
            bytes=layer.bytes(2 * layer.I * layer.O),
        )
