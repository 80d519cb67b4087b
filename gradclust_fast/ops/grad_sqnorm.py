"""``grad_sqnorm``: squared norm of every example's gradient of a linear layer."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._checks import accumulator, as_rows, check_factors
from ._linear import cpu_refuses, sequence_route
from ._triton import triton_loses, triton_refuses


def grad_sqnorm(act: torch.Tensor, grad: torch.Tensor, bias: bool = False) -> torch.Tensor:
    """Squared norm ‖G_b‖² of every example's weight gradient ``G_b = grad[b]ᵀ act[b]``, never storing ``G_b``.

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        bias: add the bias gradient's squared norm ‖Σ_t grad[b, t]‖².

    Returns:
        [B], float64 for float64 inputs, else float32, in the units of gradient squared. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source:
        Goodfellow 2015, arXiv:1510.01799, for one position; the centred Gram sum of the guide's "mathematics" page
        for sequences.

    Example:
        >>> act, grad = torch.randn(8, 5, 16), torch.randn(8, 5, 4)
        >>> gf.ops.grad_sqnorm(act, grad).shape
        torch.Size([8])
    """
    return _op.call(act, grad, bias)


def _check(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> None:
    check_factors(act, grad)


def _fake(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    return act.new_empty(act.shape[0], dtype=accumulator(act.dtype))  # [B]


_op = Op(
    "grad_sqnorm(Tensor act, Tensor grad, bool bias) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.grad_sqnorm.grad_sqnorm,
)


def _cpu_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return cpu_refuses(act)


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str:
    T, I, O = act.shape[1:-1].numel(), act.shape[-1], grad.shape[-1]
    return "rank 1: ‖act‖²‖grad‖², one read of each" if T == 1 else sequence_route(T, I, O, act.dtype)[1]


@_op.kernel("cpu", refuses=_cpu_refuses, route=_cpu_route)
def grad_sqnorm_cpu(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    out = _fake(act, grad, bias)
    act, grad = as_rows(act), as_rows(grad)
    route, _ = sequence_route(act.shape[1], act.shape[2], grad.shape[2], act.dtype)
    _native._C.grad_sqnorm_cpu(_native.linear(act, grad, bias), route, out.data_ptr(), _native.num_threads())
    return out


def _cuda_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    if act.shape[1:-1].numel() != 1:
        return "the CUDA kernel handles one position (T = 1)"
    return _cuda.refuses(act)


@_op.kernel("cuda", refuses=_cuda_refuses, route=lambda *_: "rank 1: ‖act‖²‖grad‖², one read of each")
def grad_sqnorm_cuda(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    out = _fake(act, grad, bias)
    act, grad = as_rows(act), as_rows(grad)
    _cuda.launch("grad_sqnorm_cuda", act.device, _native.linear(act, grad, bias), out.data_ptr())
    return out


def _triton_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return triton_refuses(act)


def _triton_loses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return triton_loses(act)


def _triton_route(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str:
    from ..triton_kernels.grad_sqnorm import route

    T, I, O = act.shape[1:-1].numel(), act.shape[-1], grad.shape[-1]
    return route(act.shape[0], T, I, O, act.dtype, act.device)


@_op.kernel("triton", refuses=_triton_refuses, loses=_triton_loses, route=_triton_route)
def grad_sqnorm_triton(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    from ..triton_kernels.grad_sqnorm import grad_sqnorm as fill  # here: it imports Triton

    out = _fake(act, grad, bias)
    fill(as_rows(act), as_rows(grad), bias, out)
    return out
