"""``conv_sketch``: two-sided projection of every example's gradient of a convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _conv_cuda, _conv_products
from ._checks import accumulator
from ._conv import GEOMETRY, LayerArguments, check_conv_sides, features, prepare, with_layer_arguments
from ._conv_routes import cheapest, cpu_refuses, describe, gradient_costs, lanes, layer_of, pointwise_loses

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_layer_arguments
def conv_sketch(
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    **layer: Unpack[LayerArguments],
) -> torch.Tensor:
    """Projection ``leftᵀ G_b right`` of every example's weight gradient of a convolution, never storing ``G_b``.

    ``G_b`` is weight-shaped and flattened to [O, I], I = C_in/groups · prod(kernel_size), like ``weight.flatten(1)``.

    Args:
        act: layer inputs [B, C_in, *spatial], 1 to 3 spatial dimensions.
        grad: gradients of the loss with respect to the layer's outputs [B, O, *out_spatial], same dtype and device.
        left: [O, P], in act's dtype or the result's; None is the identity (P = O).
        right: [I, Q], or [I + 1, Q] with a bias; None is the identity. Rows of all groups meet the same right.
        kernel_size, stride, padding, dilation, groups, padding_mode: the layer's own; ``padding`` may be ``"same"`` or
            ``"valid"``.
        bias: G_b has the bias gradient as its last column, [O, I + 1].

    Returns:
        [B, P, Q], float64 for float64 inputs, else float32, in the units of the gradient. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a geometry that do not fit.

    Source:
        ``right`` is a bank of Q filters: convolve act with them, mix grad's channels with ``left``, sum over positions.

    Example:
        >>> act, grad = torch.randn(8, 3, 16, 16), torch.randn(8, 4, 16, 16)
        >>> gf.ops.conv_sketch(act, grad, right=torch.randn(27, 5), kernel_size=3, padding=1).shape
        torch.Size([8, 4, 5])
    """
    return _op.call(
        *prepare(
            act,
            grad,
            left,
            right,
            **layer,
        )
    )


def _fake(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> torch.Tensor:
    P = grad.shape[1] if left is None else left.shape[1]
    Q = features(act, *geometry) if right is None else right.shape[1]
    return act.new_empty(act.shape[0], P, Q, dtype=accumulator(act.dtype))  # [B, P, Q]


_op = Op(
    f"conv_sketch(Tensor act, Tensor grad, Tensor? left, Tensor? right, {GEOMETRY}) -> Tensor",
    check=check_conv_sides,
    fake=_fake,
    reference=reference.conv_sketch.conv_sketch,
    prepare=prepare,
)


ROUTES = ("filters", "mixed", "direct", "correlate")  # csrc/conv_sketch.h: SketchRoute


def costs(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> dict[str, float]:
    """Work of each route for one example, in FLOP at the direct route's speed."""
    layer = layer_of(act, grad, geometry)
    groups, T, O, I = layer.groups, layer.T, layer.O, layer.columns
    P = O if left is None else left.shape[1]
    Q = I if right is None else right.shape[1]
    finish = 0 if right is None else 2 * I * Q
    work = {
        route: cost + groups * lanes(O) * (finish + 8 * Q) + (0 if left is None else 2 * groups * O * Q * lanes(P))
        for route, cost in gradient_costs(layer).items()
    }
    mix = 0 if left is None else 2 * T * O * lanes(P) + 24 * T * O
    if right is not None:
        work["filters"] = groups * (T * (2 * I * lanes(Q) + 2 * lanes(P) * Q) + 24 * T * layer.C + mix)
    if left is not None:
        work["mixed"] = groups * (mix + 2 * T * lanes(P) * I + 24 * T * layer.C + lanes(P) * (finish + 8 * Q))
    return work


