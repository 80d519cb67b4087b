"""``assign_points``: the cheapest cluster of every dense row."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from ._checks import accumulator, shape
from ._point_checks import (
    check_aux,
    check_counts,
    check_points,
    check_weights,
    cpu_refuses,
    points_triton_refuses,
    threads_for,
    with_unit_stride,
)
from ._triton import triton_loses


def assign_points(
    points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest centre of every row, ``argmin_k w_k‖x_b − c_k‖²`` with ``w_k = counts[k] + 1``, or 1 without counts.

    What is returned comes from differences ``x_b − c_k`` in float64, so a row that equals a centre is at distance 0,
    equal centres tie exactly, and a large common mean costs no digits. Beyond 512 features the Triton kernel takes a
    cost from float32 products where they have lost nothing to cancellation. The C++ and Triton kernels never store B×K
    distances.

    Args:
        points: [B, R].
        centers: [K, R], K ≥ 1, in the dtype of ``points`` or its accumulator's (float64 for float64, else float32).
        counts: cluster sizes [K], integers or floating averages, at least 0.

    Returns:
        ``label`` [B] int64 and ``cost`` [B], the smallest weighted squared distance, in the accumulator's dtype. Ties
        go to the lowest index. An example with a NaN distance gets cost NaN and the lowest index whose distance is NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, K = 0, a negative or NaN count.

    Source:
        Faghri et al. 2020, arXiv:2007.04532, section 3; without counts the assignment step of k-means.

    Example:
        >>> label, cost = gf.ops.assign_points(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [5.0]]))
        >>> label.tolist(), cost.tolist()
        ([0, 1], [1.0, 0.0])
    """
    return _op.call(points, centers, counts)


def _check(points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None) -> None:
    check_points("points", points)
    R = points.shape[1]
    if centers.dim() != 2 or centers.shape[1] != R:
        raise ValueError(f"centers must be [K, R] with R={R} (from points), got {shape(centers)}")
    if centers.shape[0] == 0:
        raise ValueError("centers must be [K, R] with K at least 1, got K=0; there is no cluster to assign to")
    check_aux("centers", centers, "points", points)
    check_counts(counts, centers.shape[0], "centers", points)


def _fake(
    points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    B = points.shape[0]
    return points.new_empty(B, dtype=torch.int64), points.new_empty(B, dtype=accumulator(points.dtype))  # [B], [B]


def _reference(
    points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_weights(counts)
    return reference.assign_points.assign_points(points, centers, counts)


_op = Op(
    "assign_points(Tensor points, Tensor centers, Tensor? counts) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "packed products propose, differences in float64 decide")
def assign_points_cpu(
    points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_weights(counts)
    label, cost = _fake(points, centers, counts)
    K = centers.shape[0]
    points, centers = with_unit_stride(points), centers.to(cost.dtype).contiguous()
    weight = torch.ones(K, dtype=torch.float64) if counts is None else counts.double() + 1  # [K]
    _native.with_workspace(
        _native._C.assign_points_cpu, _native.rows(points), centers.data_ptr(), K, weight.data_ptr(),
        label.data_ptr(), cost.data_ptr(), threads=threads_for(points.numel() * K),
    )  # fmt: skip
    return label, cost


def _triton_refuses(points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None) -> str | None:
    if max(points.shape[0], centers.shape[0]) >= 2**31:
        return "the Triton kernel counts rows and centres in 32 bits; split the rows"
    return points_triton_refuses(points)


@_op.kernel(
    "triton",
    refuses=_triton_refuses,
    loses=lambda points, *_: triton_loses(points),
    route=lambda points, *_: (
        "differences in float64"
        if points.dtype == torch.float64
        else "tensor cores propose, differences in float64 decide what is close"
    ),
)
def assign_points_triton(
    points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.assign_points import assign_points as fill

    check_weights(counts)
    label, cost = _fake(points, centers, counts)
    fill(with_unit_stride(points), with_unit_stride(centers), counts, label, cost)
    return label, cost
