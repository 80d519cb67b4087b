"""Affine normalisation layers: the weight's gradient is ``Σ_t grad[t] ∘ x̂[t]``, the bias's ``Σ_t grad[t]``.

Both are as small as the parameter, so they are stored per example. The normalised input x̂ is computed again from the
layer's input, in the accumulator's precision, which costs less than keeping it. Layer, RMS and group
normalisation do so in the op ``norm_grads``, which reads input and gradient once for both parameters.
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .base import BatchLayout, Call, DenseFactors, Factors, accumulator, run_op

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
        self._bias: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None

    def _read(self, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's input and the gradient of its output, in one dtype."""
        assert self.held is not None
        dtype = torch.promote_types(self.held.dtype, grad.dtype)
        return self.held.to(dtype), grad.to(dtype)

    def _keep_bias(self, grad: torch.Tensor, bias: torch.Tensor) -> None:
        """One read of grad gives both parameters' gradients; the bias is asked for next, if it is recorded."""
        self._bias = weakref.ref(grad), bias

    def _kept_bias(self, grad: torch.Tensor) -> torch.Tensor | None:
        kept, self._bias = self._bias, None
        return kept[1] if kept is not None and kept[0]() is grad else None


class _TrailingNormCall(_NormCall):
    """Normalises over the trailing dimensions ``shape``; all others but the batch are positions."""

    shareable = True
    rms: ClassVar[bool] = False
    shape: Sequence[int]
    eps: float | None

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        bias = self._kept_bias(grad) if role == "bias" else None
        if role == "weight":
            input, output_grad = (layout.rows(tensor, len(self.shape)) for tensor in self._read(grad))
            B, D = input.shape[0], math.prod(self.shape)
            positions = input.shape[1 : input.dim() - len(self.shape)].numel()
            eps = torch.finfo(accumulator(input.dtype)).eps if self.eps is None else self.eps
            flat = (B, positions, D)
            weight, bias = run_op("norm_grads", input.reshape(flat), output_grad.reshape(flat), 0, eps, self.rms)
            self._keep_bias(grad, bias.reshape(B, *self.shape))
            return DenseFactors(weight.reshape(B, *self.shape))
        if bias is None:
            rows = layout.rows(grad.to(accumulator(grad.dtype)), len(self.shape))  # [B, *, *shape]
            bias = rows.reshape(rows.shape[0], -1 if rows.numel() else 0, *self.shape).sum(1)
        return DenseFactors(bias)


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


class RMSNormCall(_TrailingNormCall):
    """``torch.nn.functional.rms_norm`` and ``torch.rms_norm``."""

    rms = True
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


def _per_channel(tensor: torch.Tensor) -> torch.Tensor:
    """[B, C, *] → [B, C], summed over positions."""
    return tensor.reshape(*tensor.shape[:2], tensor.shape[2:].numel()).sum(2)


class _ChannelNormCall(_NormCall):
    """Weight and bias belong to dimension 1 of [B, C, *]."""

    @abstractmethod
    def _sums(self, role: str, grad: torch.Tensor) -> torch.Tensor:
        """[n, C] gradients of one parameter, a row of the layer's input each."""

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        total = layout.fold(self._sums(role, grad))  # [B, (n,) C]
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

    def _sums(self, role: str, grad: torch.Tensor) -> torch.Tensor:
        bias = self._kept_bias(grad) if role == "bias" else None
        if role == "weight":
            weight, bias = run_op("norm_grads", *self._read(grad), self.groups, self.eps, False)
            self._keep_bias(grad, bias)
            return weight
        return _per_channel(grad.to(accumulator(grad.dtype))) if bias is None else bias


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

    def _sums(self, role: str, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.to(accumulator(grad.dtype))
        if role == "bias":
            return _per_channel(grad)
        assert self.held is not None
        return _per_channel(grad * self._normalised(self.held.to(grad.dtype)))

    def _normalised(self, input: torch.Tensor) -> torch.Tensor:
        """x̂, the output without weight and bias."""
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
