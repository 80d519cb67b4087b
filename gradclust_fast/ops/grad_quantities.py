"""``grad_quantities``: several quantities of the same gradients of a linear layer in one read of its factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator, as_rows, check_centers, check_factors, check_sides, in_features
from ._linear import cpu_refuses, quantities_cpu, sequence_route
from ._triton import triton_loses, triton_refuses


class Quantities(NamedTuple):
    """What :func:`grad_quantities` returns; None where not asked."""

    sqnorm: torch.Tensor | None
    sketch: torch.Tensor | None
    dot: torch.Tensor | None


def grad_quantities(
    act: torch.Tensor,
    grad: torch.Tensor,
    *,
    sqnorm: bool = False,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    center_grad: torch.Tensor | None = None,
    center_act: torch.Tensor | None = None,
    bias: bool = False,
) -> Quantities:
    """Any of :func:`grad_sqnorm`, :func:`grad_sketch` and :func:`grad_dot`, reading act and grad once.

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        sqnorm: ask for the squared norms.
        left, right: ask for the sketch by giving at least one side, as in :func:`grad_sketch`.
        center_grad, center_act: ask for the inner products by giving both, as in :func:`grad_dot`.
        bias: G_b has the bias gradient as its last column.

    Returns:
        A NamedTuple (sqnorm [B], sketch [B, P, Q], dot [B, K]) with None where not asked; float64 for float64 inputs,
        else float32. A NaN stays in its own row.

    Raises:
        ValueError: nothing was asked for, one centre without the other, or shapes or devices that do not fit.
        TypeError: dtypes that do not fit.

    Source:
        The guide's "mathematics" page.

    Example:
        >>> act, grad = torch.randn(8, 16), torch.randn(8, 4)
        >>> found = gf.ops.grad_quantities(act, grad, sqnorm=True, right=torch.randn(16, 3))
        >>> found.sketch.shape, found.dot
        (torch.Size([8, 4, 3]), None)
    """
    outputs = iter(_op.call(act, grad, sqnorm, left, right, center_grad, center_act, bias))
    asked = (sqnorm, left is not None or right is not None, center_grad is not None)
    return Quantities(*(next(outputs) if wanted else None for wanted in asked))


def _check(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> None:
    check_factors(act, grad)
    check_sides(act, grad, left, right, bias)
    if (center_grad is None) != (center_act is None):
        given, missing = ("center_grad", "center_act") if center_act is None else ("center_act", "center_grad")
        raise ValueError(f"{given} was given without {missing}; a centre is the pair, give both or neither")
    if center_grad is not None and center_act is not None:
        check_centers(act, grad, center_grad, center_act, bias)
    if not sqnorm and left is None and right is None and center_grad is None:
        raise ValueError(
            "grad_quantities was asked for nothing; pass sqnorm=True, a sketch side (left, right) or centres "
            "(center_grad, center_act). A sketch with two identity sides is grad_sketch"
        )


def _fake(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> list[torch.Tensor]:
    B, dtype = act.shape[0], accumulator(act.dtype)
    out = []
    if sqnorm:
        out.append(act.new_empty(B, dtype=dtype))  # [B]
    if left is not None or right is not None:
        P = grad.shape[-1] if left is None else left.shape[1]
        Q = in_features(act, bias) if right is None else right.shape[1]
        out.append(act.new_empty(B, P, Q, dtype=dtype))  # [B, P, Q]
    if center_grad is not None:
        out.append(act.new_empty(B, center_grad.shape[0], dtype=dtype))  # [B, K]
    return out


_op = Op(
    "grad_quantities(Tensor act, Tensor grad, bool sqnorm, Tensor? left, Tensor? right, "
    "Tensor? center_grad, Tensor? center_act, bool bias) -> Tensor[]",
    check=_check,
    fake=_fake,
    reference=reference.grad_quantities.grad_quantities,
)


def _cpu_refuses(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> str | None:
    return cpu_refuses(act)


def _cpu_route(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> str:
    T = act.shape[1:-1].numel()
    route = "a block of rows meets all projections and centres at once"
    if sqnorm and T > 1:
        route += f"; norms: {sequence_route(T, act.shape[-1], grad.shape[-1], act.dtype)[1]}"
    return route


@_op.kernel("cpu", refuses=_cpu_refuses, route=_cpu_route)
def grad_quantities_cpu(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> list[torch.Tensor]:
    out = _fake(act, grad, sqnorm, left, right, center_grad, center_act, bias)
    named = _by_name(out, sqnorm, left, right, center_grad, center_act)
    quantities_cpu(act, grad, bias, **named)
    return out


def _by_name(
    out: list[torch.Tensor],
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
) -> dict[str, Any]:
    """The outputs and what they are made with, as keyword arguments."""
    names = ["sqnorm"] * sqnorm + ["sketch"] * (left is not None or right is not None)
    names += ["dot"] * (center_grad is not None)
    aux = {"left": left, "right": right, "center_grad": center_grad, "center_act": center_act}
    return {**dict(zip(names, out)), **aux}


def _triton_refuses(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> str | None:
    return triton_refuses(act)


def _triton_loses(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> str | None:
    return triton_loses(act)


def _triton_route(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> str:
    route = "a block of rows meets all projections and centres at once"
    if sqnorm and act.shape[1:-1].numel() > 1:
        route += "; norms: a read of their own, as grad_sqnorm"
    return route


@_op.kernel("triton", refuses=_triton_refuses, loses=_triton_loses, route=_triton_route)
def grad_quantities_triton(
    act: torch.Tensor,
    grad: torch.Tensor,
    sqnorm: bool,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    center_grad: torch.Tensor | None,
    center_act: torch.Tensor | None,
    bias: bool,
) -> list[torch.Tensor]:
    from ..triton_kernels.grad_quantities import grad_quantities as fill  # here: it imports Triton

    out = _fake(act, grad, sqnorm, left, right, center_grad, center_act, bias)
    fill(as_rows(act), as_rows(grad), bias, **_by_name(out, sqnorm, left, right, center_grad, center_act))
    return out
