"""embedding_dot against products with both halves of the centres, multiplied and added."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case
from bench.kernels._embedding import tables
from gradclust_fast import ops


def products(
    index: torch.Tensor, grad: torch.Tensor, center_index: torch.Tensor, center_grad: torch.Tensor
) -> torch.Tensor:
    looked_up = center_index[:, index.flatten()].reshape(-1, *index.shape)  # [K, B, T]
    return (looked_up * (center_grad @ grad.flatten(0, 1).mT).reshape(looked_up.shape)).sum(2).mT


def cases() -> Iterator[Case]:
    for label, index, grad, V in tables(((64, 128, 50_000, 256), (256, 32, 200_000, 64), (1024, 8, 1000, 16))):
        K, D = 64, grad.shape[-1]
        args = (index, grad, torch.randn(K, V), torch.randn(K, D))
        yield Case(
            "embedding_dot",
            f"{label} K={K}",
            lambda args=args, V=V: ops.embedding_dot(*args, num_embeddings=V),
            {"C[:, index] ∘ (C gradᵀ)": lambda args=args: products(*args)},
            flops=2 * index.numel() * K * (D + 1),
            bytes=grad.nbytes + index.nbytes + 4 * K * (index.numel() + D + index.shape[0]),
        )
