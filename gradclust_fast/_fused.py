"""``record(fused=True)``: a layer whose weight gradient comes out of the pass that makes the norms.

``FusedLinear`` and ``FusedConv`` take the place of ``F.linear`` and of a convolution in the graph. When the output's
gradient arrives, the use that waits for it computes the norms and, where it is the parameter's only use, the weight
gradient with them; the node then passes that one on. In every other case the node makes the weight gradient itself, by
the product that autograd makes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ._dispatch import OPS
from .layers import Call, ConvCall, ConvFactors, Factors, LinearCall, LinearFactors
from .layers.base import accumulator, run_op


class Link:
    """Between a use and its node: the weight gradient, from when the use made it until the node takes it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.dtype = weight.dtype
        self.passed = False  # the node has run: what the use computes now comes too late
        self.made = False  # whether the weight gradient came this way
        self._from: tuple[torch.Tensor, int] | None = None
        self._weight_grad: torch.Tensor | None = None

    def arrived(self, grad: torch.Tensor) -> None:
        """The output's gradient, as the use sees it."""
        self._from = None if self.passed else (grad, grad._version)

    def put(self, weight_grad: torch.Tensor) -> None:
        self._weight_grad, self.made = weight_grad, True

    def take(self, grad: torch.Tensor) -> torch.Tensor | None:
        """The weight gradient, if it was made, and of ``grad``: a later hook may have replaced what the use saw."""
        made, origin = self._weight_grad, self._from
        self._weight_grad = self._from = None
        self.passed = True
        same = origin is not None and origin[0] is grad and origin[1] == grad._version
        self.made = self.made and same
        return made if same else None


class FusedFactors(Factors):
    """The factors of a parameter's only use: its norms bring its gradient along."""

    link: Link

    def sqnorm(self) -> torch.Tensor:
        if self.link.passed:
            return self.plain().sqnorm()
        weight_grad, sqnorm = self.both()
        self.link.put(weight_grad)
        return sqnorm

    @abstractmethod
    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight gradient and the norms."""

    @abstractmethod
    def plain(self) -> Factors:
        """The same without the link."""


class FusedLinearFactors(FusedFactors, LinearFactors):
    def __init__(self, factors: LinearFactors, link: Link) -> None:
        super().__init__(factors.act, factors.grad, factors.shape)
        self.link = link

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = self.link.dtype if self.link.dtype in (self.dtype, accumulator(self.dtype)) else None
        return run_op("grad_weight_sqnorm", self.act, self.grad, False, dtype)

    def plain(self) -> LinearFactors:
        return LinearFactors(self.act, self.grad, self.shape)

    def linear(self) -> LinearFactors:
        return self.plain()


class FusedConvFactors(FusedFactors, ConvFactors):
    def __init__(self, factors: ConvFactors, link: Link) -> None:
        super().__init__(factors.act, factors.grad, factors.shape, factors.geometry)
        self.link = link

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight_grad, sqnorm = run_op("conv_weight_sqnorm", self.act, self.grad, *self.geometry)
        return weight_grad.view(self.shape), sqnorm

    def plain(self) -> ConvFactors:
        return ConvFactors(self.act, self.grad, self.shape, self.geometry)


def linked(factors: Factors, link: Link) -> FusedFactors:
    if isinstance(factors, ConvFactors):
        return FusedConvFactors(factors, link)
    assert isinstance(factors, LinearFactors)
    return FusedLinearFactors(factors, link)


class FusedLinear(torch.autograd.Function):
    """``F.linear`` with a place where its weight gradient is handed over."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, link: Link, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.link = link
        input, weight = _autocast(input, weight)
        ctx.save_for_backward(input, weight)
        # Not a view of the flat product: autograd would forbid the in-place functions that often follow.
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return F.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            weight_grad = ctx.link.take(grad)
            input, weight = ctx.saved_tensors
            _, wants_input, wants_weight, wants_bias = ctx.needs_input_grad
            flat = grad.flatten(0, -2)
            input_grad = flat.mm(weight).view(input.shape) if wants_input else None
            if weight_grad is None and wants_weight:
                weight_grad = flat.mT.mm(input.flatten(0, -2))
            return None, input_grad, weight_grad, flat.sum(0) if wants_bias else None


class FusedConv(torch.autograd.Function):
    """``torch.conv1d``, ``conv2d`` or ``conv3d`` likewise."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        link: Link,
        conv: Callable[..., torch.Tensor],
        options: tuple[list[int], list[int], list[int], int],
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.link, ctx.options = link, options
        input, weight = _autocast(input, weight)
        ctx.save_for_backward(input, weight)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return conv(input, weight, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        with torch._C.DisableTorchFunction():
            weight_grad = ctx.link.take(grad)
            input, weight = ctx.saved_tensors
            stride, padding, dilation, groups = ctx.options
            _, _, _, wants_input, wants_weight, wants_bias = ctx.needs_input_grad
            missing = wants_weight and weight_grad is None
            bias_grad = grad.sum([0, *range(2, grad.dim())]) if wants_bias else None  # in torch's, weights come along
            input_grad = None
            if wants_input or missing:
                input_grad, made, _ = torch.ops.aten.convolution_backward(
                    *(grad, input, weight, None, stride, padding, dilation),
                    *(False, [0] * len(stride), groups, [wants_input, missing, False]),
                )
                weight_grad = made if missing else weight_grad
            return None, None, None, input_grad, weight_grad, bias_grad


def _autocast(input: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as autocast gives them to the layer."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, weight
    dtype = torch.get_autocast_dtype(device)
    input, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, weight))
    return input, weight


def call_linked(call: Call, func: Callable[..., torch.Tensor], link: Link) -> torch.Tensor:
    """What ``func`` would return of a fusable call, through a node that waits at the link."""
    tensors = call.held, call.parameters["weight"], call.parameters["bias"]
    if not isinstance(call, ConvCall):
        return FusedLinear.apply(link, *tensors)
    return FusedConv.apply(link, func, symmetric(call), *tensors)


def symmetric(call: ConvCall) -> tuple[list[int], list[int], list[int], int] | None:
    """Stride, padding, dilation and groups as ``convolution_backward`` takes them; None where the padding is uneven."""
    weight, held = call.parameters["weight"], call.held
    assert weight is not None and held is not None
    *_, stride, pads, dilation, groups, _ = OPS["conv_sqnorm"].prepare(
        held, held, kernel_size=weight.shape[2:], **call.options
    )
    return (stride, pads[::2], dilation, groups) if pads[::2] == pads[1::2] else None


def fusable(call: Call, turned: bool) -> bool:
    """Whether a routed call is one that ``call_linked`` can make, and autograd an ordinary one."""
    if type(call) not in (LinearCall, ConvCall) or turned or not torch.is_grad_enabled():
        return False
    input, weight, bias = call.held, call.parameters["weight"], call.parameters["bias"]
    assert input is not None and weight is not None
    if any(type(each) not in (torch.Tensor, torch.nn.Parameter, type(None)) for each in (input, weight, bias)):
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if isinstance(call, ConvCall):  # a GPU has no kernel to gain from
        if input.device.type != "cpu" or input.dim() != weight.dim() or symmetric(call) is None:
            return False
    elif weight.dim() != 2 or input.dim() < 2:
        return False
    # Whatever saves tensors its own way, above all a checkpoint, repeats or reads those of the plain layer.
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is None
