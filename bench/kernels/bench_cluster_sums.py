"""cluster_sums against index_add_, which adds in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def cases() -> Iterator[Case]:
    N, R, K = (1_000_000, 256, 1024) if on_gpu() else (60_000, 256, 128)
    points, labels = torch.randn(N, R), torch.randint(0, K, (N,))
    yield Case(
        "cluster_sums",
        f"N={N} R={R} K={K} float32",
        lambda: gf.ops.cluster_sums(points, labels, K),
        {"zeros.index_add_": lambda: torch.zeros(K, R).index_add_(0, labels, points)},
        flops=N * R,
        bytes=4 * N * R + 8 * N,
    )
