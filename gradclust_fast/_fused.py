"""``record(fused=True)``: a linear layer whose weight gradient comes out of the pass that makes the norms.

``FusedLinear`` takes the place of ``F.linear`` in the graph. When its output's gradient arrives, the use that waits for
it computes the norms and, where it is the parameter's only use, the weight gradient with them; the node then passes
that one on. In every other case the node makes the weight gradient itself, by the product that autograd makes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .layers import Call, LinearCall, LinearFactors
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


class FusedFactors(LinearFactors):
    """The factors of a parameter's only use: its norms bring its gradient along."""

    def __init__(self, factors: LinearFactors, link: Link) -> None:
        super().__init__(factors.act, factors.grad, factors.shape)
        self.link = link

    def sqnorm(self) -> torch.Tensor:
        if self.link.passed:
            return super().sqnorm()
        dtype = self.link.dtype if self.link.dtype in (self.dtype, accumulator(self.dtype)) else None
        weight_grad, sqnorm = run_op("grad_weight_sqnorm", self.act, self.grad, False, dtype)
        self.link.put(weight_grad)
        return sqnorm

    def linear(self) -> LinearFactors:
        return LinearFactors(self.act, self.grad, self.shape)


class FusedLinear(torch.autograd.Function):
    """``F.linear`` with a place where its weight gradient is handed over."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, link: Link, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.link = link
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (input, weight))
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


def fusable(call: Call, turned: bool) -> bool:
    """Whether a routed call is a linear layer that ``FusedLinear`` can stand for, and autograd an ordinary one."""
    if type(call) is not LinearCall or turned or not torch.is_grad_enabled():
        return False
    input, weight, bias = call.held, call.parameters["weight"], call.parameters["bias"]
    assert input is not None and weight is not None
    if any(type(each) not in (torch.Tensor, torch.nn.Parameter, type(None)) for each in (input, weight, bias)):
        return False
    if weight.dim() != 2 or input.dim() < 2 or torch._C._are_functorch_transforms_active():
        return False
    # Whatever saves tensors its own way, above all a checkpoint, repeats or reads those of the plain layer.
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is None
