"""conv_gram against unfold + einsum and G Gᵀ."""

from __future__ import annotations

from collections.abc import Iterator

import gradclust_fast as gf
from bench.harness import Case

from ._conv import Layer

LAYERS = (
    dict(B=128, C=64, O=64, size=16),
    dict(B=64, C=64, O=128, size=8),
    dict(B=64, C=256, O=256, size=4),  # few positions: from products of positions
)


def cases() -> Iterator[Case]:
    for sizes in LAYERS:
        layer = Layer(**sizes)
        positions = layer.size**4 * layer.C + layer.T**2 * layer.O  # of one pair
        yield Case(
            "conv_gram",
            layer.label,
            lambda layer=layer: gf.ops.conv_gram(layer.act, layer.grad, **layer.geometry),
            layer.baselines(lambda G: G.flatten(1) @ G.flatten(1).mT) | layer.composed(gf.ops.conv_gram),
            flops=min(layer.direct_flops + layer.B**2 * layer.I * layer.O, layer.B**2 * positions),
            bytes=layer.bytes(layer.B**2),
        )
