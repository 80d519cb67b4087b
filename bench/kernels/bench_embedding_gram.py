"""embedding_gram against one example's rows after the other in a compact table, and against stored gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case
from bench.kernels._embedding import segments, tables
from gradclust_fast import ops


def by_examples(index: torch.Tensor, grad: torch.Tensor, V: int) -> torch.Tensor:
    example, row, sums = segments(index, grad, V)
    used, compact = torch.unique(row, return_inverse=True)
    table = torch.zeros(used.numel(), grad.shape[-1])
    out = torch.zeros(index.shape[0], index.shape[0])
    for b in range(index.shape[0]):
        mine = example == b
        table[compact[mine]] = sums[mine]
        out[b].index_add_(0, example, (sums * table[compact]).sum(1))
        table[compact[mine]] = 0
    return out


def stored(index: torch.Tensor, grad: torch.Tensor, V: int) -> torch.Tensor:
    """Every G_b over the rows that the batch uses."""
    used, compact = torch.unique(index, return_inverse=True)
    B, U = index.shape[0], used.numel()
    G = torch.zeros(B * U, grad.shape[-1])
    G.index_add_(0, (torch.arange(B).unsqueeze(1) * U + compact).flatten(), grad.flatten(0, 1))
    return G.reshape(B, -1) @ G.reshape(B, -1).mT


def cases() -> Iterator[Case]:
    for label, index, grad, V in tables(((64, 128, 50_000, 256), (256, 32, 50_000, 64), (1024, 8, 1000, 16))):
        yield Case(
            "embedding_gram",
            label,
            lambda index=index, grad=grad, V=V: ops.embedding_gram(index, grad, num_embeddings=V),
            {
                "an example at a time": lambda index=index, grad=grad, V=V: by_examples(index, grad, V),
                "stored G of the rows in use": lambda index=index, grad=grad, V=V: stored(index, grad, V),
            },
            bytes=grad.nbytes + index.nbytes + 4 * index.shape[0] ** 2,
        )
