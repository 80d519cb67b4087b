"""``conv_sqnorm``: squared norm of every example's gradient of a convolution."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _conv_cuda, _cuda
from ._checks import accumulator
from ._conv import GEOMETRY, LayerArguments, check_conv, prepare, with_layer_arguments
from ._conv_routes import Layer, cheapest, cpu_refuses, describe, gradient_costs, layer_of, position_counts

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_layer_arguments
def conv_sqnorm(
    act: torch.Tensor,
    grad: torch.Tensor,
    **layer: Unpack[LayerArguments],
) -> torch.Tensor:
    """Squared norm ‖G_b‖² of every example's weight gradient of a convolution; neither ``G_b`` nor patches are stored.

    ``G_b`` is weight-shaped and flattened to [O, I], I = C_in/groups · prod(kernel_size), like ``weight.flatten(1)``.

    Args:
        act: layer inputs [B, C_in, *spatial], 1 to 3 spatial dimensions.
        grad: gradients of the loss with respect to the layer's outputs [B, O, *out_spatial], same dtype and device.
        kernel_size, stride, padding, dilation, groups, padding_mode: the layer's own; ``padding`` may be ``"same"`` or
            ``"valid"``.
        bias: add the bias gradient's squared norm.

    Returns:
        [B], float64 for float64 inputs, else float32, in the units of gradient squared. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a geometry that do not fit.

    Source:
        The guide's "mathematics" page; for one position Goodfellow 2015, arXiv:1510.01799.

    Example:
        >>> act, grad = torch.randn(8, 3, 16, 16), torch.randn(8, 4, 16, 16)
        >>> gf.ops.conv_sqnorm(act, grad, kernel_size=3, padding=1).shape
        torch.Size([8])
    """
    return _op.call(
        *prepare(
            act,
            grad,
            **layer,
        )
    )


def _fake(act: torch.Tensor, *_: object) -> torch.Tensor:
    return act.new_empty(act.shape[0], dtype=accumulator(act.dtype))  # [B]


_op = Op(
    f"conv_sqnorm(Tensor act, Tensor grad, {GEOMETRY}) -> Tensor",
    check=check_conv,
    fake=_fake,
    reference=reference.conv_sqnorm.conv_sqnorm,
    prepare=prepare,
)


ROUTES = ("direct", "gram", "correlate")  # csrc/conv_sqnorm.h: ConvRoute
_GRAM_BYTES = 1 << 26  # of stored Grams a thread; beyond it they leave the last cache


@lru_cache(maxsize=1024)
def costs(layer: Layer) -> dict[str, float]:
    """Work of each route for one example, in FLOP at the direct route's speed.

    The constants are measured (AVX2): a Gram's triangle runs at 3/4 of the direct route's speed; adding up shifted
    Grams costs 9 FLOP a number in rows of 16, more in shorter ones; a phase of the stride costs as much as 40,000 FLOP
    and 1200 a channel; where positions are few their mean is often most of them, and taking it out costs 330 a kernel
    element and output channel.
    """
    T, kernel, counts = layer.T, layer.columns // layer.C, position_counts(layer)
    work = dict(gradient_costs(layer))
    if 4 * sum(counts) * 2 * T <= _GRAM_BYTES:
        triangles = sum(P * (P + 24) for P in counts) * layer.C + T * (T + 24) * layer.O
        shifted = 2 * T * T * (kernel + 2) * (1 + 20 / layer.out[-1])
        phases = len(counts) * (4e4 + 1200 * layer.C)
        means = 330 * kernel * layer.O if T < 8 else 0
        work["gram"] = layer.groups * (1.35 * triangles + shifted + phases + means)
    return work


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str:
    if not act.numel() or not grad.numel():
        return "nothing to sum"
    return describe(costs(layer_of(act, grad, geometry)))


@_op.kernel("cpu", refuses=cpu_refuses, route=_cpu_route)
def conv_sqnorm_cpu(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> torch.Tensor:
    if not act.numel() or not grad.numel():
        return _fake(act).zero_() if not geometry[-1] else _op.reference(act, grad, *geometry)
    return by_route(cheapest(costs(layer_of(act, grad, geometry))), act, grad, *geometry)


def by_route(route: str, act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> torch.Tensor:
    """The C++ kernel by a route of one's own choice; at least one example, channel and position."""
    out = _fake(act)
    factors = _native.conv(act, grad, *geometry)
    _native._C.conv_sqnorm_cpu(factors, ROUTES.index(route), out.data_ptr(), _native.num_threads())
    return out


@_op.kernel("cuda", refuses=_conv_cuda.refuses, route=_conv_cuda.route_of("conv_sqnorm"))
def conv_sqnorm_cuda(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> torch.Tensor:
    if not act.numel() or not grad.numel():
        return _fake(act).zero_() if not geometry[-1] else _op.reference(act, grad, *geometry)
    return by_cuda_route(_conv_cuda.choose(act, grad, geometry[4]), act, grad, *geometry)


def by_cuda_route(route: str, act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> torch.Tensor:
    """The CUDA kernel by a route of one's own choice; at least one example, channel and position."""
    out = _fake(act)
    act, grad = _conv_cuda.channels_side_by_side(act), _conv_cuda.channels_side_by_side(grad)
    factors, code = _native.conv(act, grad, *geometry), _conv_cuda.ROUTES.index(route)
    partial = out.new_empty(act.shape[0], _cuda.native().conv_sqnorm_cuda_partials(factors, code))
    _cuda.launch("conv_sqnorm_cuda", act.device, factors, code, partial.data_ptr(), out.data_ptr())
    if geometry[-1]:
        out += _conv_cuda.bias_gradients(grad, out.dtype).square().sum(1)
    return out
