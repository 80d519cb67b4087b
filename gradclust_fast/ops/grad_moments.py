"""``grad_moments``: sums of the examples' gradients of a linear layer and of their squares."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from ._checks import accumulator, as_rows, check_factors, in_features
from ._linear import cpu_refuses
from ._triton import triton_loses, triton_refuses


def grad_moments(act: torch.Tensor, grad: torch.Tensor, bias: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate-wise sums ``Σ_b G_b`` and ``Σ_b G_b∘G_b`` of the weight gradients ``G_b = grad[b]ᵀ act[b]``.

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        bias: G_b has the bias gradient as its last column.

    Returns:
        Two tensors [O, I], or [O, I + 1] with a bias; float64 for float64 inputs, else float32; units of gradient and
        of gradient squared. The variance of a coordinate over the batch is ``second / B − (first / B)²``.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source:
        For one position ``G_b∘G_b = grad[b]² ⊗ act[b]²`` (BackPACK, Dangel et al. 2020, arXiv:1912.10985).

    Example:
        >>> act, grad = torch.randn(8, 5, 16), torch.randn(8, 5, 4)
        >>> first, second = gf.ops.grad_moments(act, grad)
        >>> second.shape
        torch.Size([4, 16])
    """
    return _op.call(act, grad, bias)


def _check(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> None:
    check_factors(act, grad)


def _fake(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (grad.shape[-1], in_features(act, bias))
    dtype = accumulator(act.dtype)
    return act.new_empty(shape, dtype=dtype), act.new_empty(shape, dtype=dtype)  # [O, I (+ 1)] each


_op = Op(
    "grad_moments(Tensor act, Tensor grad, bool bias) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference.grad_moments.grad_moments,
)


def _cpu_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return cpu_refuses(act)


def _cpu_loses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    if act.shape[1:-1].numel() == 1:
        return "for one position both moments are plain products, where torch's are as fast or faster"
    return None


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str:
    if act.shape[1:-1].numel() == 1:
        return "two products, the second of the squares"
    return "one gradient at a time, strip by strip, added and squared in cache"


@_op.kernel("cpu", refuses=_cpu_refuses, loses=_cpu_loses, route=_cpu_route)
def grad_moments_cpu(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = _fake(act, grad, bias)
    act, grad = as_rows(act), as_rows(grad)
    factors = _native.linear(act, grad, bias)
    _native._C.grad_moments_cpu(factors, first.data_ptr(), second.data_ptr(), _native.num_threads())
    return first, second


def _triton_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return triton_refuses(act)


def _triton_loses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return _cpu_loses(act, grad, bias) or triton_loses(act)


def _triton_route(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str:
    if act.shape[1:-1].numel() == 1:
        return "two products, the second of the squares"
    return "one gradient at a time, tile by tile, added and squared in registers"


@_op.kernel("triton", refuses=_triton_refuses, loses=_triton_loses, route=_triton_route)
def grad_moments_triton(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.grad_moments import grad_moments as fill  # here: it imports Triton

    first, second = _fake(act, grad, bias)
    fill(as_rows(act), as_rows(grad), bias, first, second)
    return first, second
