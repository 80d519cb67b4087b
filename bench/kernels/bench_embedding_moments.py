"""embedding_moments against segment sums that are scattered into two tables."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case
from bench.kernels._embedding import segments, tables
from gradclust_fast import ops


def scattered(index: torch.Tensor, grad: torch.Tensor, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    _, row, sums = segments(index, grad, V)
    first, second = (torch.zeros(V, grad.shape[-1]) for _ in range(2))
    return first.index_add_(0, row, sums), second.index_add_(0, row, sums.square())


def cases() -> Iterator[Case]:
    for label, index, grad, V in tables(((64, 128, 50_000, 256), (64, 128, 2000, 256), (1024, 8, 1000, 16))):
        yield Case(
            "embedding_moments",
            label,
            lambda index=index, grad=grad, V=V: ops.embedding_moments(index, grad, num_embeddings=V),
            {"unique + index_add_": lambda index=index, grad=grad, V=V: scattered(index, grad, V)},
            flops=3 * grad.numel(),
            bytes=grad.nbytes + index.nbytes + 8 * V * grad.shape[-1],
        )
