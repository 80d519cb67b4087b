"""One training run along which every estimator is measured at the same parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..report import EstimatorRow
from ..variance import compare_estimators
from .methods import METHODS, STANDARD, Method
from .problems import Problem, evaluate, fetch
from .unit import Diverged, Unit


@dataclass(frozen=True)
class Trajectory:
    """SGD, and where it is measured: ``run`` of a :class:`Variant`.

    Attributes:
        problem: ``problem(unit)``.
        steps, batch_size, lr, momentum, weight_decay: of SGD on batches drawn uniformly with replacement (SG-B).
        drops: ``((step, new learning rate), ...)``.
        snapshots: steps before which new strata and SVRG snapshots are made.
        measure: steps before which everything is measured; snapshot steps (before with the old strata, then with the
            new ones) and the end are measured too.
        methods: names in ``methods.METHODS``; the first must be SG-B.
        clusters: K; None is the batch size.
        monte_carlo, monte_carlo_at: so many mini-batches of every estimator at these steps, beside the exact figures.
        stats_batch: examples a batch of the measuring passes.
        fit_batch: of the factored clustering's passes, whose counts grow from batch to batch; None is the batch size,
            as the authors have it.
        rare, rare_at: methods that are measured at these steps only, since they cost most.
    """

    problem: Callable[[Unit], Problem]
    steps: int
    batch_size: int
    lr: float
    snapshots: tuple[int, ...]
    measure: tuple[int, ...] = ()
    momentum: float = 0.0
    weight_decay: float = 0.0
    drops: tuple[tuple[int, float], ...] = ()
    methods: tuple[str, ...] = STANDARD
    num_clusters: int | None = None
    monte_carlo: int = 0
    monte_carlo_at: tuple[int, ...] = ()
    stats_batch: int = 256
    fit_batch: int | None = None
    rare: tuple[str, ...] = ()
    rare_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.methods[0] != "SG-B":
            raise ValueError(f"methods must begin with SG-B, to which ratios are taken, got {self.methods[0]}")

    @property
    def clusters(self) -> int:
        return self.batch_size if self.num_clusters is None else self.num_clusters

    def settings(self) -> dict[str, Any]:
        """Everything but the problem, whose arguments are the variant's labels and details."""
        given = asdict(self)
        return {key: value for key, value in given.items() if key != "problem" and (value or "rare" not in key)}

    def __call__(self, unit: Unit) -> None:
        Run(self, unit).go()


