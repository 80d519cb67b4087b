"""The gradient estimators that are compared along a trajectory, by the names that figures and tables show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..clustering import GradientClustering
from ..estimators import SVRG, Estimator, Stratified, Uniform
from ..recording import record
from ..sampling import StratifiedBatchSampler
from ..sketching import Sketch
from ..strata import Strata
from .problems import fetch

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


class Guarded(Method):
    """Gradient Clustering behind ``StratifiedBatchSampler(refresh="auto")``, which decides when strata are renewed.

    Fed with a recorded batch of its own every ``EVERY`` training steps; between those it decides nothing.
    """

    EVERY = 5

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.sampler: StratifiedBatchSampler | None = None
        self.batches: Iterator[list[int]] | None = None
        self.snapshots = self.done = 0

    @property
    def state(self) -> dict[str, Any]:
        if self.sampler is None:
            return {}
        return {"sampler": self.sampler.state_dict(self.done), "snapshots": self.snapshots}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if state:
            saved = state["sampler"]
            strata = Strata.from_state_dict(saved["strata"])
            self.sampler = StratifiedBatchSampler(strata, saved["batch_size"], refresh="auto")
            self.sampler.load_state_dict(saved)
            self.snapshots, self.done = state["snapshots"], saved["batches_done"]

    def fitted(self, run: Run) -> Strata:
        seed = 1000 * run.unit.seed + self.snapshots
        clustering = GradientClustering(run.problem.model, run.plan.clusters, "exact", Sketch(seed=seed), seed=seed)
        self.snapshots += 1
        run.unit.record(step=run.step, guard="snapshot", guard_snapshots=self.snapshots)
        return clustering.fit(
            run.problem.train, run.problem.loss, batch_size=run.plan.stats_batch, device=run.device, progress=False
        )

    def snapshot(self, run: Run) -> None:
        if self.sampler is None:
            self.sampler = StratifiedBatchSampler(
                self.fitted(run), run.plan.batch_size, seed=run.unit.seed, refresh="auto"
            )

    def trained(self, run: Run, index: Tensor) -> None:
        if self.sampler is None or run.step % self.EVERY:
            return
        before = self.sampler.uniform
        if self.batches is None:
            self.batches = iter(self.sampler)
            self.done %= len(self.sampler)  # a saved state may stand at the end of an epoch
        batch = next(self.batches)
        if self.sampler.uniform and not before:
            run.unit.record(step=run.step, guard="uniform", guard_snapshots=self.snapshots)
        drawn = torch.tensor(batch)
        inputs, targets = fetch(run.problem.train, drawn, run.device)
        model = run.problem.model
        model.zero_grad()
        with record(model, sq_norms=False, sketch=Sketch(dim=64, seed=run.unit.seed)) as rec:
            losses = run.problem.loss(model(inputs), targets)
            (self.sampler.weights(drawn).to(losses) * losses).mean().backward()
        model.zero_grad()
        self.sampler.observe(rec, drawn)
        self.done += 1
        if self.done == len(self.sampler):
            self.batches = None
            if self.sampler.needs_snapshot:
                self.sampler.set_strata(self.fitted(run))

    def estimator(self, run: Run) -> Estimator | None:
        if self.sampler is None:
            return None
        if self.sampler.uniform:
            return Uniform(run.plan.batch_size, replacement=False, name=self.name)
        return Stratified(self.sampler.strata, run.plan.batch_size, name=self.name)


class ClusteredReduced(Clustered):
    """SVRG around the last snapshot, on batches from its strata."""

    def snapshot(self, run: Run) -> None:
        super().snapshot(run)
        self.state["model"] = {k: v.detach().clone() for k, v in run.problem.model.state_dict().items()}

    def estimator(self, run: Run) -> Estimator | None:
        if not self.state:
            return None
        strata = Strata.from_state_dict(self.state["strata"])
        filled = int((strata.counts > 0).sum())
        B = max(run.plan.batch_size, filled)
        return Stratified(strata, B, snapshot=self.state["model"], name=self.name)


class Online(Method):
    """Strata that follow training: the batch of every fourth step updates them."""

    EVERY = 4

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.clustering: GradientClustering | None = None
        self._saved: dict[str, Any] = {}

    @property
    def state(self) -> dict[str, Any]:
        saved = self._saved if self.clustering is None else self.clustering.state_dict()
        return {"clustering": saved} if saved else {}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._saved = state.get("clustering", {})

    def _live(self, run: Run) -> GradientClustering:
        if self.clustering is None:
            seed = run.unit.seed
            self.clustering = GradientClustering(
                run.problem.model, run.plan.clusters, "online", Sketch(seed=seed), seed=seed,
                num_examples=run.problem.num_examples,
            )  # fmt: skip
            if self._saved:
                self.clustering.load_state_dict(self._saved)
        return self.clustering

    def trained(self, run: Run, index: Tensor) -> None:
        if run.step % self.EVERY:
            return
        clustering, index = self._live(run), index.unique()  # SG-B draws with replacement
        inputs, targets = fetch(run.problem.train, index, run.device)
        model = run.problem.model
        model.zero_grad()
        with record(model, sq_norms=False, sketch=clustering.sketch) as rec:
            run.problem.loss(model(inputs), targets).mean().backward()
        model.zero_grad()
        clustering.update(rec, index)

    def estimator(self, run: Run) -> Estimator | None:
        if self.clustering is None and not self._saved:
            return None
        strata = self._live(run).strata
        assert strata is not None
        return Stratified(strata, max(run.plan.batch_size, int((strata.counts > 0).sum())), name=self.name)


METHODS: dict[str, Callable[[str], Method]] = {
    "SG-B": lambda name: Plain(name, 1),
    "SG-2B": lambda name: Plain(name, 2),
    "SVRG": lambda name: Reduced(name),
    "GC factored": lambda name: Clustered(name, "factored"),
    "GC exact": lambda name: Clustered(name, "exact"),
    "GC Neyman": lambda name: Clustered(name, "exact", 0.5, "neyman"),
    "GC online": lambda name: Online(name),
    "GC+SVRG": lambda name: ClusteredReduced(name, "exact"),
    "GC guarded": lambda name: Guarded(name),
}
"""Maker of every method by name. SG-B comes first in every trajectory: ratios are to it."""

STANDARD = ("SG-B", "SG-2B", "SVRG", "GC factored", "GC exact")
