"""``grad_weight_sqnorm``: a linear layer's weight gradient and every example's squared norm, together."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import OPS, Op
from ._checks import accumulator, as_rows, check_factors, in_features
from ._linear import cpu_refuses
from ._triton import triton_loses, triton_refuses


def grad_weight_sqnorm(
    act: torch.Tensor, grad: torch.Tensor, bias: bool = False, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight gradient ``Σ_b G_b`` of a linear layer and the squared norms ‖G_b‖², ``G_b = grad[b]ᵀ act[b]``.

    A backward computes the first anyway. The kernels make each example's part of it on its own, and square it before
    it joins the sum, so the norms cost no further product and no further read. Where that does not pay, above all for
    one position, the two are computed one after the other (``gf.explain`` tells).

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        bias: G_b has the bias gradient as its last column.
        dtype: of the weight gradient: the factors' own, or the accumulator's (None).

    Returns:
        (weight_grad [O, I], or [O, I + 1] with a bias; sqnorm [B]). Sums are accumulated in float64 for float64 inputs,
        else in float32, which is also sqnorm's dtype. A NaN stays in its own row of sqnorm.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source:
        Gray et al. 2024, arXiv:2411.00999, norms out of LayerNorm's backward; here out of the product itself.

    Example:
        >>> act, grad = torch.randn(8, 5, 16), torch.randn(8, 5, 4)
        >>> weight_grad, sqnorm = gf.ops.grad_weight_sqnorm(act, grad)
        >>> weight_grad.shape, sqnorm.shape
        (torch.Size([4, 16]), torch.Size([8]))
    """
    return _op.call(act, grad, bias, dtype)


def _check(act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None) -> None:
    check_factors(act, grad)
    if dtype not in (None, act.dtype, accumulator(act.dtype)):
        raise TypeError(
            f"dtype must be {act.dtype} (the factors'), {accumulator(act.dtype)} (the sums'), or None for the latter, "
            f"got {dtype}; cast the result"
        )


def _fake(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = accumulator(act.dtype)
    weight_grad = act.new_empty(grad.shape[-1], in_features(act, bias), dtype=dtype or sums)  # [O, I (+ 1)]
    return weight_grad, act.new_empty(act.shape[0], dtype=sums)  # [B]


_op = Op(
    "grad_weight_sqnorm(Tensor act, Tensor grad, bool bias, ScalarType? dtype) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference.grad_weight_sqnorm.grad_weight_sqnorm,
)


_WIDENS = "dtype" in torch.ops.aten.mm.overloads()  # products of half types into float32: torch 2.8, on CUDA


def weight_gradient(act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None) -> torch.Tensor:
    """Σ_b G_b in ``dtype`` by torch's own product, from [B, T, ·] factors."""
    left, right = grad.flatten(0, 1).mT, act.flatten(0, 1)
    dtype = dtype or accumulator(act.dtype)
    if dtype == act.dtype:
        out = left @ right
    elif act.is_cuda and _WIDENS:
        out = torch.mm(left, right, out_dtype=dtype)
    else:
        out = left.to(dtype) @ right.to(dtype)
    if not bias:
        return out
    return torch.cat([out, left.sum(1, keepdim=True, dtype=accumulator(act.dtype)).to(dtype)], 1)


def _cpu_refuses(act: torch.Tensor, *_: object) -> str | None:
    return cpu_refuses(act)


def one_pass(B: int, T: int, I: int, O: int) -> bool:
    """Whether the C++ kernel makes both sooner than torch's product and ``grad_sqnorm`` one after the other.

    The constants are measured (AVX2): adding a strip to the sums costs as much as four positions, torch's product runs
    at 1.2 times the strips' speed, a Gram sum at 1 / 1.4 of it.
    """
    if T <= 1 or min(B, I, O) == 0:
        return False
    product = 2 * I * O
    return (T + 4) * product <= T * product / 1.2 + 1.4 * min(T * (T + 16) * (I + O), T * product)


def _cpu_route(act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None) -> str:
    if one_pass(act.shape[0], act.shape[1:-1].numel(), act.shape[-1], grad.shape[-1]):
        return "one pass: every example's gradient strip by strip, squared before it joins the sum"
    return f"torch's product, then the norms: {OPS['grad_sqnorm'].kernels['cpu'].route(act, grad, bias)}"


@_op.kernel("cpu", refuses=_cpu_refuses, route=_cpu_route)
def grad_weight_sqnorm_cpu(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, d = as_rows(act), as_rows(grad)
    B, T, I = rows.shape
    if one_pass(B, T, I, d.shape[2]):
        return by_kernel(rows, d, bias, dtype)
    return weight_gradient(rows, d, bias, dtype), OPS["grad_sqnorm"].kernels["cpu"].run(act, grad, bias)


def by_kernel(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The C++ kernel on [B, T, ·] factors, whatever is faster; nothing may be empty."""
    weight_grad, sqnorm = _fake(act, grad, bias, None)
    factors, threads = _native.linear(act, grad, bias), _native.num_threads()
    _native._C.grad_weight_sqnorm_cpu(factors, weight_grad.data_ptr(), sqnorm.data_ptr(), threads)
    return weight_grad.to(dtype or weight_grad.dtype), sqnorm


def _triton_refuses(act: torch.Tensor, *_: object) -> str | None:
    return triton_refuses(act)


def _triton_loses(act: torch.Tensor, *_: object) -> str | None:
    return triton_loses(act)


def _triton_route(act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None) -> str:
    from ..triton_kernels.grad_weight_sqnorm import one_pass

    T, I, O = act.shape[1:-1].numel(), act.shape[-1], grad.shape[-1]
    if one_pass(T, I, O, act.device):
        return "one pass: every example's gradient in a second accumulator of the weight gradient's tiles"
    return f"torch's product, then the norms: {OPS['grad_sqnorm'].kernels['triton'].route(act, grad, bias)}"


@_op.kernel("triton", refuses=_triton_refuses, loses=_triton_loses, route=_triton_route)
def grad_weight_sqnorm_triton(
    act: torch.Tensor, grad: torch.Tensor, bias: bool, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.grad_weight_sqnorm import grad_weight_sqnorm as fill  # here: it imports Triton
    from ..triton_kernels.grad_weight_sqnorm import one_pass

    rows, d = as_rows(act), as_rows(grad)
    if not one_pass(rows.shape[1], rows.shape[2], d.shape[2], act.device):
        return weight_gradient(rows, d, bias, dtype), OPS["grad_sqnorm"].kernels["triton"].run(act, grad, bias)
    weight_grad, sqnorm = _fake(act, grad, bias, dtype)
    fill(rows, d, bias, weight_grad, sqnorm)
    return weight_grad, sqnorm
