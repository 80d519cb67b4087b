"""conv_gram against unfold + einsum and G Gᵀ."""

from __future__ import annotations

from collections.abc import Iterator

import gradclust_fast as gf
from bench.harness import Case

from ._conv import Layer


def cases() -> Iterator[Case]:
    for sizes in (dict(B=128, C=64, O=64, size=16), dict(B=64, C=64, O=128, size=8)):
        layer = Layer(**sizes)
        yield Case(
            "conv_gram",
            layer.label,
            lambda layer=layer: gf.ops.conv_gram(layer.act, layer.grad, **layer.geometry),
            layer.baselines(lambda G: G.flatten(1) @ G.flatten(1).mT),
            flops=layer.direct_flops + 2 * layer.B**2 * layer.I * layer.O,
            bytes=layer.bytes(layer.B**2),
        )
