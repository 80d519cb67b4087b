"""``conv_gram``: inner products of all pairs of per-example gradients of a convolution."""

from __future__ import annotations

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator
from ._conv import GEOMETRY, Ints, check_conv, prepare


def conv_gram(
    act: torch.Tensor,
    grad: torch.Tensor,
    *,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    bias: bool = False,
    padding_mode: str = "zeros",
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
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
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