class Run:
    """A trajectory under way. ``step`` counts completed training steps.

    ``resume``: go on from the unit's checkpoint, which a Run has written; False where the checkpoint is another's.
    """

    def __init__(self, plan: Trajectory, unit: Unit, *, resume: bool = True) -> None:
        self.plan, self.unit, self.device = plan, unit, torch.device(unit.options.device)
        self.problem = plan.problem(unit)
        self.problem.model.to(self.device).train()
        self.optimizer = torch.optim.SGD(
            self.problem.model.parameters(), plan.lr, plan.momentum, weight_decay=plan.weight_decay
        )
        self.methods: list[Method] = [METHODS[name](name) for name in plan.methods]
        self.step = 0
        self.snapshots_done: list[int] = []
        self._events_done = -1  # the last step whose measurements and snapshot are behind us
        if resume and unit.state is not None:
            self._restore(unit.state)

    @property
    def age(self) -> int | None:
        """Steps since the last snapshot."""
        return self.step - self.snapshots_done[-1] if self.snapshots_done else None

    def go(self) -> None:
        plan, followed = self.plan, [m for m in self.methods if type(m).trained is not Method.trained]
        while True:
            if self._events_done < self.step:
                with self._finite():
                    self._events()
                self._events_done = self.step
                self.unit.checkpoint(self._state)
            if self.step == plan.steps:
                return
            index = self.train_step()
            for method in followed:
                method.trained(self, index)
            if self.step % 20 == 0:
                self.unit.progress(self.step / plan.steps, f"step {self.step} of {plan.steps}")
                self.unit.checkpoint(self._state)

    @contextmanager
    def _finite(self) -> Iterator[None]:
        """Gradients can overflow before the loss does."""
        try:
            yield
        except ValueError as error:
            if "is not finite" not in str(error):
                raise
            raise Diverged(f"step {self.step}: {error}") from error

    def _events(self) -> None:
        plan, renew = self.plan, self.step in self.plan.snapshots
        if self.step in plan.measure or self.step == plan.steps or (renew and self.snapshots_done):
            self.measure()
        if renew and self.step < plan.steps:
            self.snapshots_done.append(self.step)
            for method in self.methods:
                method.snapshot(self)
                self.unit.progress(self.step / plan.steps, f"step {self.step} of {plan.steps}: {method.name} snapshot")
            self.measure()

    def train_step(self) -> torch.Tensor:
        """One step of SG-B; returns the indices of its batch. The batch is a function of seed and step alone."""
        rng = np.random.Generator(np.random.PCG64([self.unit.seed, self.step]))
        index = torch.from_numpy(rng.integers(self.problem.num_examples, size=self.plan.batch_size))
        for step, lr in self.plan.drops:
            if step == self.step:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr
        inputs, targets = fetch(self.problem.train, index, self.device)
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.problem.model(inputs), targets).mean()
        if not math.isfinite(float(loss.detach())):
            raise Diverged(f"the loss of the batch at step {self.step} is {float(loss.detach())}")
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return index

    def measure(self) -> list[EstimatorRow]:
        """Records one line an estimator, at the current parameters."""
        problem, plan = self.problem, self.plan
        loss, train_accuracy = evaluate(problem.model, problem, problem.train, self.device)
        if not math.isfinite(loss):
            raise Diverged(f"the training loss at step {self.step} is {loss}")
        accuracy = train_accuracy
        if problem.test is not None:
            accuracy = evaluate(problem.model, problem, problem.test, self.device)[1]
        methods = [m for m in self.methods if m.name not in plan.rare or self.step in plan.rare_at]
        estimators = [e for e in (method.estimator(self) for method in methods) if e is not None]
        report = compare_estimators(
            problem.model,
            problem.train,
            problem.loss,
            estimators,
            monte_carlo=plan.monte_carlo if self.step in plan.monte_carlo_at else 0,
            seed=1000 * self.unit.seed + len(self.snapshots_done),
            batch_size=plan.stats_batch,
            device=self.device,
        )
        for row in report:
            drawn = row.monte_carlo
            self.unit.record(
                step=self.step,
                age=self.age,
                estimator=row.name,
                batch_size=row.batch_size,
                gradients_per_step=row.gradients_per_step,
                variance=max(row.variance, 0.0),  # copies alone leave differences of rounding, of either sign
                variance_per_coordinate=max(row.variance_per_coordinate, 0.0),
                normalized_variance=row.normalized_variance,
                aggregate_normalized_variance=row.aggregate_normalized_variance,
                ratio=max(row.ratio, 0.0) if math.isfinite(row.ratio) else None,
                gradient_sqnorm=report.stats.gradient_sqnorm,
                train_loss=loss,
                accuracy=None if math.isnan(accuracy) else accuracy,
                mc_draws=drawn.draws if drawn else None,
                mc_variance=drawn.variance if drawn else None,
                mc_variance_error=drawn.variance_error if drawn else None,
                mc_normalized_variance=drawn.normalized_variance if drawn else None,
                mc_normalized_variance_error=drawn.normalized_variance_error if drawn else None,
            )
        return list(report)

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.problem.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "snapshots_done": self.snapshots_done,
            "events_done": self._events_done,
            "methods": {method.name: method.state for method in self.methods},
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.problem.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.step, self.snapshots_done = state["step"], list(state["snapshots_done"])
        self._events_done = state["events_done"]
        for method in self.methods:
            method.state = state["methods"][method.name]
