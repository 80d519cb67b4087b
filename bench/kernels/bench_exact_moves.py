"""A sweep of exact moves against one matrix product of the same size: its first sweep, and one with few moves left."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def cases() -> Iterator[Case]:
    N, R, K = (1_000_000, 256, 1024) if on_gpu() else (60_000, 256, 128)
    groups = torch.randn(200, R)[torch.randint(0, 200, (N,))]
    points = groups * torch.rand(N, 1) + torch.randn(N, R) / 2
    centers = torch.randn(K, R)
    norms = centers.square().sum(1)
    start = torch.randint(0, K, (N,))
    late = start
    for seed in range(0 if points.is_meta else 12):
        late = gf.ops.exact_moves(points, late, K, seed)[0]
    shares = ("", "") if on_gpu() else (", 98 % move", ", 1 % moves")  # with the runner's seed
    for name, labels in (("first sweep" + shares[0], start), ("late sweep" + shares[1], late)):
        yield Case(
            "exact_moves",
            f"N={N} R={R} K={K} float32, {name}",
            lambda labels=labels: gf.ops.exact_moves(points, labels, K, 12),
            {
                "one sgemm (no algorithm)": lambda: points @ centers.T,
                "addmm + argmin (no algorithm)": lambda: torch.addmm(norms, points, centers.T, alpha=-2).argmin(1),
            },
            flops=2 * N * R * K,
            bytes=4 * N * R + 16 * N,
        )
