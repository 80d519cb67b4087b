"""The paper's clustering: one rank-1 centre per cluster and parameter, assignment weighted by cluster size."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch import OPS
from .._passes import check_finite
from ..layers import Factors
from ..layers.base import accumulator

START = 1e-2
"""Length of the random first centres, relative to a typical gradient: small, so that sizes decide at first."""


class Rank1Centers:
    """Centres ``c_k = d_k ⊗ a_k`` for every parameter [K, r, rows] and [K, r, cols]; the rank dimension r is 1 but for
    grouped convolutions. Parameters appear with the first batch's gradients."""

    def __init__(self, num_clusters: int, seed: int) -> None:
        self.K, self.seed = num_clusters, seed
        self.rows: dict[str, Tensor] = {}  # d
        self.cols: dict[str, Tensor] = {}  # a
        self._generator = torch.Generator().manual_seed(seed)
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def copy(self) -> Rank1Centers:
        """The same centres; changing one leaves the other as it is."""
        other = Rank1Centers(self.K, self.seed)
        other.rows, other.cols = dict(self.rows), dict(self.cols)
        return other

    def place(self, name: str, factors: Factors) -> None:
        """Small random centres for a parameter seen for the first time."""
        cols, rows = (part.shape[1:] for part in _rank1(name, factors))
        typical = factors.sqnorm().double().mean().sqrt().cpu()
        parts = []
        for shape, length in ((rows, START * typical), (cols, 1.0)):
            part = torch.randn(self.K, *shape, dtype=torch.float64, generator=self._generator)
            part = part * (length / part.flatten(1).norm(dim=1)).view(self.K, *[1] * len(shape))
            parts.append(part.to(factors.device, accumulator(factors.dtype)))
        self.rows[name], self.cols[name] = parts

    def sqnorms(self) -> Tensor:
        """[K] ‖c_k‖² over all parameters, float64."""
        total = torch.zeros(self.K, dtype=torch.float64)
        for name, rows in self.rows.items():
            d, a = (part.double().reshape(self.K, -1, part.shape[-1]) for part in (rows, self.cols[name]))
            total += ((d @ d.mT) * (a @ a.mT)).sum((1, 2)).cpu()
        return total

    def add(self, name: str, factors: Factors, labels: Tensor) -> None:
        """Adds a batch's rank-1 pairs to the sums of its clusters."""
        parts = _rank1(name, factors)
        sums = [OPS["cluster_sums"].run(part.flatten(1), labels.to(part.device), self.K)[0].double() for part in parts]
        if name in self._sums:
            sums = [total.add_(part) for total, part in zip(self._sums[name], sums)]
        self._sums[name] = sums[0], sums[1]

    def update(self, counts: Tensor) -> None:
        """The means of what was added become the centres; an empty cluster keeps its centre."""
        for name, (cols, rows) in self._sums.items():
            for centers, sums in ((self.cols, cols), (self.rows, rows)):
                old = centers[name]
                size = counts.to(old.device).view(self.K, *[1] * (old.dim() - 1))
                mean = sums.view(old.shape) / size.clamp(min=1)
                centers[name] = torch.where(size > 0, mean.to(old.dtype), old)
        self._sums = {}


def _rank1(name: str, factors: Factors) -> tuple[Tensor, Tensor]:
    try:
        return factors.rank1()
    except ValueError as error:
        raise NotImplementedError(
            f"{name}: {error}. method='factored' needs rank-1 centres; leave the parameter out with parameters=, or "
            f"use method='exact'"
        ) from error


class Distances:
    """Consumes one batch's factors: inner products with every centre and squared norms, summed over parameters."""

    def __init__(self, centers: Rank1Centers, index: Tensor) -> None:
        self.centers, self.index = centers, index
        self.dot: Tensor | None = None  # [B, K]
        self.sqnorm: Tensor | None = None  # [B]

    def __call__(self, name: str, factors: Factors) -> None:
        sqnorm = factors.sqnorm()
        if name not in self.centers.rows:
            check_finite(f"the gradient of {name}", sqnorm, self.index)  # centres of NaN would blame every example
            self.centers.place(name, factors)
        dot = factors.dot(self.centers.rows[name], self.centers.cols[name])
        if self.dot is None or self.sqnorm is None:
            self.dot, self.sqnorm = dot, sqnorm
        else:
            self.dot = self.dot + dot.to(self.dot.device)
            self.sqnorm = self.sqnorm + sqnorm.to(self.sqnorm.device)

    def assign(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(label [B], unweighted squared distance [B] in float64) on the CPU, for clusters of these sizes."""
        assert self.dot is not None and self.sqnorm is not None
        center_sqnorm, sqnorm = self.centers.sqnorms().to(self.dot), self.sqnorm.to(self.dot)
        labels, cost = OPS["assign"].run(self.dot, center_sqnorm, sqnorm, counts.to(self.dot.device))
        labels = labels.cpu()
        return labels, cost.cpu().double() / (counts[labels] + 1)


def refill_smallest(
    labels: Tensor, distances: Tensor, num_clusters: int, min_size: int, generator: torch.Generator
) -> Tensor:
    """If the smallest cluster is below ``min_size``, a random half of the cluster with the largest distortion
    ``N_k Σ_{i∈k} ‖c_k − g_i‖²`` goes there. Returns new labels."""
    counts = torch.bincount(labels, minlength=num_clusters)
    smallest = int(counts.argmin())
    if counts[smallest] >= min_size:
        return labels
    distortion = torch.zeros(num_clusters, dtype=torch.float64).index_add_(0, labels, distances) * counts
    distortion[smallest] = -1.0
    members = (labels == distortion.argmax()).nonzero().flatten()
    chosen = members[torch.randperm(len(members), generator=generator)[: len(members) // 2]]
    return labels.index_fill(0, chosen, smallest)
