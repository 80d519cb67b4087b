"""``conv_weight_sqnorm``: a convolution's weight gradient and every example's squared norm, together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import _native, reference
from .._dispatch import Op
from ._checks import accumulator
from ._conv import GEOMETRY, LayerArguments, check_conv, features, prepare, with_layer_arguments
from ._conv_routes import GRADIENT_ROUTES, cheapest, cpu_refuses, describe, gradient_costs, layer_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_layer_arguments
def conv_weight_sqnorm(
    act: torch.Tensor,
    grad: torch.Tensor,
    **layer: Unpack[LayerArguments],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight gradient ``Σ_b G_b`` of a convolution and the squared norms ‖G_b‖².

    A backward computes the first anyway. The C++ kernel squares each tile of every example's ``G_b`` before it joins
    the sum, so the norms cost next to nothing. A GPU has no such kernel yet: there the two are computed one after the
    other, in PyTorch.

    Args:
        act: layer inputs [B, C_in, *spatial], 1 to 3 spatial dimensions.
        grad: gradients of the loss with respect to the layer's outputs [B, O, *out_spatial], same dtype and device.
        kernel_size, stride, padding, dilation, groups, padding_mode: the layer's own; ``padding`` may be ``"same"`` or
            ``"valid"``.
        bias: G_b has the bias gradient as its last column.

    Returns:
        (weight_grad [O, I (+ 1)], like ``weight.flatten(1)``, I = C_in/groups · prod(kernel_size); sqnorm [B]), both
        float64 for float64 inputs, else float32. A NaN stays in its own row of sqnorm.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a geometry that do not fit.

    Source:
        The guide's "mathematics" page; for a linear layer see ``grad_weight_sqnorm``.

    Example:
        >>> act, grad = torch.randn(8, 3, 16, 16), torch.randn(8, 4, 16, 16)
        >>> weight_grad, sqnorm = gf.ops.conv_weight_sqnorm(act, grad, kernel_size=3, padding=1)
        >>> weight_grad.shape, sqnorm.shape
        (torch.Size([4, 27]), torch.Size([8]))
    """
    return _op.call(
        *prepare(
            act,
            grad,
            **layer,
        )
    )


def _fake(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = accumulator(act.dtype)
    weight_grad = act.new_empty(grad.shape[1], features(act, *geometry), dtype=dtype)  # [O, I (+ 1)]
    return weight_grad, act.new_empty(act.shape[0], dtype=dtype)  # [B]


_op = Op(
    f"conv_weight_sqnorm(Tensor act, Tensor grad, {GEOMETRY}) -> (Tensor, Tensor)",
    check=check_conv,
    fake=_fake,
    reference=reference.conv_weight_sqnorm.conv_weight_sqnorm,
    prepare=prepare,
)


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str:
    if not act.numel() or not grad.numel():
        return "nothing to sum"
    work = gradient_costs(layer_of(act, grad, geometry))
    return f"one pass, a tile squared before it joins the sum; {describe(work)}"


@_op.kernel("cpu", refuses=cpu_refuses, route=_cpu_route)
def conv_weight_sqnorm_cpu(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not act.numel() or not grad.numel():
        return _op.reference(act, grad, *geometry)
    # Measured: a Gram sum beside torch's convolution is slower, even where it has a fraction of the FLOPs.
    return by_route(cheapest(gradient_costs(layer_of(act, grad, geometry))), act, grad, *geometry)


def by_route(route: str, act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The C++ kernel by a route of one's own choice; nothing may be empty."""
    weight_grad, sqnorm = _fake(act, grad, *geometry)
    factors, how = _native.conv(act, grad, *geometry), GRADIENT_ROUTES.index(route)
    _native._C.conv_weight_sqnorm_cpu(factors, how, weight_grad.data_ptr(), sqnorm.data_ptr(), _native.num_threads())
    return weight_grad, sqnorm
