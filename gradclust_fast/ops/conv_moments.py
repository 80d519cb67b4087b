"""``conv_moments``: batch sums of the per-example gradients of a convolution and of their squares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _conv_cuda, _cuda
from ._checks import accumulator
from ._conv import GEOMETRY, LayerArguments, check_conv, features, prepare, with_layer_arguments
from ._conv_routes import GRADIENT_ROUTES, cheapest, cpu_refuses, describe, gradient_costs, layer_of, pointwise_loses

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_layer_arguments
def conv_moments(
    act: torch.Tensor,
    grad: torch.Tensor,
    **layer: Unpack[LayerArguments],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the batch of every example's weight gradient of a convolution and of its elementwise square.

    ``G_b`` is weight-shaped and flattened to [O, I], I = C_in/groups · prod(kernel_size), like ``weight.flatten(1)``.

    Args:
        act: layer inputs [B, C_in, *spatial], 1 to 3 spatial dimensions.
        grad: gradients of the loss with respect to the layer's outputs [B, O, *out_spatial], same dtype and device.
        kernel_size, stride, padding, dilation, groups, padding_mode: the layer's own; ``padding`` may be ``"same"`` or
            ``"valid"``.
        bias: both sums have one more, last column for the bias.

    Returns:
        ``(Σ_b G_b, Σ_b G_b∘G_b)``, each [O, I (+ 1)], float64 for float64 inputs, else float32.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a geometry that do not fit.

    Source:
        The guide's "mathematics" page.

    Example:
        >>> act, grad = torch.randn(8, 3, 16, 16), torch.randn(8, 4, 16, 16)
        >>> [m.shape for m in gf.ops.conv_moments(act, grad, kernel_size=3, padding=1)]
        [torch.Size([4, 27]), torch.Size([4, 27])]
    """
    return _op.call(
        *prepare(
            act,
            grad,
            **layer,
        )
    )


def _fake(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    O, I = grad.shape[1], features(act, *geometry)
    first, second = (act.new_empty(O, I, dtype=accumulator(act.dtype)) for _ in range(2))  # [O, I (+ 1)] each
    return first, second


_op = Op(
    f"conv_moments(Tensor act, Tensor grad, {GEOMETRY}) -> (Tensor, Tensor)",
    check=check_conv,
    fake=_fake,
    reference=reference.conv_moments.conv_moments,
    prepare=prepare,
)


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str:
    if not act.numel() or not grad.numel():
        return "nothing to sum"
    return f"each tile of G_b added and squared in cache; {describe(gradient_costs(layer_of(act, grad, geometry)))}"


@_op.kernel("cpu", refuses=cpu_refuses, loses=pointwise_loses, route=_cpu_route)
def conv_moments_cpu(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not act.numel() or not grad.numel():
        return _op.reference(act, grad, *geometry)
    return by_route(cheapest(gradient_costs(layer_of(act, grad, geometry))), act, grad, *geometry)


def by_route(route: str, act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The C++ kernel by a route of one's own choice; nothing may be empty."""
    first, second = _fake(act, grad, *geometry)
    factors, how = _native.conv(act, grad, *geometry), GRADIENT_ROUTES.index(route)
    _native._C.conv_moments_cpu(factors, how, first.data_ptr(), second.data_ptr(), _native.num_threads())
    return first, second


@_op.kernel("cuda", refuses=_conv_cuda.refuses, route=_conv_cuda.route_of("conv_moments"))
def conv_moments_cuda(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not act.numel() or not grad.numel():
        return _op.reference(act, grad, *geometry)
    return by_cuda_route(_conv_cuda.choose(act, grad, geometry[4]), act, grad, *geometry)


def by_cuda_route(
    route: str, act: torch.Tensor, grad: torch.Tensor, *geometry: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The CUDA kernel by a route of one's own choice; nothing may be empty."""
    first, second = _fake(act, grad, *geometry)
    act, grad = _conv_cuda.channels_side_by_side(act), _conv_cuda.channels_side_by_side(grad)
    factors, code = _native.conv(act, grad, *geometry), _conv_cuda.ROUTES.index(route)
    slices, weight = _cuda.native().conv_moments_cuda_slices(factors, code), first.shape[1] - bool(geometry[-1])
    partial = first.new_empty(slices, 2, first.shape[0], weight)
    _cuda.launch(
        "conv_moments_cuda", act.device, factors, code, partial.data_ptr(), first.data_ptr(), second.data_ptr()
    )
    if geometry[-1]:
        sums = _conv_cuda.bias_gradients(grad, first.dtype)  # [B, O]
        first[:, -1], second[:, -1] = sums.sum(0), sums.square().sum(0)
    return first, second
