"""conv_weight_sqnorm against torch's weight gradient alone, and with our norms after it."""

from __future__ import annotations

from collections.abc import Iterator

import gradclust_fast as gf
from bench.harness import Case

from ._conv import Layer

LAYERS = (
    dict(B=128, C=32, O=64, size=32),  # many positions: in blocks
    dict(B=128, C=64, O=64, size=16),
    dict(B=128, C=64, O=128, size=16),
    dict(B=128, C=3, O=32, size=32),
    dict(B=128, C=64, O=64, size=8),
    dict(B=128, C=64, O=64, size=16, groups=64),  # depthwise
    dict(B=128, C=64, O=64, size=16, kernel_size=1, padding=0),
)


def cases() -> Iterator[Case]:
    for sizes in LAYERS:
        layer = Layer(**sizes)

        def in_two_steps(layer: Layer = layer) -> None:
            layer.weight_gradient()
            gf.ops.conv_sqnorm(layer.act, layer.grad, **layer.geometry)

        yield Case(
            "conv_weight_sqnorm",
            layer.label,
            lambda layer=layer: gf.ops.conv_weight_sqnorm(layer.act, layer.grad, **layer.geometry),
            {"layer's weight gradient alone": layer.weight_gradient, "weight gradient, then conv_sqnorm": in_two_steps},
            flops=layer.direct_flops,
            bytes=layer.bytes(layer.B + layer.O * layer.I),
            dtype=layer.dtype,
        )
