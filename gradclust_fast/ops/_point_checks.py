"""Argument checks shared by the clustering ops."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _native
from . import _cuda
from ._checks import accumulator, check_floats, shape
from ._triton import triton_refuses


def check_points(name: str, points: torch.Tensor) -> None:
    """[N, R] of a floating dtype."""
    check_floats(name, points)
    if points.dim() != 2:
        raise ValueError(f"{name} must be a matrix with one row per example, got {shape(points)}; flatten(1) it")


def check_aux(name: str, tensor: torch.Tensor, like: str, main: torch.Tensor) -> None:
    """Same device as ``main``, and its dtype or its accumulator's."""
    if tensor.dtype not in (main.dtype, accumulator(main.dtype)):
        expected = " or ".join(dict.fromkeys(map(str, (main.dtype, accumulator(main.dtype)))))
        raise TypeError(f"{name} must be {expected} (from {like}), got {tensor.dtype}; cast one of them")
    check_device(name, tensor, like, main)


def check_device(name: str, tensor: torch.Tensor, like: str, main: torch.Tensor) -> None:
    if tensor.device != main.device:
        raise ValueError(f"{name} must be on {main.device} like {like}, got {tensor.device}; move one of them")


def check_counts(counts: torch.Tensor | None, K: int, like: str, main: torch.Tensor) -> None:
    """[K] cluster sizes: integers, or floating averages of them."""
    if counts is None:
        return
    if counts.dtype.is_complex or counts.dtype == torch.bool:
        raise TypeError(f"counts must be integers or floats, got {counts.dtype}; cast it first")
    if counts.shape != (K,):
        raise ValueError(f"counts must be [K] with K={K} (from {like}), got {shape(counts)}; pass one size per cluster")
    check_device("counts", counts, like, main)


def check_labels(labels: torch.Tensor, num_clusters: int, points: torch.Tensor) -> None:
    """[N] int64 on the device of ``points``, and at least one cluster; values are checked by :func:`check_range`."""
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}; use labels.long()")
    if labels.shape != points.shape[:1]:
        raise ValueError(
            f"labels must be [N] with N={points.shape[0]} (from points), got {shape(labels)}; pass one label per row"
        )
    check_device("labels", labels, "points", points)


def readable(values: torch.Tensor, holds: Callable[[], torch.Tensor], message: str) -> bool:
    """Whether a check may read ``values``, which waits for the GPU.

    Not while a CUDA graph is captured: then ``holds`` is asserted on the device. Meta tensors have no values.
    """
    if values.is_meta:
        return False
    if _cuda.capturing(values):
        torch._assert_async(holds(), message)
        return False
    return True


def check_range(labels: torch.Tensor, num_clusters: int) -> None:
    """Every label in [0, num_clusters). While a CUDA graph is captured the graph's replays stop instead of raising."""
    bounds = f"labels must lie in [0, {num_clusters})"
    if labels.numel() == 0 or not readable(labels, lambda: ((labels >= 0) & (labels < num_clusters)).all(), bounds):
        return
    low, high = (int(bound) for bound in torch.aminmax(labels))
    if low < 0 or high >= num_clusters:
        bad = int(((labels < 0) | (labels >= num_clusters)).nonzero()[0])
        raise ValueError(f"{bounds}, got labels[{bad}] = {int(labels[bad])}; raise num_clusters or relabel")


def check_weights(counts: torch.Tensor | None) -> None:
    """A negative or NaN size would silently turn the argmin round."""
    if counts is None or not readable(counts, lambda: (counts >= 0).all(), "counts must be at least 0"):
        return
    if not bool((counts >= 0).all()):
        bad = int((~(counts >= 0)).nonzero()[0])
        raise ValueError(f"counts must be at least 0, got counts[{bad}] = {counts[bad].item()}; pass cluster sizes")


def check_finite(name: str, points: torch.Tensor) -> None:
    """No NaN or Inf; up to ten offending rows are named."""
    finite = points.isfinite().all(1)  # [N]
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten()
        rows = ", ".join(map(str, bad[:10].tolist())) + (", …" if len(bad) > 10 else "")
        raise ValueError(
            f"{name} must be finite, got NaN or Inf in {len(bad)} of {len(points)} rows: {rows}; drop those examples"
        )


def cpu_refuses(main: torch.Tensor, *_: object) -> str | None:
    """Why the C++ kernel cannot run on an op's arguments, or None."""
    if main.device.type != "cpu":
        return f"the C++ kernel needs CPU tensors, got {main.device}"
    return _native.cpu_unavailable()


def points_triton_refuses(main: torch.Tensor, *_: object) -> str | None:
    """The Triton kernels of the clustering ops take float64."""
    return triton_refuses(main, float64=True)


def with_unit_stride(points: torch.Tensor) -> torch.Tensor:
    """[N, R] with feature stride 1: itself where it has, else a copy."""
    return points if points.stride(1) == 1 or points.shape[1] <= 1 else points.contiguous()


def threads_for(multiply_adds: int) -> int:
    """One thread for work that ends before a second one has woken up."""
    return _native.num_threads() if multiply_adds > 1 << 20 else 1
