"""Weight gradient of a convolution, and the squared norms of the per-example gradients it is the sum of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .conv_common import accumulate_dtype, weight_gradient
from .conv_sqnorm import conv_sqnorm


def conv_weight_sqnorm(
    act: torch.Tensor,
    grad: torch.Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_b G_b by torch's own convolution and ‖G_b‖²."""
    geometry = (kernel_size, stride, padding, dilation, groups, bias)
    return weight_gradient(accumulate_dtype(act), accumulate_dtype(grad), *geometry), conv_sqnorm(act, grad, *geometry)
