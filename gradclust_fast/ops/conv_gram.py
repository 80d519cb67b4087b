"""``conv_gram``: inner products of all pairs of per-example gradients of a convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _native, reference
from .._dispatch import Op
from ._checks import accumulator
from ._conv import GEOMETRY, LayerArguments, check_conv, prepare, with_layer_arguments
from ._conv_routes import (
    GRADIENT_ROUTES,
    cheapest,
    cpu_refuses,
    describe,
    gradient_costs,
    lanes,
    layer_of,
    pointwise_loses,
    position_counts,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_layer_arguments
def conv_gram(
    act: torch.Tensor,
    grad: torch.Tensor,
    **layer: Unpack[LayerArguments],
) -> torch.Tensor:
    """Inner products ⟨G_b, G_c⟩ of all pairs of per-example weight gradients of a convolution.

    ``G_b`` is weight-shaped and flattened to [O, I], I = C_in/groups · prod(kernel_size), like ``weight.flatten(1)``.

    Args:
        act: layer inputs [B, C_in, *spatial], 1 to 3 spatial dimensions.
        grad: gradients of the loss with respect to the layer's outputs [B, O, *out_spatial], same dtype and device.
        kernel_size, stride, padding, dilation, groups, padding_mode: the layer's own; ``padding`` may be ``"same"`` or
            ``"valid"``.
        bias: add the bias gradients' inner products.

    Returns:
        [B, B], float64 for float64 inputs, else float32. A NaN in an example stays in its own row and column.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a geometry that do not fit.

    Source:
        The guide's "mathematics" page.

    Example:
        >>> act, grad = torch.randn(8, 3, 16, 16), torch.randn(8, 4, 16, 16)
        >>> gf.ops.conv_gram(act, grad, kernel_size=3, padding=1).shape
        torch.Size([8, 8])
    """
    return _op.call(
        *prepare(
            act,
            grad,
            **layer,
        )
    )


def _fake(act: torch.Tensor, *_: object) -> torch.Tensor:
    return act.new_empty(act.shape[0], act.shape[0], dtype=accumulator(act.dtype))  # [B, B]


_op = Op(
    f"conv_gram(Tensor act, Tensor grad, {GEOMETRY}) -> Tensor",
    check=check_conv,
    fake=_fake,
    reference=reference.conv_gram.conv_gram,
    prepare=prepare,
)


ROUTES = ("positions", *GRADIENT_ROUTES)
_MOST_POSITIONS = 128  # the square of it is stored for several pairs of examples a thread


def costs(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> dict[str, float]:
    """Work of each route for one example, its products with half of the others included."""
    layer = layer_of(act, grad, geometry)
    pairs = (act.shape[0] + 24) / 2  # a panel of examples is multiplied up to its end
    entries = layer.groups * lanes(layer.O) * layer.columns
    work = {route: cost + 2 * pairs * entries for route, cost in gradient_costs(layer).items()}
    T, counts = layer.T, position_counts(layer)
    if max(T, sum(counts)) <= _MOST_POSITIONS:
        # A product of few channels still costs as much as one of 16.
        products = 2 * sum(n * n for n in counts) * (layer.C + 16) + 2 * (T + 1) ** 2 * (layer.O + 16)
        added = 4 * layer.columns / layer.C * T * T
        work["positions"] = layer.groups * (
            pairs * (1.1 * products + added) + 24 * (sum(counts) * layer.C + T * layer.O)
        )
    return work


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str:
    if not act.numel() or not grad.numel():
        return "nothing to sum"
    return describe(costs(act, grad, *geometry))


@_op.kernel("cpu", refuses=cpu_refuses, loses=pointwise_loses, route=_cpu_route)
def conv_gram_cpu(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> torch.Tensor:
    if not act.numel() or not grad.numel():
        return _op.reference(act, grad, *geometry)
    return by_route(cheapest(costs(act, grad, *geometry)), act, grad, *geometry)


def by_route(route: str, act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> torch.Tensor:
    """The C++ kernel by a route of one's own choice; nothing may be empty."""
    out = _fake(act)
    positions = route == "positions"
    how = 0 if positions else GRADIENT_ROUTES.index(route)
    factors = _native.conv(act, grad, *geometry)
    _native._C.conv_gram_cpu(factors, positions, how, out.data_ptr(), _native.num_threads())
    return out
