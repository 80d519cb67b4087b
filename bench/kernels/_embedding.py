"""What the embedding benchmarks share: tables of language models, and lookups that repeat as words do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Table(NamedTuple):
    label: str
    index: torch.Tensor  # [B, T]
    grad: torch.Tensor  # [B, T, D]
    V: int


def words(B: int, T: int, V: int) -> torch.Tensor:
    """[B, T] rows of a table, the k-th most frequent 1/k as often as the first (Zipf), in random places of it."""
    chance = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    rank = torch.searchsorted(chance.cumsum(0) / chance.sum(), torch.rand(B * T, dtype=torch.float64)).clamp(max=V - 1)
    return torch.randperm(V)[rank].reshape(B, T)


def tables(sizes: tuple[tuple[int, int, int, int], ...]) -> Iterator[Table]:
    for B, T, V, D in sizes:
        yield Table(f"B={B} T={T} V={V} D={D} float32", words(B, T, V), torch.randn(B, T, D), V)


def segments(index: torch.Tensor, grad: torch.Tensor, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(example [U], row [U], sum of gradients [U, D]): the rows of all G_b, the way one writes it in torch."""
    keys, segment = torch.unique(torch.arange(index.shape[0]).unsqueeze(1) * V + index, return_inverse=True)
    sums = torch.zeros(keys.numel(), grad.shape[-1]).index_add_(0, segment.flatten(), grad.flatten(0, 1))
    return keys // V, keys % V, sums


GPU_SIZES = ((64, 1024, 1_000_000, 512), (256, 32, 1_000_000, 64), (1024, 8, 1000, 16))
SIZES = ((64, 128, 50_000, 256), (256, 32, 1_000_000, 64), (16, 1024, 50_000, 512), (1024, 8, 1000, 16))
