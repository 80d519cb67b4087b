"""assign_points against the expression a user would write, scikit-learn and faiss."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

import gradclust_fast as gf
from bench.harness import Case


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


def cases() -> Iterator[Case]:
    B, R, K = 60_000, 64, 256
    points, centers = torch.randn(B, R), torch.randn(K, R)
    center_sqnorm = centers.square().sum(1)
    libraries, missing = library_baselines(points, centers) if points.device.type == "cpu" else ({}, {})
    yield Case(
        "assign_points",
        f"B={B} R={R} K={K} float32",
        lambda: gf.ops.assign_points(points, centers),
        {
            "addmm + argmin": lambda: torch.addmm(center_sqnorm, points, centers.T, alpha=-2).argmin(1),
            **libraries,
        },
        flops=2 * B * R * K,
        bytes=4 * (B * R + K * R) + 12 * B,
        missing=missing,
    )
