"""A table that is the weight of a linear layer too, as in language models: ``G_b = E_b + L_b``.

``E_b`` has the rows that example b looked up, ``L_b`` all of them. Written as one linear layer, the lookups would be
one-hot vectors as long as the vocabulary; here the two stay apart and meet in
``⟨E_b, L_c⟩ = Σ_{t,s} grad_L[c, s, index[b, t]] · (act_L[c, s]·grad_E[b, t])``, which reads T columns of grad_L.
"""

from __future__ import annotations

import torch

from .base import Factors, accumulator
from .embedding import EmbeddingFactors
from .linear import LinearFactors

CHUNK = 1 << 24
"""Elements that the meeting of two uses may take at a time, as long as that is one example."""


class TiedFactors(Factors):
    """The sum of a table's gradients as a table and as a linear layer's weight [V, D]."""

    def __init__(self, table: EmbeddingFactors, layer: LinearFactors) -> None:
        self.table, self.layer, self.shape = table, layer, table.shape

    @property
    def B(self) -> int:
        return self.table.B

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.table.dtype, self.layer.dtype)

    def _uses(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of some examples: grad_E [b, T, D] (zero where padded), act_L [b, S, D], grad_L's columns [b, S, T]."""
        index, dtype = self.table.index[start:end], accumulator(self.dtype)
        act, grad = self._rows(self.layer.act)[start:end], self._rows(self.layer.grad)[start:end]
        columns = grad.gather(2, index.unsqueeze(1).expand(-1, grad.shape[1], -1))
        return self.table.masked()[start:end].to(dtype), act.to(dtype), columns.to(dtype)

    def _rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, *, F] → [B, S, F]."""
        return tensor.reshape(self.B, tensor.shape[1:-1].numel(), tensor.shape[-1])

    def _chunks(self) -> list[tuple[int, int]]:
        T, S, D = self.table.index.shape[1], self.layer.act.shape[1:-1].numel(), self.shape[1]
        step = max(1, CHUNK // max(1, S * T + (S + T) * D))
        return [(start, min(start + step, self.B)) for start in range(0, self.B, step)]

    def sqnorm(self) -> torch.Tensor:
        sqnorm = self.table.sqnorm() + self.layer.sqnorm()
        for start, end in self._chunks():
            grad, act, columns = self._uses(start, end)
            sqnorm[start:end] += 2 * ((act @ grad.mT) * columns).sum((1, 2))
        return sqnorm

    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        return self.table.sketch(left, right) + self.layer.sketch(left, right)

    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        return self.table.dot(center_rows, center_cols) + self.layer.dot(center_rows, center_cols)

    def gram(self) -> torch.Tensor:
        dtype, (B, T) = accumulator(self.dtype), self.table.index.shape
        index, grad = self.table.index.flatten(), self.table.masked().to(dtype).flatten(0, 1)  # [B·T], [B·T, D]
        cross = grad.new_zeros(B, B)  # [b, c] ⟨E_b, L_c⟩
        step = max(1, CHUNK // max(1, B * T))
        for c, (act, outer) in enumerate(zip(self._rows(self.layer.act), self._rows(self.layer.grad))):
            for a, d in zip(act.split(step), outer.split(step)):
                met = (a.to(dtype) @ grad.mT) * d.index_select(1, index).to(dtype)
                cross[:, c] += met.sum(0).reshape(B, T).sum(1)
        return self.table.gram() + self.layer.gram() + cross + cross.mT

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (own + other for own, other in zip(self.table.moments(), self.layer.moments()))
        for start, end in self._chunks():
            grad, act, columns = self._uses(start, end)
            both = 2 * grad * (columns.mT @ act)  # [b, T, D]: a position's part of E_b, times its row of L_b
            index = self.table.index[start:end].flatten()
            second.index_put_((index,), both.flatten(0, 1).to(second.dtype), accumulate=True)
        return first, second

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.linear().rank1()

    def negated(self) -> TiedFactors:
        return TiedFactors(self.table.negated(), self.layer.negated())

    def linear(self) -> LinearFactors:
        return self.table.linear()._concat(self.layer)

    def _concat(self, other: TiedFactors) -> TiedFactors:
        return TiedFactors(self.table._concat(other.table), self.layer._concat(other.layer))

    def _meet(self, other: Factors) -> Factors | None:
        if isinstance(other, EmbeddingFactors):
            return TiedFactors(self.table._concat(other), self.layer)
        if isinstance(other, LinearFactors):
            return TiedFactors(self.table, self.layer._concat(other.linear()))
        return None
