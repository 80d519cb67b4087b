"""``conv_sketch``: two-sided projection of every example's gradient of a convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator
from ._conv import GEOMETRY, Ints, check_conv, check_conv_sides, features, prepare


def conv_sketch(
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    *,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    bias: bool = False,
    padding_mode: str = "zeros",
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
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> None:
    check_conv(act, grad, kernel_size, stride, padding, dilation, groups, bias)
    check_conv_sides(act, grad, left, right, kernel_size, groups, bias)


def _fake(
    act: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> torch.Tensor:
    P = grad.shape[1] if left is None else left.shape[1]
    Q = features(act, kernel_size, groups, bias) if right is None else right.shape[1]
    return act.new_empty(act.shape[0], P, Q, dtype=accumulator(act.dtype))  # [B, P, Q]


_op = Op(
    f"conv_sketch(Tensor act, Tensor grad, Tensor? left, Tensor? right, {GEOMETRY}) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.conv_sketch.conv_sketch,
    prepare=prepare,
)
