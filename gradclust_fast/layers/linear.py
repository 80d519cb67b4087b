"""Linear layers with any number of position dimensions: ``G_b = Σ_t grad[b, t] ⊗ act[b, t]``."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .base import BatchLayout, Call, DenseFactors, Factors, accumulator, run_op


class LinearFactors(Factors):
    """act [B, *, I] and grad [B, *, O] of one dtype; ``*`` is any number of positions, summed over.

    Args:
        shape: the parameter's, where it is [O, I] only after flattening.
    """

    def __init__(self, act: torch.Tensor, grad: torch.Tensor, shape: torch.Size | None = None) -> None:
        # The two differ where autocast gets a leaf in float32: autocast computes in the output's dtype.
        self.act, self.grad = act.to(grad.dtype), grad
        self.shape = torch.Size((grad.shape[-1], act.shape[-1])) if shape is None else shape

    @property
    def B(self) -> int:
        return self.act.shape[0]

    @property
    def device(self) -> torch.device:
        return self.act.device

    @property
    def dtype(self) -> torch.dtype:
        return self.act.dtype

    def sqnorm(self) -> torch.Tensor:
        return run_op("grad_sqnorm", self.act, self.grad, False)

    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        return run_op("grad_sketch", self.act, self.grad, left, right, False)

    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        return run_op("grad_dot", self.act, self.grad, center_rows, center_cols, False)

    def gram(self) -> torch.Tensor:
        return run_op("grad_gram", self.act, self.grad, False)

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = run_op("grad_moments", self.act, self.grad, False)
        return first.reshape(self.shape), second.reshape(self.shape)

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        positions = tuple(range(1, self.act.dim() - 1))
        dtype = accumulator(self.dtype)
        if not positions:
            return self.act.to(dtype), self.grad.to(dtype)
        return self.act.mean(positions, dtype=dtype), self.grad.sum(positions, dtype=dtype)

    def negated(self) -> LinearFactors:
        return LinearFactors(self.act, -self.grad, self.shape)

    def linear(self) -> LinearFactors:
        return self

    def _concat(self, other: LinearFactors) -> LinearFactors:
        mine, theirs = (_positions(self.act), _positions(self.grad)), (_positions(other.act), _positions(other.grad))
        mine, theirs = balanced(mine, theirs)
        return LinearFactors(torch.cat([mine[0], theirs[0]], 1), torch.cat([mine[1], theirs[1]], 1), self.shape)


class LinearCall(Call):
    """``torch.nn.functional.linear``."""

    shareable = turns = True
    functions = (F.linear,)
    modules: ClassVar = {nn.Linear: ("weight", "bias")}
    costs: ClassVar = {
        "weight": ("factored", "exact from the layer's input and output gradient"),
        "bias": ("sum", "the output gradient summed over positions"),
    }

    def __init__(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.held: torch.Tensor | None = input
        self.parameters = {"weight": weight, "bias": bias}

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        rows = layout.rows(grad)  # [B, *, O]
        if role == "bias":
            dtype = accumulator(rows.dtype)
            return DenseFactors(rows.to(dtype) if rows.dim() == 2 else _positions(rows).sum(1, dtype=dtype))
        assert self.held is not None
        return LinearFactors(layout.rows(self.held), rows)


Pair = tuple[torch.Tensor, torch.Tensor]


def balanced(first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Two uses (act, grad) in one dtype, the second as (act · 2^k, grad / 2^k), which is the same gradient.

    Sums over the positions of both are centred. Where one use has large activations and small gradients and the other
    the opposite (a table tied to the output layer), their common mean would cost the small ones their digits.
    """
    dtype = torch.promote_types(first[0].dtype, second[0].dtype)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # which has no room for other powers
    first, second = ((act.to(dtype), grad.to(dtype)) for act, grad in (first, second))
    if any(tensor.numel() == 0 for tensor in (*first, *second)):
        return first, second
    sizes = [tensor.abs().amax().to(accumulator(dtype)) for tensor in (*first, *second)]
    power = ((sizes[0].log2() - sizes[1].log2() - sizes[2].log2() + sizes[3].log2()) / 2).round()
    scale = torch.exp2(torch.where(power.isfinite(), power, 0.0).clamp(-60, 60)).to(dtype)
    return first, (second[0] * scale, second[1] / scale)


def _positions(rows: torch.Tensor) -> torch.Tensor:
    """[B, *, F] → [B, T, F]."""
    return rows.reshape(rows.shape[0], rows.shape[1:-1].numel(), rows.shape[-1])
