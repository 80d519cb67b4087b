"""Clusters that follow training: running centres of the sketches that recorded steps bring along."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..strata import Strata

TIE = 1e-9
"""Costs closer than this, relative to the examples' own size, are equal: copies of one example differ by rounding."""


class RunningClusters:
    """Labels of N examples, and per cluster a running mean and variance of the sketches that were assigned to it.

    A batch's examples go, one after the other, to the cluster where ``J = Σ_k N_k Σ_{i∈k} ‖g_i − c_k‖²`` grows least:
    ``argmin_k N_k (‖x_i − c_k‖² + V_k)`` with N_k not counting i, the exact move of the default method with running
    statistics in the place of exact ones. An empty cluster costs nothing, so the next example that gains by leaving its
    own starts it anew; ties go to the larger cluster, so copies of one example gather and free the others.

    Args:
        labels: [N] int64, where the examples start.
        num_clusters: K.
        decay: what a past batch counts for in the running statistics, against 1 for this one.

    Attributes:
        seen: [N] bool, examples that came at least once. weight: [K] float64, examples behind every mean, decayed; 0:
            no mean yet. means: [K, R] and variance: [K], float64; means is None before the first batch.
    """

    def __init__(self, labels: Tensor, num_clusters: int, decay: float) -> None:
        self.K, self.decay = num_clusters, decay
        self.labels = labels.clone()
        self.counts = torch.bincount(labels, minlength=num_clusters)
        self.seen = torch.zeros(len(labels), dtype=torch.bool)
        self.weight = torch.zeros(num_clusters, dtype=torch.float64)
        self.variance = torch.zeros(num_clusters, dtype=torch.float64)
        self.means: Tensor | None = None

    @classmethod
    def of(cls, strata: Strata, decay: float) -> RunningClusters:
        """Running statistics that begin with those of strata that were just fitted."""
        assert strata.means is not None and strata.variance is not None
        clusters = cls(strata.labels, strata.num_clusters, decay)
        clusters.seen.fill_(True)
        clusters.weight = strata.counts.double().clamp(max=1 / (1 - decay))
        clusters.means, clusters.variance = strata.means.clone(), strata.variance.clone()
        return clusters

    def update(self, points: Tensor, index: Tensor) -> None:
        """Assigns a batch. points: [B, R] finite; index: [B] distinct int64 in 0..N−1; both on the CPU."""
        points = points.double()
        if self.means is None:
            self.means = points.new_zeros(self.K, points.shape[1])
        # never down to 0, which says that a cluster has no mean yet
        self.weight = torch.where(self.weight > 0, (self.weight * self.decay).clamp(min=1e-30), 0.0)
        chosen = torch.from_numpy(self._assign(points, index.numpy()))
        self.labels[index] = chosen
        self.counts = torch.bincount(self.labels, minlength=self.K)
        self.seen[index] = True
        self._average(points, chosen)

    def _assign(self, points: Tensor, index: np.ndarray) -> np.ndarray:
        """[B] clusters, one example after the other; founds clusters (mean, and weight 0) where it pays."""
        assert self.means is not None
        # direct differences: ‖x‖² − 2x·c + ‖c‖² would cancel for tight clusters
        square = (
            torch.cdist(points, self.means, compute_mode="donot_use_mm_for_euclid_dist").square_().numpy()
        )  # [B, K]
        size = points.square().sum(1).numpy()  # [B]
        counts = self.counts.numpy().astype(np.float64)
        variance = self.variance.numpy().copy()
        unmet = (self.weight == 0).numpy()
        own = self.labels[torch.from_numpy(index)].numpy()
        chosen = np.empty_like(own)
        for b, k in enumerate(own):
            counts[k] -= 1
            cost = counts * (square[b] + variance)
            cost[unmet] = 0.0
            near = cost <= cost.min() + TIE * size[b] * np.maximum(counts, 1)
            standing = np.where(near, counts, -1.0)
            standing[k] += near[k]  # N_k counting this example, as where two clusters are compared by size
            best = int(standing.argmax())
            if counts[best] == 0 or unmet[best]:
                self.means[best] = points[b]
                self.weight[best] = 0.0
                square[:, best] = (points - points[b]).square().sum(1).numpy()
                variance[best], unmet[best] = 0.0, False
            counts[best] += 1
            chosen[b] = best
        self.variance = torch.from_numpy(variance)
        return chosen

    def _average(self, points: Tensor, chosen: Tensor) -> None:
        """Adds the batch to the running means and variances (West 1979, weighted)."""
        assert self.means is not None
        here, added = chosen.unique(return_counts=True)
        share = added.double()  # [k]
        mean = points.new_zeros(self.K, points.shape[1]).index_add_(0, chosen, points)[here] / share[:, None]
        spread = points.new_zeros(self.K)
        step = mean - self.means[here]
        place = torch.empty(self.K, dtype=torch.int64)
        place[here] = torch.arange(len(here))
        spread.index_add_(0, chosen, (points - mean[place[chosen]]).square().sum(1))
        past = self.weight[here]
        total = past + share
        scatter = past * self.variance[here] + spread[here] + past * share / total * step.square().sum(1)
        self.variance[here] = scatter / total
        self.means[here] += (share / total)[:, None] * step
        self.weight[here] = total

    def strata(self) -> Strata:
        """The strata as they are; with variances and means once every cluster with members has met an example."""
        known = self.means is not None and bool(((self.weight > 0) | (self.counts == 0)).all())
        if not known:
            return Strata(self.labels, self.K)
        filled = self.counts > 0
        assert self.means is not None
        return Strata(
            self.labels,
            self.K,
            variance=torch.where(filled, self.variance, 0.0),
            means=torch.where(filled[:, None], self.means, 0.0),
        )

    def state_dict(self) -> dict[str, Any]:
        names = ("labels", "seen", "weight", "variance", "means")
        state = {name: getattr(self, name) for name in names}
        return {**{n: None if v is None else v.clone() for n, v in state.items()}, "decay": self.decay}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], num_clusters: int) -> RunningClusters:
        clusters = cls(state["labels"], num_clusters, state["decay"])
        for name in ("seen", "weight", "variance", "means"):
            setattr(clusters, name, None if state[name] is None else state[name].clone())
        return clusters


def distinct(index: Tensor) -> Tensor:
    """Raises where an example comes twice: it can be in one cluster only, and would count double there."""
    found, times = index.unique(return_counts=True)
    if bool((times > 1).any()):
        twice = int(found[times > 1][0])
        raise ValueError(
            f"index {twice} comes {int(times.max())} times in one update; an example can join one cluster only: use a "
            f"sampler without replacement, or one record a batch"
        )
    return index
