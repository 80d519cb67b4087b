"""``conv_dot``: inner products of every example's gradient of a convolution with factored centres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _conv_cuda, _conv_products
from ._checks import accumulator
from ._conv import GEOMETRY, LayerArguments, check_conv_centers, prepare, with_layer_arguments
from ._conv_routes import (
    GRADIENT_ROUTES,
    cheapest,
    cpu_refuses,
    describe,
    gradient_costs,
    lanes,
    layer_of,
    pointwise_loses,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_layer_arguments
def conv_dot(
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    **layer: Unpack[LayerArguments],
) -> torch.Tensor:
    """Inner products ⟨G_b, C_k⟩ of every example's weight gradient of a convolution with K factored centres.

    ``G_b`` is weight-shaped and flattened to [O, I], I = C_in/groups · prod(kernel_size), like ``weight.flatten(1)``.

    Args:
        act: layer inputs [B, C_in, *spatial], 1 to 3 spatial dimensions.
        grad: gradients of the loss with respect to the layer's outputs [B, O, *out_spatial], same dtype and device.
        center_grad: [K, O] or [K, r, O], in act's dtype or the result's.
        center_act: [K, I] or [K, r, I], I + 1 features with a bias. ``C_k = Σ_r center_grad[k, r] ⊗ center_act[k, r]``.
        kernel_size, stride, padding, dilation, groups, padding_mode: the layer's own; ``padding`` may be ``"same"`` or
            ``"valid"``.
        bias: G_b has the bias gradient as its last column, [O, I + 1].

    Returns:
        [B, K], float64 for float64 inputs, else float32. A NaN in an example stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a geometry that do not fit.

    Source:
        Faghri et al. 2020, arXiv:2007.04532, section 3 (rank-1 centres); ``center_act`` is a bank of filters.

    Example:
        >>> act, grad = torch.randn(8, 3, 16, 16), torch.randn(8, 4, 16, 16)
        >>> gf.ops.conv_dot(act, grad, torch.randn(5, 4), torch.randn(5, 27), kernel_size=3, padding=1).shape
        torch.Size([8, 5])
    """
    return _op.call(
        *prepare(
            act,
            grad,
            center_grad,
            center_act,
            **layer,
        )
    )


def _fake(act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, *_: object) -> torch.Tensor:
    return act.new_empty(act.shape[0], center_grad.shape[0], dtype=accumulator(act.dtype))  # [B, K]


_op = Op(
    f"conv_dot(Tensor act, Tensor grad, Tensor center_grad, Tensor center_act, {GEOMETRY}) -> Tensor",
    check=check_conv_centers,
    fake=_fake,
    reference=reference.conv_dot.conv_dot,
    prepare=prepare,
)


def costs(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> dict[str, float]:
    """Work of each route for one example, in FLOP at the direct route's speed."""
    layer = layer_of(act, grad, geometry)
    groups, T, O, I = layer.groups, layer.T, layer.O, layer.columns
    columns, K = center_grad.shape[:-1].numel(), center_grad.shape[0]
    entries = groups * lanes(O) * I
    products = 2 * entries * K + 4 * entries * columns / act.shape[0]
    work = {route: cost + products for route, cost in gradient_costs(layer).items()}
    work["filters"] = groups * T * (2 * lanes(columns) * (I + O + 4) + 24 * (layer.C + O))
    return work


def _empty(*tensors: torch.Tensor) -> bool:
    return not all(each.numel() for each in tensors)


def _cpu_route(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> str:
    if _empty(act, grad, center_grad, center_act):
        return "nothing to sum"
    return describe(costs(act, grad, center_grad, center_act, *geometry))


def _cpu_loses(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> str | None:
    return pointwise_loses(act, grad, *geometry)


@_op.kernel("cpu", refuses=cpu_refuses, loses=_cpu_loses, route=_cpu_route)
def conv_dot_cpu(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> torch.Tensor:
    if _empty(act, grad, center_grad, center_act):
        return _op.reference(act, grad, center_grad, center_act, *geometry)
    route = cheapest(costs(act, grad, center_grad, center_act, *geometry))
    return by_route(route, act, grad, center_grad, center_act, *geometry)


def by_route(
    route: str,
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    *geometry: Any,
) -> torch.Tensor:
    """The C++ kernel by a route of one's own choice, ``filters`` or one through G_b; nothing may be empty."""
    out = _fake(act, grad, center_grad)
    D, A = (side.to(out.dtype).contiguous() for side in (center_grad, center_act))
    rank = D.shape[1] if D.dim() == 3 else 1
    centers = (D.data_ptr(), A.data_ptr(), D.shape[0], rank)
    filters = route == "filters"
    how = 0 if filters else GRADIENT_ROUTES.index(route)
    factors = _native.conv(act, grad, *geometry)
    _native._C.conv_dot_cpu(factors, centers, filters, how, out.data_ptr(), _native.num_threads())
    return out


def _cuda_loses(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> str | None:
    if _empty(act, grad, center_grad, center_act):
        return None
    layer, columns = layer_of(act, grad, geometry), center_grad.shape[:-1].numel()
    filtered = layer.groups * layer.T * columns
    return _conv_products.loses(
        act, grad, geometry, columns, 2 * filtered * (layer.columns + layer.O), numbers=6 * filtered
    )


@_op.kernel("cuda", refuses=_conv_products.refuses, loses=_cuda_loses, route=_conv_products.route)
def conv_dot_cuda(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> torch.Tensor:
    if _empty(act, grad, center_grad, center_act):
        return _op.reference(act, grad, center_grad, center_act, *geometry)
    route = _conv_cuda.choose(act, grad, geometry[4])
    return by_cuda_route(route, act, grad, center_grad, center_act, *geometry)


def by_cuda_route(
    route: str,
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    *geometry: Any,
) -> torch.Tensor:
    """The CUDA kernel by a route of one's own choice; nothing may be empty."""
    out = _fake(act, grad, center_grad)
    D, A = (side.to(out.dtype).reshape(out.shape[1], -1, side.shape[-1]) for side in (center_grad, center_act))
    weight = A[..., :-1] if geometry[-1] else A
    for part, sums in _conv_products.products(route, act, grad, geometry, rows=D, columns=weight):
        out[part] = sums
    if geometry[-1]:
        out += _conv_cuda.bias_gradients(grad, out.dtype) @ (D * A[..., -1:]).sum(1).mT
    return out
