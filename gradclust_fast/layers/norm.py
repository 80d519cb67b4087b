"""Affine normalisation layers: the weight's gradient is ``Σ_t grad[t] ∘ x̂[t]``, the bias's ``Σ_t grad[t]``.

Both are as small as the parameter, so they are stored per example. The normalised input x̂ is computed again from the
layer's input, in the accumulator's precision, which costs less than keeping it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .base import BatchLayout, Call, DenseFactors, Factors, accumulator

_COSTS = {
    "weight": ("small", "normalises the input once more; a gradient an example, as large as the parameter"),
    "bias": ("sum", "the output gradient summed over positions"),
}


class _NormCall(Call):
    lower_precision = False  # autocast runs normalisations in float32
    costs: ClassVar = _COSTS

    def __init__(self, input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.held: torch.Tensor | None = input
        self.parameters = {"weight": weight, "bias": bias}

    @abstractmethod
    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        """x̂, the output without weight and bias."""

    def _products(self, role: str, grad: torch.Tensor) -> torch.Tensor:
        """What is summed over an example's positions."""
        grad = grad.to(accumulator(grad.dtype))
        if role == "bias":
            return grad
        assert self.held is not None
        return grad * self._normalised(self.held.to(grad.dtype))


class _TrailingNormCall(_NormCall):
    """Normalises over the trailing dimensions ``shape``; all others but the batch are positions."""

    shareable = True
    shape: Sequence[int]

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        rows = layout.rows(self._products(role, grad), len(self.shape))  # [B, *, *shape]
        return DenseFactors(rows.reshape(rows.shape[0], -1 if rows.numel() else 0, *self.shape).sum(1))


class LayerNormCall(_TrailingNormCall):
    """``torch.nn.functional.layer_norm`` and ``torch.layer_norm``."""

    functions: ClassVar = (F.layer_norm, torch.layer_norm)
    modules: ClassVar = {nn.LayerNorm: ("weight", "bias")}

    def __init__(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> None:
        super().__init__(input, weight, bias)
        self.shape, self.eps = normalized_shape, eps

    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(input, self.shape, None, None, self.eps)


class RMSNormCall(_TrailingNormCall):
    """``torch.nn.functional.rms_norm`` and ``torch.rms_norm``."""

    functions: ClassVar = (F.rms_norm, torch.rms_norm)
    modules: ClassVar = {nn.RMSNorm: ("weight",)}

    def __init__(
        self,
        input: torch.Tensor,
        normalized_shape: Sequence[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__(input, weight, None)
        self.shape, self.eps = normalized_shape, eps

    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(input, self.shape, None, self.eps)


class _ChannelNormCall(_NormCall):
    """Weight and bias belong to dimension 1 of [B, C, *]."""

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        products = self._products(role, grad)
        total = layout.fold(products.reshape(*products.shape[:2], products.shape[2:].numel()).sum(2))  # [B, (n,) C]
        return DenseFactors(total if total.dim() == 2 else total.sum(1))


class GroupNormCall(_ChannelNormCall):
    """``torch.nn.functional.group_norm`` and ``torch.group_norm``."""

    functions: ClassVar = (F.group_norm, torch.group_norm)
    modules: ClassVar = {nn.GroupNorm: ("weight", "bias")}

    def __init__(
        self,
        input: torch.Tensor,
        num_groups: int,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> None:
        super().__init__(input, weight, bias)
        self.groups, self.eps = num_groups, eps

    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        return F.group_norm(input, self.groups, None, None, self.eps)


class BatchNormCall(_ChannelNormCall):
    """``torch.nn.functional.batch_norm``. In train mode rows are batch-coupled: example b's share of the gradient."""

    functions: ClassVar[tuple[Callable, ...]] = (F.batch_norm,)
    modules: ClassVar = dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("weight", "bias"))

    def __init__(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, weight, bias)
        self.eps = eps
        # Copies: the next forward in train mode may change the statistics before this one's backward.
        keep = not training and running_mean is not None and running_var is not None
        self.mean = running_mean.clone() if keep else None  # type: ignore[union-attr]
        self.var = running_var.clone() if keep else None  # type: ignore[union-attr]

    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        if self.mean is None or self.var is None:
            return F.batch_norm(input, None, None, None, None, True, 0.0, self.eps)
        return F.batch_norm(input, self.mean.to(input.dtype), self.var.to(input.dtype), eps=self.eps)


class InstanceNormCall(BatchNormCall):
    """``torch.nn.functional.instance_norm``."""

    functions: ClassVar = (F.instance_norm,)
    modules: ClassVar = dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("weight", "bias"))

    def __init__(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor | None = None,
        running_var: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)

    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        if self.mean is None:
            return F.instance_norm(input, eps=self.eps)
        return super()._normalised(input)
