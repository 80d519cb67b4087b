"""What the CUDA kernels of the conv ops share: when they run, by which route, and in which layout they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _native
from ..triton_kernels._support import float32_precision
from . import _cuda

ROUTES = ("tiles", "tiles_tf32", "correlate", "tiles_cp_async")  # csrc/types.h: ConvCudaRoute
"""The last is never chosen: it is ``tiles`` without bulk tensor copies, for measuring what those are worth."""

_TEXT = {
    "tiles": "tiles of G_b by implicit im2col",
    "tiles_tf32": "tiles of G_b by implicit im2col, float32 rounded to tf32",
    "correlate": "one short correlation a pair of channels",
}


def refuses(act: torch.Tensor, grad: torch.Tensor, *_: object) -> str | None:
    """Why the CUDA kernels cannot run on a conv op's arguments, or None."""
    if act[:1].numel() >= 2**31 or grad[:1].numel() >= 2**31:
        return "the CUDA kernel takes fewer than 2³¹ numbers an example"
    return _cuda.refuses(act)


def choose(act: torch.Tensor, grad: torch.Tensor, groups: int) -> str:
    """Tiles pad a group to 8 input and 16 output channels; short correlations pad nothing and use no tensor cores."""
    pairs, precise = act.shape[1] * grad.shape[1] // groups**2, act.dtype in (torch.float32, torch.float64)
    tf32 = act.dtype == torch.float32 and float32_precision() == "tf32"
    if groups > 1 and pairs <= (64 if precise and not tf32 else 16):
        return "correlate"
    return "tiles_tf32" if tf32 else "tiles"


def route(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str:
    """The route as a sentence."""
    return _TEXT[choose(act, grad, geometry[4])] if act.numel() and grad.numel() else "nothing to sum"


def route_of(name: str) -> Callable[..., str]:
    """``route`` of an op whose native launcher also tells (``{name}_cuda_in_bulk``) how its tiles are fetched."""

    def text(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str:
        sentence = route(act, grad, *geometry)
        if not act.numel() or not grad.numel() or choose(act, grad, geometry[4]) == "correlate":
            return sentence
        factors = _native.conv(_as_read(act), _as_read(grad), *geometry)
        in_bulk = getattr(_cuda.native(), f"{name}_cuda_in_bulk")
        with torch.cuda.device(act.device if act.is_cuda else -1):
            bulk = in_bulk(factors, ROUTES.index(choose(act, grad, geometry[4])))
        return f"{sentence}, fetched by {'bulk tensor copies' if bulk else 'cp.async'}"

    return text


def _as_read(tensor: torch.Tensor) -> torch.Tensor:
    """What the kernel would read: the tensor, or, of a copy that would be made first, the strides."""
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    read = channels_side_by_side(meta)
    return tensor if read is meta else read


def channels_side_by_side(tensor: torch.Tensor) -> torch.Tensor:
    """Channel stride 1, by a copy where there are enough channels for 16-byte reads."""
    if tensor.stride(1) == 1 or tensor.shape[1] < 8:
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def bias_gradients(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, O] Σ_t grad[b, :, t]."""
    return grad.sum(list(range(2, grad.dim())), dtype=dtype)
