"""``conv_moments``: batch sums of the per-example gradients of a convolution and of their squares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator
from ._conv import GEOMETRY, Ints, check_conv, features, prepare


def conv_moments(
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
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
        )
    )


def _fake(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    O, I = grad.shape[1], features(act, kernel_size, groups, bias)
    first, second = (act.new_empty(O, I, dtype=accumulator(act.dtype)) for _ in range(2))  # [O, I (+ 1)] each
    return first, second


_op = Op(
    f"conv_moments(Tensor act, Tensor grad, {GEOMETRY}) -> (Tensor, Tensor)",
    check=check_conv,
    fake=_fake,
    reference=reference.conv_moments.conv_moments,
    prepare=prepare,
)
