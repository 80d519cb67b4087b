"""Convolutions: a linear layer whose activations are the image's patches, which are never unfolded in memory."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .._dispatch import OPS
from .base import BatchLayout, Call, DenseFactors, Factors, accumulator, run_op
from .linear import LinearFactors, balanced


class ConvFactors(Factors):
    """act [B, C, *spatial] and grad [B, O, *out_spatial] of one dtype. G_b is weight-shaped: [O, C/groups, *kernel].

    Args:
        geometry: (kernel_size, stride, padding, dilation, groups, bias=False) as the conv ops take them: lists, with
            the padding before and after each spatial dimension.
    """

    def __init__(self, act: torch.Tensor, grad: torch.Tensor, shape: torch.Size, geometry: tuple[Any, ...]) -> None:
        self.act, self.grad, self.shape, self.geometry = act.to(grad.dtype), grad, shape, geometry

    @property
    def B(self) -> int:
        return self.act.shape[0]

    @property
    def device(self) -> torch.device:
        return self.act.device

    @property
    def dtype(self) -> torch.dtype:
        return self.act.dtype

    def sqnorm(self) -> torch.Tensor:
        return run_op("conv_sqnorm", self.act, self.grad, *self.geometry)

    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        return run_op("conv_sketch", self.act, self.grad, left, right, *self.geometry)

    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        return run_op("conv_dot", self.act, self.grad, center_rows, center_cols, *self.geometry)

    def gram(self) -> torch.Tensor:
        return run_op("conv_gram", self.act, self.grad, *self.geometry)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = run_op("conv_moments", self.act, self.grad, *self.geometry)
        return first.reshape(self.shape), second.reshape(self.shape)

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        groups, O = self.geometry[4], self.shape[0]
        dims = tuple(range(2, self.act.dim()))
        mean = torch.stack([tap.mean(dims, dtype=accumulator(self.dtype)) for tap in self._taps()], 2)  # [B, C, k]
        total = self.grad.sum(dims, dtype=mean.dtype)  # [B, O]
        if groups == 1:
            return mean.flatten(1), total
        spread = total.new_zeros(self.B, groups, O)  # row γ keeps the channels of group γ only
        for group, part in enumerate(total.split(O // groups, 1)):
            spread[:, group, group * (O // groups) : (group + 1) * (O // groups)] = part
        return mean.reshape(self.B, groups, -1), spread

    def negated(self) -> ConvFactors:
        return ConvFactors(self.act, -self.grad, self.shape, self.geometry)

    def linear(self) -> Factors:
        if self.geometry[4] != 1:
            return DenseFactors.of(self)
        columns = self.columns()
        return LinearFactors(columns.act.squeeze(3).mT, columns.grad.squeeze(3).mT, self.shape)

    def columns(self) -> ConvFactors:
        """The same gradients as those of a 1 × 1 convolution over the unfolded image [B, C·k, T, 1]."""
        unfolded = torch.stack(list(self._taps()), 2)  # [B, C, k, *out]
        T = self.grad.shape[2:].numel()
        act = unfolded.reshape(self.B, -1, T, 1)
        return ConvFactors(act, self.grad.reshape(self.B, -1, T, 1), self.shape, _pointwise(self.geometry[4]))

    def _taps(self) -> Any:
        """What each element of the kernel sees: views [B, C, *out] of the padded image, in the kernel's order."""
        kernel_size, stride, padding, dilation, *_ = self.geometry
        image = F.pad(self.act, [p for i in range(len(padding) - 2, -1, -2) for p in padding[i : i + 2]])
        out = self.grad.shape[2:]
        for element in product(*map(range, kernel_size)):
            window = [slice(None), slice(None)]
            for e, d, s, n in zip(element, dilation, stride, out):
                window.append(slice(e * d, e * d + s * (n - 1) + 1, s) if n else slice(0, 0))
            yield image[tuple(window)]

    def _concat(self, other: ConvFactors) -> ConvFactors | None:
        if self.geometry[4] != other.geometry[4]:
            return None
        mine, theirs = self.columns(), other.columns()
        first, second = balanced((mine.act, mine.grad), (theirs.act, theirs.grad))
        act, grad = torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)
        return ConvFactors(act, grad, self.shape, mine.geometry)


