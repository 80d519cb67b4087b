"""``grad_sketch``: two-sided projection of every example's gradient of a linear layer."""

from __future__ import annotations

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator, as_rows, check_factors, check_sides, in_features
from ._linear import cpu_refuses, quantities_cpu
from ._triton import triton_loses, triton_refuses


def grad_sketch(
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    bias: bool = False,
) -> torch.Tensor:
    """Projection ``leftᵀ G_b right`` of every example's weight gradient ``G_b = grad[b]ᵀ act[b]``; no G_b is stored.

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        left: [O, P], in act's dtype or the result's; None is the identity (P = O).
        right: [I, Q], or [I + 1, Q] with a bias; None is the identity. With both None the result is G_b itself.
        bias: G_b has the bias gradient as its last column, [O, I + 1].

    Returns:
        [B, P, Q], float64 for float64 inputs, else float32, in the units of the gradient. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source:
        ``leftᵀ G_b right = Σ_t (leftᵀ grad[b, t]) (rightᵀ act[b, t])ᵀ``; the guide's "mathematics" page.

    Example:
        >>> act, grad = torch.randn(8, 5, 16), torch.randn(8, 5, 4)
        >>> gf.ops.grad_sketch(act, grad, right=torch.randn(16, 3)).shape
        torch.Size([8, 4, 3])
    """
    return _op.call(act, grad, left, right, bias)


def _check(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> None:
    check_factors(act, grad)
    check_sides(act, grad, left, right, bias)


def _fake(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> torch.Tensor:
    P = grad.shape[-1] if left is None else left.shape[1]
    Q = in_features(act, bias) if right is None else right.shape[1]
    return act.new_empty(act.shape[0], P, Q, dtype=accumulator(act.dtype))  # [B, P, Q]


_op = Op(
    "grad_sketch(Tensor act, Tensor grad, Tensor? left, Tensor? right, bool bias) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.grad_sketch.grad_sketch,
)


_IDENTITY = "with two identity sides the result is G_b itself, which torch's batched product makes faster"


def _cpu_refuses(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> str | None:
    return cpu_refuses(act)


def _cpu_loses(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> str | None:
    return _IDENTITY if left is None and right is None else None


@_op.kernel(
    "cpu",
    refuses=_cpu_refuses,
    loses=_cpu_loses,
    route=lambda *_: "both projections of a block of rows, multiplied in cache",
)
def grad_sketch_cpu(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> torch.Tensor:
    out = _fake(act, grad, left, right, bias)
    quantities_cpu(act, grad, bias, sketch=out, left=left, right=right)
    return out


def _triton_refuses(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> str | None:
    return triton_refuses(act)


def _triton_loses(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> str | None:
    return _IDENTITY if left is None and right is None else triton_loses(act)


@_op.kernel(
    "triton",
    refuses=_triton_refuses,
    loses=_triton_loses,
    route=lambda *_: "both projections of a block of rows, multiplied in registers",
)
def grad_sketch_triton(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> torch.Tensor:
    from ..triton_kernels.grad_quantities import grad_quantities as fill  # here: it imports Triton

    out = _fake(act, grad, left, right, bias)
    fill(as_rows(act), as_rows(grad), bias, sketch=out, left=left, right=right)
    return out
