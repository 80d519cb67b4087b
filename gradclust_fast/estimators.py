"""Estimators of the full gradient from a mini-batch, for ``compare_estimators``: which examples, which weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ._arguments import integer
from .allocation import Plan, check_strata, uniform_below
from .strata import Strata


class Estimator:
    """One way to estimate ḡ. ``name`` is its label in reports; ``batch_size`` the examples of one step.

    ``gradients_per_step`` counts the per-example gradients that a step computes, the fair price to compare at.
    """

    name: str
    batch_size: int
    gradients_per_step: int
    snapshot: nn.Module | Mapping[str, Any] | None = None
    """Of estimators that take differences to the gradients at earlier parameters."""

    def prepare(self, N: int) -> None:
        """Raises when no batch can be drawn from N examples."""
        raise NotImplementedError

    def draw(self, rng: np.random.Generator, N: int) -> tuple[np.ndarray, np.ndarray]:
        """(index [B], weight [B]) of one batch; the estimate is the mean of weight times gradient."""
        raise NotImplementedError


class Uniform(Estimator):
    """Plain mini-batch SGD: B examples drawn uniformly. Variance σ²/B, times (N−B)/(N−1) without replacement.

    Args:
        batch_size: B.
        replacement: draw with replacement.
        name: label in reports.

    Example:
        >>> gf.Uniform(128).name
        'Uniform(128)'
    """

    def __init__(self, batch_size: int, replacement: bool = True, *, name: str | None = None) -> None:
        self.batch_size = self.gradients_per_step = batch_size = integer("batch_size", batch_size, 1)
        self.replacement = replacement
        self.name = name or f"{type(self).__name__}({batch_size}{'' if replacement else ', without replacement'})"

    def prepare(self, N: int) -> None:
        if not self.replacement and self.batch_size > N:
            raise ValueError(
                f"{self.name}: batch_size must be at most N={N} without replacement, got {self.batch_size}; lower it "
                f"or pass replacement=True"
            )

    def factor(self, N: int) -> float:
        """The estimator's variance over that of one uniformly drawn example."""
        return uniform_factor(self.batch_size, N, self.replacement)

    def draw(self, rng: np.random.Generator, N: int) -> tuple[np.ndarray, np.ndarray]:
        if self.replacement:
            index = uniform_below(rng, np.full(self.batch_size, N))
        else:
            index = rng.choice(N, self.batch_size, replace=False)
        return index, np.ones(self.batch_size)


class SVRG(Uniform):
    """Stochastic variance-reduced gradient: ``ĝ = μ + mean of (g_i(θ) − g_i(θ̃))``, θ̃ a snapshot with full gradient μ.

    Its variance is that of ``g_i(θ) − g_i(θ̃)`` over B. A step computes two gradients per example.

    Args:
        batch_size: B.
        snapshot: a copy of the model at θ̃ (``copy.deepcopy(model)``), or its ``state_dict()``, cloned.
        replacement: draw with replacement.
        name: label in reports.

    Source:
        Johnson & Zhang 2013, "Accelerating stochastic gradient descent using predictive variance reduction".

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> estimator = gf.SVRG(32, copy.deepcopy(model))
    """

    def __init__(
        self,
        batch_size: int,
        snapshot: nn.Module | Mapping[str, Any],
        replacement: bool = True,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(batch_size, replacement, name=name)
        self.snapshot = _checked_snapshot(snapshot)
        self.gradients_per_step = 2 * batch_size


class Stratified(Estimator):
    """A stratified mini-batch, as ``StratifiedBatchSampler`` draws it; with ``snapshot``, SVRG on such batches.

    With a snapshot θ̃ the estimate is ``μ + N⁻¹ Σ_k N_k · mean of (g_i(θ) − g_i(θ̃))`` over the examples drawn from
    stratum k: its variance is that of the differences within strata, and a step computes two gradients per example.

    Args:
        strata: a partition of the same data set.
        batch_size: B; None is one example for every non-empty stratum.
        allocation, replacement: as for ``StratifiedBatchSampler``. ``"neyman"`` takes the strata's own variances, of
            whatever they were made from.
        snapshot: a copy of the model at θ̃ (``copy.deepcopy(model)``), or its ``state_dict()``, cloned; None: no SVRG.
        name: label in reports.

    Example:
        >>> gf.Stratified(gf.Strata([0, 0, 1, 2], 3)).batch_size
        3
    """

    def __init__(
        self,
        strata: Strata,
        batch_size: int | None = None,
        allocation: str = "equal",
        replacement: bool = False,
        *,
        snapshot: nn.Module | Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        check_strata(strata)
        filled = int((strata.counts > 0).sum())
        self.strata = strata
        self.plan = Plan(strata, filled if batch_size is None else batch_size, allocation, replacement)
        self.batch_size = self.gradients_per_step = self.plan.batch_size
        self.snapshot = None if snapshot is None else _checked_snapshot(snapshot)
        shown = "" if allocation == "equal" else f", {allocation}"
        if snapshot is not None:
            self.gradients_per_step = 2 * self.batch_size
            shown += ", SVRG"
        self.name = name or f"Stratified({self.batch_size}, K={filled}{shown})"

    def prepare(self, N: int) -> None:
        if len(self.plan.strata) != N:
            raise ValueError(
                f"{self.name}: the strata are of {len(self.plan.strata)} examples, the data has {N}; cluster this one"
            )

    def draw(self, rng: np.random.Generator, N: int) -> tuple[np.ndarray, np.ndarray]:
        index = self.plan.draw(rng)
        return index, self.plan.weight[self.plan.strata.labels.numpy()[index]]


def _checked_snapshot(snapshot: Any) -> nn.Module | Mapping[str, Any]:
    if not isinstance(snapshot, (nn.Module, Mapping)):
        raise TypeError(
            f"snapshot must be a copy of the model or its state_dict, got {type(snapshot).__name__}; take it with "
            f"copy.deepcopy(model)"
        )
    return snapshot


def uniform_factor(B: int, N: int, replacement: bool) -> float:
    if replacement:
        return 1 / B
    return (N - B) / (N - 1) / B if N > 1 else 0.0
