"""embedding_sketch against a lookup in left, a projection and a batched product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case
from bench.kernels._embedding import SIZES, tables
from gradclust_fast import ops


def products(index: torch.Tensor, grad: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left[index].mT @ (grad @ right)


def cases() -> Iterator[Case]:
    for label, index, grad, V in tables(SIZES):
        P, Q, D = 32, min(32, grad.shape[-1]), grad.shape[-1]
        left, right = torch.randn(V, P), torch.randn(D, Q)
        args = (index, grad, left, right)
        yield Case(
            "embedding_sketch",
            f"{label} P={P} Q={Q}",
            lambda args=args, V=V: ops.embedding_sketch(*args, num_embeddings=V),
            {"left[index]ᵀ (grad right)": lambda args=args: products(*args)},
            flops=2 * index.numel() * Q * (D + P),
            bytes=grad.nbytes + index.nbytes + 4 * (index.numel() * P + D * Q + index.shape[0] * P * Q),
        )
