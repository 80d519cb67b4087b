"""assign against the expression a user would write."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def cases() -> Iterator[Case]:
    B, K = 60_000, 256
    g, c = torch.randn(B, 64), torch.randn(K, 64)
    dot, center_sqnorm, grad_sqnorm = g @ c.T, c.square().sum(1), g.square().sum(1)
    counts = torch.randint(1, 500, (K,))
    yield Case(
        "assign",
        f"B={B} K={K} float32, weighted",
        lambda: gf.ops.assign(dot, center_sqnorm, grad_sqnorm, counts),
        {"expression + min": lambda: ((center_sqnorm - 2 * dot + grad_sqnorm[:, None]) * (counts + 1)).min(1)},
        flops=5 * B * K,
        bytes=4 * B * K + 16 * B,
    )
