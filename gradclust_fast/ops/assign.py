"""``assign``: the cheapest cluster of every example, from inner products with the cluster centres."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from ._checks import accumulator, check_floats, shape
from ._point_checks import (
    check_aux,
    check_counts,
    check_weights,
    cpu_refuses,
    points_triton_refuses,
    threads_for,
    with_unit_stride,
)
from ._triton import triton_loses


def assign(
    dot: torch.Tensor,
    center_sqnorm: torch.Tensor,
    grad_sqnorm: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cluster of every example under the paper's size-weighted rule.

    ``argmin_k w_k(‖C_k‖² − 2⟨C_k, G_b⟩ + ‖G_b‖²)`` with ``w_k = counts[k] + 1``, or 1 without counts. The weights
    multiply ‖G_b‖² too, so it changes the argmin and must be given.

    Args:
        dot: ⟨C_k, G_b⟩ [B, K], K ≥ 1, e.g. ``grad_dot`` summed over layers.
        center_sqnorm: ‖C_k‖² [K], in the dtype of ``dot`` or its accumulator's (float64 for float64, else float32).
        grad_sqnorm: ‖G_b‖² [B], likewise.
        counts: cluster sizes [K], integers or floating averages, at least 0.

    Returns:
        ``label`` [B] int64 and ``cost`` [B], the smallest weighted distance, in the accumulator's dtype and the units
        of gradient squared (rounding can leave a distance near 0 slightly negative). Ties go to the lowest index.
        An example with a NaN distance gets cost NaN and the lowest index whose distance is NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, K = 0, a negative or NaN count.

    Source:
        Faghri et al. 2020, arXiv:2007.04532, section 3.

    Example:
        >>> label, cost = gf.ops.assign(torch.eye(3), torch.ones(3), torch.ones(3))
        >>> label.tolist(), cost.tolist()
        ([0, 1, 2], [0.0, 0.0, 0.0])
    """
    return _op.call(dot, center_sqnorm, grad_sqnorm, counts)


def _check(
    dot: torch.Tensor, center_sqnorm: torch.Tensor, grad_sqnorm: torch.Tensor, counts: torch.Tensor | None
) -> None:
    check_floats("dot", dot)
    if dot.dim() != 2:
        raise ValueError(f"dot must be [B, K], one inner product per example and centre, got {shape(dot)}")
    B, K = dot.shape
    if K == 0:
        raise ValueError("dot must be [B, K] with K at least 1, got K=0; there is no cluster to assign to")
    for name, tensor, letter, size in (("center_sqnorm", center_sqnorm, "K", K), ("grad_sqnorm", grad_sqnorm, "B", B)):
        if tensor.shape != (size,):
            raise ValueError(
                f"{name} must be [{letter}] with {letter}={size} (from dot), got {shape(tensor)}; "
                f"pass one squared norm per {'centre' if letter == 'K' else 'example'}"
            )
        check_aux(name, tensor, "dot", dot)
    check_counts(counts, K, "dot", dot)


def _fake(
    dot: torch.Tensor, center_sqnorm: torch.Tensor, grad_sqnorm: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    B = dot.shape[0]
    return dot.new_empty(B, dtype=torch.int64), dot.new_empty(B, dtype=accumulator(dot.dtype))  # [B], [B]


def _reference(
    dot: torch.Tensor, center_sqnorm: torch.Tensor, grad_sqnorm: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_weights(counts)
    return reference.assign.assign(dot, center_sqnorm, grad_sqnorm, counts)


_op = Op(
    "assign(Tensor dot, Tensor center_sqnorm, Tensor grad_sqnorm, Tensor? counts) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "one read of dot, the smallest cost first, then its index")
def assign_cpu(
    dot: torch.Tensor, center_sqnorm: torch.Tensor, grad_sqnorm: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_weights(counts)
    label, cost = _fake(dot, center_sqnorm, grad_sqnorm, counts)
    dot = with_unit_stride(dot)
    center_sqnorm = center_sqnorm.to(cost.dtype).contiguous()
    grad_sqnorm = grad_sqnorm.to(cost.dtype).contiguous()
    weight = None if counts is None else counts.to(cost.dtype) + 1  # [K]
    _native._C.assign_cpu(
        _native.rows(dot), center_sqnorm.data_ptr(), grad_sqnorm.data_ptr(), 0 if weight is None else weight.data_ptr(),
        label.data_ptr(), cost.data_ptr(), threads_for(dot.numel()),
    )  # fmt: skip
    return label, cost


@_op.kernel(
    "triton",
    refuses=points_triton_refuses,
    loses=lambda dot, *_: triton_loses(dot),
    route=lambda *_: "one read of dot, the smallest cost and its index in registers",
)
def assign_triton(
    dot: torch.Tensor, center_sqnorm: torch.Tensor, grad_sqnorm: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.assign import assign as fill

    check_weights(counts)
    label, cost = _fake(dot, center_sqnorm, grad_sqnorm, counts)
    fill(with_unit_stride(dot), center_sqnorm, grad_sqnorm, counts, label, cost)
    return label, cost
