"""Products with a weight on the right, ``x @ W`` with W [I, O], and the transposed linear layer of GPT-2.

``x @ W.T`` is the linear layer itself. Otherwise ``G_b = Σ_t act[b, t] ⊗ grad[b, t]``: a linear layer's, transposed.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import nn

from .base import BatchLayout, Call, DenseFactors, Factors, accumulator
from .linear import LinearFactors


class TransposedFactors(Factors):
    """The transposes of a linear layer's gradients.

    The activation stays the activation: it is the side that Gram sums are centred on.
    """

    def __init__(self, inner: LinearFactors) -> None:
        self.inner, self.shape = inner, torch.Size(inner.shape[::-1])

    @property
    def B(self) -> int:
        return self.inner.B

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def sqnorm(self) -> torch.Tensor:
        return self.inner.sqnorm()

    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.sketch(right, left).mT

    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        return self.inner.dot(center_cols, center_rows)

    def gram(self) -> torch.Tensor:
        return self.inner.gram()

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = self.inner.moments()
        return first.mT.contiguous(), second.mT.contiguous()

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inner.rank1()[::-1]

    def negated(self) -> TransposedFactors:
        return TransposedFactors(self.inner.negated())

    def linear(self) -> LinearFactors:
        return LinearFactors(self.inner.grad, self.inner.act, self.shape)

    def _concat(self, other: TransposedFactors) -> TransposedFactors:
        return TransposedFactors(self.inner._concat(other.inner))


class MatmulCall(Call):
    """``input @ weight`` with a two-dimensional weight on the right."""

    functions: ClassVar[tuple[Any, ...]] = (
        torch.matmul,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.mm,
        torch.Tensor.mm,
    )
    modules: ClassVar = {}
    turns = True
    lead: torch.Size | None = None
    """The input's shape before its owner flattened it, without the features."""

    def __init__(
        self, input: torch.Tensor, other: torch.Tensor | None = None, mat2: torch.Tensor | None = None, **rest: Any
    ) -> None:
        self._read(input, other if mat2 is None else mat2, None)

    def _read(self, input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        self.held: torch.Tensor | None = input
        # Anything else is no route: a parameter in it is an unknown use.
        known = weight is not None and weight.dim() == 2 and input.dim() >= 2
        self.parameters = {"weight": weight, "bias": bias} if known else {}

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        lead = grad.shape[:-1] if self.lead is None else self.lead
        rows = layout.rows(grad.reshape(*lead, grad.shape[-1]))  # [B, *, O]
        if role == "bias":
            positions = tuple(range(1, rows.dim() - 1))
            dtype = accumulator(rows.dtype)
            return DenseFactors(rows.sum(positions, dtype=dtype) if positions else rows.to(dtype))
        assert self.held is not None
        act = layout.rows(self.held.reshape(*lead, self.held.shape[-1]))
        return TransposedFactors(LinearFactors(act, rows))


class AddmmCall(MatmulCall):
    """``torch.addmm(bias, input, weight)``, which is what Transformers' ``Conv1D`` calls."""

    functions: ClassVar[tuple[Any, ...]] = (torch.addmm, torch.Tensor.addmm)
    costs: ClassVar = {
        "weight": ("factored", "exact from the layer's input and output gradient"),
        "bias": ("sum", "the output gradient summed over positions"),
    }

    def __init__(self, input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **scales: Any) -> None:
        self._read(mat1, mat2, input if input.shape == mat2.shape[1:] else None)
        if any(scale != 1 for name, scale in scales.items() if name != "out"):
            self.parameters = {}

    @classmethod
    def owns(cls, module: nn.Module, name: str) -> bool:
        return flattens(module) and name in ("weight", "bias")


def flattens(module: nn.Module) -> bool:
    """Transformers' ``Conv1D``, which flattens [*, I] before its product; its first argument tells the batch."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and isinstance(module, kind) and type(module).forward is kind.forward


def turned(factors: Factors) -> Factors:
    """The gradients of a matrix whose transpose a linear layer or a product used."""
    if isinstance(factors, TransposedFactors):
        return factors.inner
    assert isinstance(factors, LinearFactors)
    return TransposedFactors(factors)
