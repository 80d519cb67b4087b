"""assign_points against the expression a user would write, scikit-learn, faiss and flash-kmeans."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def library_baselines(points: torch.Tensor, centers: torch.Tensor) -> tuple[dict[str, Callable[[], Any]], dict]:
    """Nearest-centre searches of the libraries that are installed, and how to install the others."""
    x, c = points.numpy(), centers.numpy()
    found: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    try:
        pairwise = importlib.import_module("sklearn.metrics").pairwise_distances_argmin
        found["scikit-learn pairwise_distances_argmin"] = lambda: pairwise(x, c)
    except ImportError:
        missing["scikit-learn pairwise_distances_argmin"] = "pip install scikit-learn"
    try:
        index = importlib.import_module("faiss").IndexFlatL2(c.shape[1])
        index.add(c)
        found["faiss IndexFlatL2"] = lambda: index.search(x, 1)
    except ImportError:
        missing["faiss IndexFlatL2"] = "pip install --no-deps faiss-cpu"
    return found, missing


def gpu_baselines(points: torch.Tensor, centers: torch.Tensor) -> tuple[dict[str, Callable[[], Any]], dict]:
    """flash-kmeans' assignment, where it is installed; it takes batches of problems."""
    try:
        assign = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    except ImportError:
        return {}, {"flash-kmeans": "pip install --no-deps flash-kmeans"}
    x, c = points.unsqueeze(0), centers.unsqueeze(0)
    sqnorm = x.float().square().sum(-1)
    return {"flash-kmeans": lambda: assign(x, c, sqnorm)}, {}


def case(B: int, R: int, K: int, dtype: torch.dtype, counted: bool = False, kept: torch.dtype | None = None) -> Case:
    points, centers = torch.randn(B, R).to(dtype), torch.randn(K, R).to(dtype)
    counts = torch.randint(0, 1000, (K,)) if counted else None
    center_sqnorm = centers.float().square().sum(1).to(dtype)
    libraries, missing = library_baselines(points, centers) if points.device.type == "cpu" else ({}, {})
    if points.device.type == "cuda":
        libraries, missing = gpu_baselines(points, centers)
    label = f"B={B} R={R} K={K} {str(dtype).removeprefix('torch.')}"
    own = centers.to(kept or dtype)
    return Case(
        "assign_points",
        label + (" by size" if counted else "") + (f", centres {str(kept).removeprefix('torch.')}" if kept else ""),
        lambda: gf.ops.assign_points(points, own, counts),
        {
            "addmm + argmin": lambda: torch.addmm(center_sqnorm, points, centers.T, alpha=-2).argmin(1),
            **libraries,
        },
        flops=2 * B * R * K,
        bytes=points.element_size() * (B * R + K * R) + 12 * B,
        dtype=dtype,
        missing=missing,
    )


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(131_072, 128, 1024, torch.float16)
        yield case(65_536, 4096, 64, torch.bfloat16, counted=True)
        yield case(131_072, 128, 1024, torch.float32)
        yield case(4096, 4096, 64, torch.bfloat16)
        yield case(65_536, 1024, 512, torch.bfloat16)
        yield case(65_536, 1024, 64, torch.bfloat16, kept=torch.float32)
        yield case(65_536, 128, 256, torch.bfloat16, kept=torch.float32)
    yield case(60_000, 64, 256, torch.float32)
