"""Sketches of every example's gradient, collected batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._passes import check_finite
from ..layers import Factors
from ..sketching import Sketch


class Sketches:
    """Consumes batches' factors into one sketch per example."""

    def __init__(self, sketch: Sketch, N: int) -> None:
        self.sketch, self.N = sketch, N
        self.parts: dict[str, Tensor] = {}  # one batch's, by parameter, or under "" their sum
        self.table: dict[str, Tensor] = {}  # [N, ·], on the CPU

    def __call__(self, name: str, factors: Factors) -> None:
        part = self.sketch.apply(name, factors)
        if not self.sketch.reduce:
            self.parts[name] = part
        elif self.parts:
            self.parts[""] = self.parts[""] + part.to(self.parts[""].device)
        else:
            self.parts[""] = part

    def store(self, index: Tensor) -> None:
        """Keeps the batch's sketches as rows ``index``; raises where one is not finite."""
        for name, part in self.parts.items():
            check_finite("the gradient", part, index)
            if name not in self.table:
                # Zeros: a parameter that a batch does not reach has no gradient there.
                self.table[name] = torch.zeros(self.N, part.shape[1], dtype=part.dtype)
            self.table[name][index] = part.cpu()
        self.parts = {}

    def rows(self) -> Tensor:
        """[N, R]; without a second stage the parameters' vectors side by side."""
        return torch.cat(list(self.table.values()), 1)


def merge_equal_rows(rows: Tensor) -> Tensor:
    """Rows that differ by no more than float32's rounding become exactly equal: copies of one example.

    Copies in different places of a batch, or in batches of different sizes, get gradients that differ in the last
    bits. Exact moves gather copies by ties, which such differences hide.
    """
    square = rows.double().square().sum(1)  # [N]
    typical = square.mean().sqrt()
    generator = torch.Generator().manual_seed(0)
    order = (rows.double() @ torch.randn(rows.shape[1], dtype=torch.float64, generator=generator)).argsort(stable=True)

    def differ(here: Tensor, there: Tensor) -> Tensor:
        parts = zip(here.split(65536), there.split(65536))  # bounds the float64 copies
        distance = torch.cat([(rows[a].double() - rows[b].double()).norm(dim=1) for a, b in parts])
        return distance > torch.maximum(1e-5 * square[here].sqrt(), 1e-7 * typical)

    first = torch.ones(len(rows), dtype=torch.bool)  # in that order: whether a row differs from the one before it
    if len(rows) > 1:
        first[1:] = differ(order[1:], order[:-1])
    source = order[torch.where(first, torch.arange(len(rows)), 0).cummax(0).values]
    # A long chain of small steps goes far: no row may move by more than rounding.
    source = torch.where(differ(order, source), order, source)
    merged = torch.empty_like(rows)
    merged[order] = rows[source]
    return merged