def _each(value: Any, spatial: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * spatial if len(values) == 1 else values


def _pointwise(groups: int) -> tuple[Any, ...]:
    return [1, 1], [1, 1], [0, 0, 0, 0], [1, 1], groups, False


class ConvCall(Call):
    """``torch.conv1d``, ``conv2d`` and ``conv3d``."""

    functions = (torch.conv1d, torch.conv2d, torch.conv3d)
    modules: ClassVar = dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), ("weight", "bias"))
    costs: ClassVar = {
        "weight": ("factored", "exact from the layer's input and output gradient, nothing is unfolded"),
        "bias": ("sum", "the output gradient summed over positions"),
    }

    def __init__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        self.held: torch.Tensor | None = input
        self.parameters = {"weight": weight, "bias": bias}
        self.options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        self.shape = weight.shape

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        if grad.dim() != len(self.shape):
            raise ValueError(
                f"has an output of shape {list(grad.shape)} without a batch dimension; unsqueeze(0) its input"
            )
        if role == "bias":
            return _folded_bias(grad, layout)
        assert self.held is not None
        act, grad, *geometry = OPS["conv_sqnorm"].prepare(self.held, grad, kernel_size=self.shape[2:], **self.options)
        return _folded(ConvFactors(act, grad, self.shape, tuple(geometry)), layout)


def _folded_bias(grad: torch.Tensor, layout: BatchLayout) -> DenseFactors:
    total = layout.fold(grad.sum(tuple(range(2, grad.dim())), dtype=accumulator(grad.dtype)))  # [B, (n,) O]
    return DenseFactors(total if total.dim() == 2 else total.sum(1))


def _folded(factors: ConvFactors, layout: BatchLayout) -> ConvFactors:
    """Several images an example become one image of all their patches."""
    if layout.fold(factors.act).dim() == factors.act.dim():
        return factors
    columns = factors.columns()
    act, grad = (
        layout.fold(t.squeeze(3)).transpose(1, 2).flatten(2).unsqueeze(3) for t in (columns.act, columns.grad)
    )  # [B, C·k, n·T, 1], [B, O, n·T, 1]
    return ConvFactors(act, grad, factors.shape, columns.geometry)


class ConvTransposeCall(Call):
    """``torch.conv_transpose1d``, ``conv_transpose2d`` and ``conv_transpose3d``.

    The weight [C_in, C_out/groups, *kernel] sees patches of the output's gradient at every position of the input: its
    gradient is that of an ordinary convolution whose image is the output's gradient and whose gradient is the input.
    """

    functions = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    modules: ClassVar = dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), ("weight", "bias"))
    costs: ClassVar = ConvCall.costs

    def __init__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> None:
        self.held: torch.Tensor | None = input
        self.parameters = {"weight": weight, "bias": bias}
        self.shape, self.groups = weight.shape, groups
        spatial = weight.dim() - 2
        self.stride, self.dilation = _each(stride, spatial), _each(dilation, spatial)
        self.padding, self.output_padding = _each(padding, spatial), _each(output_padding, spatial)

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        if grad.dim() != len(self.shape):
            raise ValueError(
                f"has an output of shape {list(grad.shape)} without a batch dimension; unsqueeze(0) its input"
            )
        if role == "bias":
            return _folded_bias(grad, layout)
        assert self.held is not None
        pads = []
        for dim, (before, extra) in enumerate(zip(self.padding, self.output_padding), 2):
            # The output's last `extra` positions are padding of the other kind; those beyond `before` nothing reaches.
            pads += [before, max(0, before - extra)]
            grad = grad.narrow(dim, 0, grad.shape[dim] - max(0, extra - before))
        geometry = (list(self.shape[2:]), self.stride, pads, self.dilation, self.groups, False)
        return _folded(ConvFactors(grad, self.held.to(grad.dtype), self.shape, geometry), layout)
