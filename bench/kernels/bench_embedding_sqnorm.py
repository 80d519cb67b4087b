"""embedding_sqnorm against segment sums, and against Gram matrices of the positions that look up the same row."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case, on_gpu
from bench.kernels._embedding import GPU_SIZES, SIZES, segments, tables
from gradclust_fast import ops


def by_segments(index: torch.Tensor, grad: torch.Tensor, V: int) -> torch.Tensor:
    example, _, sums = segments(index, grad, V)
    return torch.zeros(index.shape[0]).index_add_(0, example, sums.square().sum(1))


def by_positions(index: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    same = index.unsqueeze(2) == index.unsqueeze(1)  # [B, T, T]
    return ((grad @ grad.mT) * same).sum((1, 2))


def cases() -> Iterator[Case]:
    for label, index, grad, V in tables(GPU_SIZES if on_gpu() else SIZES):
        yield Case(
            "embedding_sqnorm",
            label,
            lambda index=index, grad=grad, V=V: ops.embedding_sqnorm(index, grad, num_embeddings=V),
            {
                "unique + index_add_": lambda index=index, grad=grad, V=V: by_segments(index, grad, V),
                "masked Gram matrices": lambda index=index, grad=grad: by_positions(index, grad),
            },
            flops=2 * grad.numel(),
            bytes=grad.nbytes + index.nbytes,
        )
