"""The layers on which the conv ops are timed, and what a user would otherwise write: unfold, then einsum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import gradclust_fast as gf


@dataclass
class Layer:
    B: int
    C: int
    O: int
    size: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1
    groups: int = 1
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __post_init__(self) -> None:
        out = (self.size + 2 * self.padding - self.kernel_size) // self.stride + 1
        self.T, self.I = out * out, self.C // self.groups * self.kernel_size**2
        self.geometry: dict[str, Any] = {
            name: getattr(self, name) for name in ("kernel_size", "stride", "padding", "groups")
        }
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        self.act = torch.randn(self.B, self.C, self.size, self.size).to(self.dtype, memory_format=layout)
        self.grad = torch.randn(self.B, self.O, out, out).to(self.dtype, memory_format=layout)
        self.conv = torch.nn.Conv2d(self.C, self.O, bias=False, **self.geometry).to(self.dtype, memory_format=layout)
        kernel = f"{self.kernel_size}×{self.kernel_size}"
        extra = f" stride {self.stride}" * (self.stride > 1) + f" groups {self.groups}" * (self.groups > 1)
        self.label = f"B={self.B} {kernel} {self.C}→{self.O} {self.size}×{self.size}{extra} {str(self.dtype)[6:]}"
        self.label += " channels-last" * self.channels_last

    @property
    def direct_flops(self) -> float:
        return 2 * self.B * self.T * self.I * self.O

    def bytes(self, extra: int) -> float:
        return self.act.nbytes + self.grad.nbytes + 4 * extra

    def unfolded(self) -> torch.Tensor:
        """G_b [B, O, I]."""
        patches = F.unfold(self.act, self.kernel_size, padding=self.padding, stride=self.stride)
        if self.groups == 1:
            return torch.einsum("bot,bit->boi", self.grad.flatten(2), patches)
        patches = patches.unflatten(1, (self.groups, self.I))
        rows = self.grad.flatten(2).unflatten(1, (self.groups, -1))
        return torch.einsum("bgot,bgit->bgoi", rows, patches).flatten(1, 2)

    def step(self) -> None:
        """The layer's own forward and backward."""
        act = self.act.detach().requires_grad_()
        torch.autograd.grad(self.conv(act), [act, self.conv.weight], self.grad)

    def weight_gradient(self) -> torch.Tensor:
        """The layer's own weight gradient, summed over the batch."""
        return torch.nn.grad.conv2d_weight(
            self.act, self.conv.weight.shape, self.grad, self.stride, self.padding, groups=self.groups
        )

    def baselines(self, quantity: Callable[[torch.Tensor], Any]) -> dict[str, Callable[[], Any]]:
        return {
            "unfold + einsum": lambda: quantity(self.unfolded()),
            "layer's forward + backward": self.step,
            "layer's weight gradient": self.weight_gradient,
        }

    def in_cuda(self, op: str, *tensors: torch.Tensor) -> bool:
        """Whether the CUDA kernel is chosen, which makes G_b whatever that costs."""
        return gf.explain(op, self.act, self.grad, *tensors, **self.geometry).backend == "cuda"

    def composed(self, op: Callable[..., Any], *tensors: torch.Tensor) -> dict[str, Callable[[], Any]]:
        """The op's reference: torch's convolutions and products, nothing unfolded."""

        def run() -> Any:
            with gf.backend("reference"):
                return op(self.act, self.grad, *tensors, **self.geometry)

        return {"composed of torch ops": run}


# Of a residual network: one layer in three layouts, deeper ones; depthwise; pointwise; the first layer.
GPU_LAYERS = (
    dict(B=256, C=64, O=64, size=56, dtype=torch.bfloat16, channels_last=True),
    dict(B=256, C=64, O=64, size=56, dtype=torch.bfloat16),
    dict(B=256, C=64, O=64, size=56),
    dict(B=256, C=128, O=128, size=28, dtype=torch.bfloat16, channels_last=True),
    dict(B=256, C=256, O=256, size=14, dtype=torch.bfloat16, channels_last=True),
    dict(B=256, C=512, O=512, size=7, dtype=torch.bfloat16, channels_last=True),
    dict(B=256, C=384, O=384, size=14, groups=384, dtype=torch.bfloat16, channels_last=True),
    dict(B=256, C=256, O=64, size=56, kernel_size=1, padding=0, dtype=torch.bfloat16, channels_last=True),
    dict(B=256, C=3, O=64, size=224, kernel_size=7, stride=2, padding=3, dtype=torch.bfloat16, channels_last=True),
)
