"""``grad_gram``: all pairwise inner products of the examples' gradients of a linear layer."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from ._checks import accumulator, as_rows, check_factors
from ._linear import cpu_refuses
from ._triton import triton_loses, triton_refuses


def grad_gram(act: torch.Tensor, grad: torch.Tensor, bias: bool = False) -> torch.Tensor:
    """Inner products ⟨G_b, G_c⟩ of all pairs of per-example weight gradients ``G_b = grad[b]ᵀ act[b]``.

    Args:
        act: layer inputs [B, *, I]; ``*`` is any number of position dimensions, summed over within an example.
        grad: gradients of the loss with respect to the layer's outputs [B, *, O], same dtype and device.
        bias: add the inner products of the bias gradients ``Σ_t grad[b, t]``.

    Returns:
        [B, B], symmetric to the bit; float64 for float64 inputs, else float32, in the units of gradient squared.
        A NaN in an example stays in its own row and column.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source:
        ``⟨G_b, G_c⟩ = Σ_{s,t} (act[b, s]·act[c, t]) (grad[b, s]·grad[c, t])``; the guide's "mathematics" page.

    Example:
        >>> act, grad = torch.randn(8, 5, 16), torch.randn(8, 5, 4)
        >>> gf.ops.grad_gram(act, grad).shape
        torch.Size([8, 8])
    """
    return _op.call(act, grad, bias)


def _check(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> None:
    check_factors(act, grad)


def _fake(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    return act.new_empty(act.shape[0], act.shape[0], dtype=accumulator(act.dtype))  # [B, B]


_op = Op(
    "grad_gram(Tensor act, Tensor grad, bool bias) -> Tensor",
    check=_check,
    fake=_fake,
    reference=reference.grad_gram.grad_gram,
)


def _cpu_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return cpu_refuses(act)


def _cpu_loses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    B, T, I, O = act.shape[0], act.shape[1:-1].numel(), act.shape[-1], grad.shape[-1]
    pairs, stored = B * B * T * T * (I + O), 2 * B * T * I * O + 2 * B * B * I * O
    if stored < pairs:
        return f"{pairs:.3g} FLOPs over pairs of positions; {stored:.3g} by making G a few rows at a time"
    return None


@_op.kernel(
    "cpu",
    refuses=_cpu_refuses,
    loses=_cpu_loses,
    route=lambda *_: "pairs of examples below the diagonal, summed in cache",
)
def grad_gram_cpu(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    out = _fake(act, grad, bias)
    act, grad = as_rows(act), as_rows(grad)
    _native._C.grad_gram_cpu(_native.linear(act, grad, bias), out.data_ptr(), _native.num_threads())
    return out


def _triton_refuses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return triton_refuses(act)


def _triton_loses(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> str | None:
    return _cpu_loses(act, grad, bias) or triton_loses(act)


@_op.kernel(
    "triton",
    refuses=_triton_refuses,
    loses=_triton_loses,
    route=lambda *_: "pairs of examples below the diagonal, summed in registers",
)
def grad_gram_triton(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    from ..triton_kernels.grad_gram import grad_gram as fill  # here: it imports Triton

    out = _fake(act, grad, bias)
    fill(as_rows(act), as_rows(grad), bias, out)
    return out
