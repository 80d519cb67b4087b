"""The watch over a stratified sampler's own batches: are they still less noisy than uniform ones?"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .allocation import Plan
from .estimators import uniform_factor
from .strata import Strata

DECAY = 0.9
"""Weight of the past in the averages over batches: they remember about ten."""
READY = 5
"""Batches with an estimate before anything is decided."""


class Guard:
    """Estimates the variance of a sampler's batches, relative to uniform ones, from the sketches of the batches.

    For one batch, with x_i the sketch of example i's gradient and w_i its weight in the batch's mean:

    - V_k of every stratum: the sample variance of its draws in this batch where there are two or more; where there is
      one, half the squared distance to the stratum's draw of an earlier batch. Draws of different batches are
      independent, so both have the mean V_k (the first V_k N_k/(N_k − 1) without replacement), whatever the weights.
      What the stratum's mean moved between the two batches adds to it: old strata are never flattered. With them,
      V̂_GC = Σ_k (N_k/N)² V̂_k/m_k, with the sampler's own correction for draws without replacement.
    - σ² = mean of w‖x‖² − ‖mean of w x‖² + V̂_GC: the first term has the mean N⁻¹Σ‖x_i‖², the second ‖x̄‖² + V_GC.
      A uniform batch of B examples has σ²/B, or its value without replacement.

    Numerator and denominator are averaged over batches before they are divided.

    Attributes:
        batches: batches with an estimate since the strata came into force. ratio: the averaged variance of a stratified
            batch over a uniform one's, NaN before READY of them. fresh: the same after the first READY batches.
    """

    def __init__(self, num_strata: int) -> None:
        self.K = num_strata
        self.last: Tensor | None = None  # [K, R] the latest draw of every stratum, NaN where there is none
        self.batches = 0
        self.stratified = self.uniform = 0.0  # running averages of the two variances, times `weight`
        self.fresh = math.nan

    def observe(self, plan: Plan, points: Tensor, index: Tensor, replacement: bool) -> None:
        """One (global) batch drawn by ``plan``. points: [B, R] finite sketches of unweighted losses' gradients."""
        points = points.double()
        labels = plan.strata.labels[index]
        met = torch.bincount(labels, minlength=self.K)
        missed = ((met == 0) & (plan.strata.counts > 0)).nonzero()
        if len(missed):
            raise ValueError(
                f"index has no example of stratum {int(missed[0])}, so it is no whole batch of this sampler; observe "
                f"the batches as they were drawn"
            )
        weight = torch.from_numpy(plan.weight)[labels]  # [B]
        if self.last is None:
            self.last = points.new_full((self.K, points.shape[1]), math.nan)
        variance = self._within(plan, points, labels, replacement)
        place = torch.full((self.K,), -1).scatter_reduce(0, labels, torch.arange(len(labels)), "amax")
        self.last[met > 0] = points[place[met > 0]]
        if variance is None:
            return
        factor = torch.from_numpy(plan.within_factor)
        stratified = float((factor * variance).sum())
        second = float((weight * points.square().sum(1)).mean())
        mean = (weight[:, None] * points).mean(0)
        sigma2 = second - float(mean.square().sum()) + stratified
        N = len(plan.strata)
        self.stratified = DECAY * self.stratified + stratified
        self.uniform = DECAY * self.uniform + sigma2 * uniform_factor(plan.batch_size, N, replacement)
        self.batches += 1
        if self.batches == READY:
            self.fresh = self.ratio

    def _within(self, plan: Plan, points: Tensor, labels: Tensor, replacement: bool) -> Tensor | None:
        """[K] estimates of V_k; None while some stratum has only one draw."""
        assert self.last is not None
        counts = plan.strata.counts
        drawn = torch.bincount(labels, minlength=self.K)
        size = drawn.clamp(min=1).double()
        mean = torch.zeros_like(self.last).index_add_(0, labels, points) / size[:, None]
        scatter = points.new_zeros(self.K).index_add_(0, labels, (points - mean[labels]).square().sum(1))
        inside = scatter / (size - 1).clamp(min=1)
        if not replacement:
            inside = inside * (counts - 1) / counts.clamp(min=1)
        across = (mean - self.last).square().sum(1) / 2
        variance = torch.where(drawn >= 2, inside, across)
        variance = torch.where(counts <= 1, 0.0, variance)  # one example: what it moved is no variance
        return None if bool(variance[counts > 0].isnan().any()) else variance

    @property
    def ratio(self) -> float:
        if self.batches < READY:
            return math.nan
        if self.uniform > 0:
            return max(self.stratified, 0.0) / self.uniform
        return 0.0 if self.stratified <= 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        state = dict(vars(self))
        state["last"] = None if self.last is None else self.last.clone()
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Guard:
        guard = cls(state["K"])
        guard.__dict__.update({**state, "last": None if state["last"] is None else state["last"].clone()})
        return guard


def one_stratum(strata: Strata) -> Strata:
    """All examples in one stratum, with the statistics that follow from those of ``strata``."""
    share = strata.counts.double() / len(strata)
    mean = variance = None
    if strata.means is not None:
        mean = (share[:, None] * strata.means).sum(0)
        if strata.variance is not None:
            between = (strata.means - mean).square().sum(1)
            variance = (share * (strata.variance + between)).sum()[None]
        mean = mean[None]
    return Strata(torch.zeros_like(strata.labels), 1, variance=variance, means=mean)