def _empty(act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return not all(each is None or each.numel() for each in (act, grad, left, right))


def _cpu_route(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> str:
    if _empty(act, grad, left, right):
        return "nothing to sum"
    return describe(costs(act, grad, left, right, *geometry))


def _cpu_loses(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> str | None:
    return pointwise_loses(act, grad, *geometry) if left is None and right is None else None


@_op.kernel("cpu", refuses=cpu_refuses, loses=_cpu_loses, route=_cpu_route)
def conv_sketch_cpu(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> torch.Tensor:
    if _empty(act, grad, left, right):
        return _op.reference(act, grad, left, right, *geometry)
    return by_route(cheapest(costs(act, grad, left, right, *geometry)), act, grad, left, right, *geometry)


def by_route(
    route: str,
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    *geometry: Any,
) -> torch.Tensor:
    """The C++ kernel by a route of one's own choice; ``filters`` needs right, ``mixed`` left; nothing may be empty."""
    out = _fake(act, grad, left, right, *geometry)
    sides = [None if side is None else side.to(out.dtype).contiguous() for side in (left, right)]
    addresses = [0 if side is None else side.data_ptr() for side in sides]
    factors = _native.conv(act, grad, *geometry)
    _native._C.conv_sketch_cpu(
        factors, (*addresses, *out.shape[1:]), ROUTES.index(route), out.data_ptr(), _native.num_threads()
    )
    return out


def _cuda_loses(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> str | None:
    if _empty(act, grad, left, right) or (left is None and right is None):
        return None
    layer = layer_of(act, grad, geometry)
    groups, T, O, I = layer.groups, layer.T, layer.O, layer.columns
    P, mix = (O, 0) if left is None else (left.shape[1], 2 * T * groups * O * left.shape[1])
    kept = groups * T * P if mix else 0
    if right is None:  # one kernel element after the other, each from its own copy of the image
        taps = I // layer.C
        flops, numbers = mix + 2 * groups * T * P * I, 2 * kept + taps * (kept + 3 * groups * T * layer.C)
    else:
        Q = right.shape[1]
        flops, numbers = mix + 2 * groups * T * Q * (I + P), 2 * kept + 2 * groups * T * Q
    columns = P if _left_first(left, right) else right.shape[1]  # type: ignore[union-attr]
    return _conv_products.loses(act, grad, geometry, columns, flops, numbers)


def _left_first(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether left meets G_b on the chip.

    It leaves a tile's columns, three times as many as its rows: right goes first unless it is more than twice as wide.
    """
    return right is None or (left is not None and 2 * left.shape[1] < right.shape[1])


@_op.kernel("cuda", refuses=_conv_products.refuses, loses=_cuda_loses, route=_conv_products.route)
def conv_sketch_cuda(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> torch.Tensor:
    if _empty(act, grad, left, right):
        return _op.reference(act, grad, left, right, *geometry)
    return by_cuda_route(_conv_cuda.choose(act, grad, geometry[4]), act, grad, left, right, *geometry)


def by_cuda_route(
    route: str,
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    *geometry: Any,
) -> torch.Tensor:
    """The CUDA kernel by a route of one's own choice; nothing may be empty.

    One side meets G_b while its tiles are in registers; what is left, O × Q or P × I, meets the other in torch.
    """
    out, bias = _fake(act, grad, left, right, *geometry), bool(geometry[-1])
    left, right = (None if side is None else side.to(out.dtype) for side in (left, right))
    I = features(act, *geometry) - bias
    if right is None or _left_first(left, right):
        mixers = None if left is None else left.mT
        for part, rows in _conv_products.products(route, act, grad, geometry, rows=mixers):  # [b, P, I]
            out[part, :, : None if right is not None else I] = rows if right is None else rows @ right[:I]
    else:
        for part, columns in _conv_products.products(route, act, grad, geometry, columns=right[:I].mT):  # [b, Q, O]
            out[part] = columns.mT if left is None else left.mT @ columns.mT
    if bias:
        total = _conv_cuda.bias_gradients(grad, out.dtype)  # [B, O]
        total = total if left is None else total @ left
        if right is None:
            out[:, :, -1] = total
        else:
            out += total[:, :, None] * right[-1]
    return out
