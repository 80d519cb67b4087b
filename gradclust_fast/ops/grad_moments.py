"""``grad_moments``: sums of the examples' gradients of a linear layer and of their squares."""

from __future__ import annotations

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator, check_factors, in_features


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
