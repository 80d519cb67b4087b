"""The gradient estimators that are compared along a trajectory, by the names that figures and tables show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..clustering import GradientClustering
from ..estimators import SVRG, Estimator, Stratified, Uniform
from ..sketching import Sketch
from ..strata import Strata

if TYPE_CHECKING:
    from .trajectory import Run


class Method:
    """One estimator along a trajectory: what it remembers from its last snapshot, and what it is now.

    ``state`` holds what must survive an interruption: tensors, numbers and strings in dicts and lists.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[str, Any] = {}

    def snapshot(self, run: Run) -> None:
        """At a snapshot step, before the training step."""

    def trained(self, run: Run, index: Tensor) -> None:
        """After every training step, with the indices of its batch."""

    def estimator(self, run: Run) -> Estimator | None:
        """For ``compare_estimators`` at the current step; None: nothing to measure yet."""
        raise NotImplementedError


class Plain(Method):
    """SGD with ``times`` the batch."""

    def __init__(self, name: str, times: int) -> None:
        super().__init__(name)
        self.times = times

    def estimator(self, run: Run) -> Estimator:
        return Uniform(self.times * run.plan.batch_size, name=self.name)


class Reduced(Method):
    """SVRG around the last snapshot."""

    def snapshot(self, run: Run) -> None:
        self.state = {"model": {k: v.detach().clone() for k, v in run.problem.model.state_dict().items()}}

    def estimator(self, run: Run) -> Estimator | None:
        if not self.state:
            return None
        return SVRG(run.plan.batch_size, self.state["model"], name=self.name)


class Clustered(Method):
    """Gradient Clustering with the strata of the last snapshot.

    ``share``: strata per example of the batch. Allocation only matters when it is below 1.
    """

    def __init__(self, name: str, method: str, share: float = 1.0, allocation: str = "equal") -> None:
        super().__init__(name)
        self.method, self.share, self.allocation = method, share, allocation

    def snapshot(self, run: Run) -> None:
        K = max(1, round(self.share * run.plan.clusters))
        # a new start every time: a fit depends on the model and the seed alone, whatever was interrupted before
        seed = 1000 * run.unit.seed + len(run.snapshots_done)
        clustering = GradientClustering(run.problem.model, K, self.method, Sketch(seed=seed), seed=seed)
        batch = run.plan.stats_batch if self.method == "exact" else run.plan.fit_batch or run.plan.batch_size
        strata = clustering.fit(
            run.problem.train, run.problem.loss, batch_size=batch, device=run.device, progress=False
        )
        self.state = {"strata": strata.state_dict()}

    def estimator(self, run: Run) -> Estimator | None:
        if not self.state:
            return None
        strata = Strata.from_state_dict(self.state["strata"])
        filled = int((strata.counts > 0).sum())
        return Stratified(strata, max(run.plan.batch_size, filled), self.allocation, name=self.name)


METHODS: dict[str, Callable[[str], Method]] = {
    "SG-B": lambda name: Plain(name, 1),
    "SG-2B": lambda name: Plain(name, 2),
    "SVRG": lambda name: Reduced(name),
    "GC factored": lambda name: Clustered(name, "factored"),
    "GC exact": lambda name: Clustered(name, "exact"),
    "GC Neyman": lambda name: Clustered(name, "exact", 0.5, "neyman"),
}
"""Maker of every method by name. SG-B comes first in every trajectory: ratios are to it."""

STANDARD = ("SG-B", "SG-2B", "SVRG", "GC factored", "GC exact")
