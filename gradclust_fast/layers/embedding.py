"""Embeddings: ``G_b = Σ_t onehot(index[b, t]) ⊗ grad[b, t]``, a linear layer whose output gradient is one-hot rows."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .base import BatchLayout, Call, Factors, accumulator, run_op
from .linear import LinearFactors


class EmbeddingFactors(Factors):
    """index [B, T] and grad [B, T, D] of a table [V, D]; positions with the index ``padding`` have no gradient."""

    def __init__(self, index: torch.Tensor, grad: torch.Tensor, shape: torch.Size, padding: int | None = None) -> None:
        self.index, self.grad, self.shape, self.padding = index, grad, shape, padding

    @property
    def B(self) -> int:
        return self.index.shape[0]

    @property
    def device(self) -> torch.device:
        return self.grad.device

    @property
    def dtype(self) -> torch.dtype:
        return self.grad.dtype

    def _run(self, name: str, *matrices: torch.Tensor | None) -> Any:
        return run_op(name, self.index, self.grad, *matrices, self.shape[0], self.padding)

    def _side(self, side: torch.Tensor | None) -> torch.Tensor | None:
        return None if side is None else side.to(accumulator(self.dtype))

    def masked(self) -> torch.Tensor:
        """grad with zeros where the index is the padding."""
        return (
            self.grad if self.padding is None else self.grad.masked_fill((self.index == self.padding).unsqueeze(2), 0)
        )

    def sqnorm(self) -> torch.Tensor:
        return self._run("embedding_sqnorm")

    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        return self._run("embedding_sketch", self._side(left), self._side(right))

    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        return self._run("embedding_dot", self._side(center_rows), self._side(center_cols))

    def gram(self) -> torch.Tensor:
        return self._run("embedding_gram")

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._run("embedding_moments")

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The table's rows play the input's part, so they are averaged; the gradients are summed."""
        dtype = accumulator(self.dtype)
        T = max(1, self.index.shape[1])
        counts = torch.zeros(self.B, self.shape[0], dtype=dtype, device=self.device)
        ones = torch.full_like(self.index, 1.0, dtype=dtype) / T
        return self.masked().sum(1, dtype=dtype), counts.scatter_add_(1, self.index, ones)

    def negated(self) -> EmbeddingFactors:
        return EmbeddingFactors(self.index, -self.grad, self.shape, self.padding)

    def linear(self) -> LinearFactors:
        onehot = torch.zeros(*self.index.shape, self.shape[0], dtype=self.dtype, device=self.device)  # [B, T, V]
        return LinearFactors(self.masked(), onehot.scatter_(2, self.index.unsqueeze(2), 1), self.shape)

    def _concat(self, other: EmbeddingFactors) -> EmbeddingFactors:
        dtype = torch.promote_types(self.dtype, other.dtype)
        same = self.padding == other.padding
        parts = [factors.grad if same else factors.masked() for factors in (self, other)]
        grad = torch.cat([part.to(dtype) for part in parts], 1)
        padding = self.padding if same else None
        return EmbeddingFactors(torch.cat([self.index, other.index], 1), grad, self.shape, padding)

    def _meet(self, other: Factors) -> Factors | None:
        from .tied import TiedFactors  # which is made of these

        return TiedFactors(self, other.linear()) if isinstance(other, LinearFactors) else None


class EmbeddingCall(Call):
    """``torch.nn.functional.embedding``."""

    shareable = True
    functions = (F.embedding,)
    modules: ClassVar = {nn.Embedding: ("weight",)}
    lower_precision = False
    costs: ClassVar = {"weight": ("factored", "exact from the indices and the output gradient")}

    def __init__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        if scale_grad_by_freq:
            raise NotImplementedError(
                "scale_grad_by_freq=True divides by counts over the whole batch, which no example has alone; turn it "
                "off, or leave the table out with parameters="
            )
        self.held: torch.Tensor | None = input
        self.parameters = {"weight": weight}
        self.shape = weight.shape
        self.padding = None if padding_idx is None else padding_idx % weight.shape[0]

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return not module.scale_grad_by_freq

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        assert self.held is not None
        index, rows = layout.rows(self.held.long(), 0), layout.rows(grad)  # [B, *], [B, *, D]
        T = index.shape[1:].numel()
        index, rows = index.reshape(index.shape[0], T), rows.reshape(rows.shape[0], T, rows.shape[-1])
        return EmbeddingFactors(index, rows, self.shape, self.padding)


class EmbeddingBagCall(Call):
    """``torch.nn.functional.embedding_bag`` with ``mode="sum"`` (weighted or not) and ``mode="mean"``."""

    functions = (F.embedding_bag,)
    modules: ClassVar = {nn.EmbeddingBag: ("weight",)}
    lower_precision = False
    costs: ClassVar = {"weight": ("factored", "exact from the indices and the output gradient")}

    def __init__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        if input.dtype not in (torch.int32, torch.int64):  # the deprecated order: embedding_bag(weight, input)
            raise NotImplementedError("embedding_bag takes the indices first; swap the first two arguments")
        if scale_grad_by_freq or mode not in ("sum", "mean"):
            raise NotImplementedError(
                f"embedding_bag has a per-example route for mode='sum' and mode='mean' without scale_grad_by_freq, "
                f"got mode={mode!r} and scale_grad_by_freq={scale_grad_by_freq}; change them, or leave the table out "
                f"with parameters="
            )
        self.held: torch.Tensor | None = input
        self.parameters = {"weight": weight}
        self.shape, self.mean = weight.shape, mode == "mean"
        self.padding = None if padding_idx is None else padding_idx % weight.shape[0]
        # Copies: only the indices' version is checked before they are used.
        self.weights = None if per_sample_weights is None else per_sample_weights.detach().clone()
        self.offsets = None if offsets is None else offsets.detach().long().clone()
        if self.offsets is not None and include_last_offset:
            self.offsets = self.offsets[:-1]

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return not module.scale_grad_by_freq and module.mode in ("sum", "mean")

    def _bags(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """index [n, T]; void [n, T], True where a bag has no such position; the positions' weights [n, T]."""
        assert self.held is not None
        index, weights = self.held.long(), self.weights
        if self.offsets is None:
            return index, torch.zeros_like(index, dtype=torch.bool), weights
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([index.numel()])])
        lengths = ends - self.offsets  # [n]
        T = int(lengths.max()) if lengths.numel() else 0
        position = torch.arange(T, device=index.device)
        void = position >= lengths.unsqueeze(1)
        where = (self.offsets.unsqueeze(1) + position).masked_fill(void, 0)
        if not index.numel():
            return torch.zeros_like(where), void, None
        return index[where], void, None if weights is None else weights[where]

    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        index, void, weights = self._bags()
        if self.padding is not None:
            void = void | (index == self.padding)
        share = (~void).to(accumulator(grad.dtype))  # [n, T]
        if self.mean:
            share = share / share.sum(1, keepdim=True).clamp(min=1)
        if weights is not None:
            share = share * weights.to(share.dtype)
        rows = share.unsqueeze(2) * grad.unsqueeze(1)  # [n, T, D]
        index, rows = layout.fold(index), layout.fold(rows)
        return EmbeddingFactors(index.flatten(1), rows.flatten(1, -2), self.shape)
