"""``conv_dot``: inner products of every example's gradient of a convolution with factored centres."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator
from ._conv import GEOMETRY, Ints, check_conv, check_conv_centers, prepare


def conv_dot(
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    *,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    bias: bool = False,
    padding_mode: str = "zeros",
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
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
    )


def _check(
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> None:
    check_conv(act, grad, kernel_size, stride, padding, dilation, groups, bias)
    check_conv_centers(act, grad, center_grad, center_act, kernel_size, groups, bias)


def _fake(act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, *_: object) -> torch.Tensor:
    return act.new_empty(act.shape[0], center_grad.shape[0], dtype=accumulator(act.dtype))  # [B, K]


_op = Op(
    f"conv_dot(Tensor act, Tensor grad, Tensor center_grad, Tensor center_act, {GEOMETRY}) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.conv_dot.conv_dot,
    prepare=prepare,
)
