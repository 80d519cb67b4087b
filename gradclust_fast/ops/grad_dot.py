"""``grad_dot``: inner products of every example's gradient of a linear layer with factored centres."""

from __future__ import annotations

import torch

from .. import reference
from .._dispatch import Op
from ._checks import accumulator, as_rows, check_centers, check_factors
from ._linear import cpu_refuses, quantities_cpu
from ._triton import triton_loses, triton_refuses


def grad_dot(
    act: torch.Tensor,
    grad: torch.Tensor,
    center_grad: torch.Tensor,
    center_act: torch.Tensor,
    bias: bool = False,
) -> torch.Tensor:
    """Inner products ⟨G_b, C_k⟩ of every example's weight gradient with K centres; neither is stored as a matrix.

    ``G_b = grad[b]ᵀ act[b]`` and ``C_k = center_grad[k] ⊗ center_act[k]``, or, with a rank dimension,
    ``C_k = Σ_r center_grad[k, r] ⊗ center_act[k, r]``.

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        center_grad: [K, O] or [K, r, O], in act's dtype or the result's.
        center_act: [K, I] or [K, r, I]; with a bias I + 1 features, the last one meeting the constant 1.
        bias: G_b has the bias gradient as its last column.

    Returns:
        [B, K], float64 for float64 inputs, else float32, in the units of gradient times centre. A NaN in an example
        stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source:
        Faghri et al. 2020, arXiv:2007.04532, section 3 (rank-1 centres).

    Example:
        >>> act, grad = torch.randn(8, 5, 16), torch.randn(8, 5, 4)
        >>> gf.ops.grad_dot(act, grad, torch.randn(3, 4), torch.randn(3, 16)).shape
        torch.Size([8, 3])
    """
    return _op.call(act, grad, center_grad, center_act, bias)


def _check(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> None:
    check_factors(act, grad)
    check_centers(act, grad, center_grad, center_act, bias)


def _fake(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> torch.Tensor:
    return act.new_empty(act.shape[0], center_grad.shape[0], dtype=accumulator(act.dtype))  # [B, K]


_op = Op(
    "grad_dot(Tensor act, Tensor grad, Tensor center_grad, Tensor center_act, bool bias) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.grad_dot.grad_dot,
)


def _cpu_refuses(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> str | None:
    return cpu_refuses(act)


@_op.kernel("cpu", refuses=_cpu_refuses, route=lambda *_: "both products in one tile, multiplied and summed over T")
def grad_dot_cpu(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> torch.Tensor:
    out = _fake(act, grad, center_grad, center_act, bias)
    quantities_cpu(act, grad, bias, dot=out, center_grad=center_grad, center_act=center_act)
    return out


def _triton_refuses(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> str | None:
    return triton_refuses(act)


def _triton_loses(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> str | None:
    return triton_loses(act)


@_op.kernel(
    "triton",
    refuses=_triton_refuses,
    loses=_triton_loses,
    route=lambda *_: "both products in one tile, multiplied and summed over T",
)
def grad_dot_triton(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> torch.Tensor:
    from ..triton_kernels.grad_quantities import grad_quantities as fill  # here: it imports Triton

    out = _fake(act, grad, center_grad, center_act, bias)
    fill(as_rows(act), as_rows(grad), bias, dot=out, center_grad=center_grad, center_act=center_act)
    return out
