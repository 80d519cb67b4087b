"""R13: does lower variance help? Training with every estimator, its snapshots paid for."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clustering import GradientClustering
from ..sampling import StratifiedBatchSampler
from ..sketching import Sketch
from ..strata import Strata
from .figures import COLORS, MARKERS, QUANTITIES, canvas, legend, lines
from .problems import Problem, classifier, evaluate, fetch, mlp
from .r08_duplicates import digits
from .row import Check, Row, Variant, check
from .table import Table
from .unit import Diverged, Unit

ESTIMATORS = ("SG-B", "SG-2B", "SVRG", "GC factored", "GC exact")


@dataclass(frozen=True)
class Training:
    """SGD with one estimator until ``examples`` examples have been in its batches.

    Attributes:
        problem: ``problem(unit)``. estimator: one of ``ESTIMATORS``.
        batch_size, lr, momentum: the same for all estimators; SG-2B takes twice the batch.
        every: examples between two snapshots. look: examples between two looks at loss and accuracy, which count
            for nothing.
    """

    problem: Callable[[Unit], Problem]
    estimator: str
    examples: int
    batch_size: int
    lr: float
    momentum: float
    every: int
    look: int

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "problem"}

    def __call__(self, unit: Unit) -> None:
        Session(self, unit).go()


class Session:
    """A training run under way. ``seconds``: processor time of steps and snapshots. ``gradients``: what they took."""

    def __init__(self, plan: Training, unit: Unit) -> None:
        self.plan, self.unit, self.device = plan, unit, torch.device(unit.options.device)
        self.problem = plan.problem(unit)
        self.model = self.problem.model.to(self.device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), plan.lr, plan.momentum)
        self.B = plan.batch_size * (2 if plan.estimator == "SG-2B" else 1)
        self.step = self.examples = self.gradients = self.snapshots = 0
        self.seconds, self.looked = 0.0, -1
        self.earlier: torch.nn.Module | None = None  # SVRG's snapshot, and the full gradient there
        self.full: list[Tensor] = []
        self.sampler: StratifiedBatchSampler | None = None
        if unit.state is not None:
            self.restore(unit.state)

    def go(self) -> None:
        plan = self.plan
        while True:
            if self.examples // plan.look > self.looked:
                self.look()
                self.looked = self.examples // plan.look
            if self.examples >= plan.examples:
                return
            begin = time.process_time()
            if self.examples // plan.every >= self.snapshots:
                self.snapshot()
            self.train_step()
            self.seconds += time.process_time() - begin
            if self.step % 20 == 0:
                self.unit.progress(self.examples / plan.examples, f"{self.examples} of {plan.examples} examples")
                self.unit.checkpoint(self.state)

    def look(self) -> None:
        loss, accuracy = evaluate(self.model, self.problem, self.problem.train, self.device)
        if not math.isfinite(loss):
            raise Diverged(f"the training loss after {self.examples} examples is {loss}")
        if self.problem.test is not None:
            accuracy = evaluate(self.model, self.problem, self.problem.test, self.device)[1]
        self.unit.record(
            step=self.step, examples=self.examples, gradients=self.gradients, seconds=self.seconds, train_loss=loss,
            accuracy=accuracy,
        )  # fmt: skip

    def snapshot(self) -> None:
        name, N = self.plan.estimator, self.problem.num_examples
        seed = 1000 * self.unit.seed + self.snapshots
        self.snapshots += 1
        if name == "SVRG":
            self.earlier = copy.deepcopy(self.model)
            self.full = [torch.zeros_like(p) for p in self.earlier.parameters()]
            for index in torch.arange(N).split(500):
                for total, part in zip(self.full, self.gradient(self.earlier, index, None, N)):
                    total += part
            self.gradients += N
        elif name.startswith("GC"):
            method = name.removeprefix("GC ")
            clustering = GradientClustering(self.model, self.plan.batch_size, method, Sketch(seed=seed), seed=seed)
            # counts of the paper's rule grow from batch to batch; the exact moves do not care
            batch = 500 if method == "exact" else self.plan.batch_size
            strata = clustering.fit(
                self.problem.train, self.problem.loss, batch_size=batch, device=self.device, progress=False
            )
            self.gradients += N * (1 if method == "exact" else 2 * clustering.options["rounds"])
            self.sampler = self.sampler_of(strata)

    def sampler_of(self, strata: Strata) -> StratifiedBatchSampler:
        return StratifiedBatchSampler(strata, self.B, seed=self.unit.seed)

    def train_step(self) -> None:
        index, weights = self.draw()
        parts = self.gradient(self.model, index, weights, len(index))
        if self.earlier is not None:
            before = self.gradient(self.earlier, index, weights, len(index))
            parts = [now - then + full for now, then, full in zip(parts, before, self.full)]
        for p, part in zip(self.model.parameters(), parts):
            p.grad = part
        self.optimizer.step()
        self.step += 1
        self.examples += self.B
        self.gradients += self.B * (1 if self.earlier is None else 2)

    def draw(self) -> tuple[Tensor, Tensor | None]:
        """The batch is a function of seed and step alone."""
        if self.sampler is None:
            rng = np.random.Generator(np.random.PCG64([self.unit.seed, self.step]))
            return torch.from_numpy(rng.integers(self.problem.num_examples, size=self.B)), None
        self.sampler.set_epoch(self.step)
        index = torch.tensor(next(iter(self.sampler)))
        return index, self.sampler.weights(index)

    def gradient(self, model: torch.nn.Module, index: Tensor, weights: Tensor | None, over: int) -> list[Tensor]:
        """Σ w ∇ℓ / ``over`` of these examples."""
        inputs, targets = fetch(self.problem.train, index, self.device)
        losses = self.problem.loss(model(inputs), targets)
        if weights is not None:
            losses = losses * weights.to(losses)
        total = losses.sum() / over
        if not math.isfinite(float(total.detach())):
            raise Diverged(f"the loss of the batch at step {self.step} is {float(total.detach())}")
        return list(torch.autograd.grad(total, list(model.parameters())))

    def state(self) -> dict[str, Any]:
        names = ("step", "examples", "gradients", "snapshots", "seconds", "looked")
        return {
            **{name: getattr(self, name) for name in names},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "earlier": None if self.earlier is None else self.earlier.state_dict(),
            "full": self.full,
            "strata": None if self.sampler is None else self.sampler.strata.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name in ("step", "examples", "gradients", "snapshots", "seconds", "looked"):
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.full = [each.to(self.device) for each in state["full"]]
        if state["earlier"] is not None:
            self.earlier = copy.deepcopy(self.model)
            self.earlier.load_state_dict(state["earlier"])
        if state["strata"] is not None:
            self.sampler = self.sampler_of(Strata.from_state_dict(state["strata"]))


def variants(scale: str) -> list[Variant]:
    small = scale == "small"
    limit = 3000 if small else 60_000
    widths = (784, 128, 128, 10) if small else (784, 1024, 1024, 10)
    problems: dict[str, tuple[Any, ...]] = {
        "MNIST": (
            partial(classifier, name="mnist", model=partial(mlp, *widths), limit=limit), {"limit": limit}, ("mnist",),
            {"examples": 64_000 if small else 2_560_000, "batch_size": 128, "lr": 0.02, "momentum": 0.5,
             "every": 32_000 if small else 256_000, "look": 4000 if small else 64_000},
        ),
        "digits, two thirds copies": (
            digits, {}, (),
            {"examples": 24_000 if small else 256_000, "batch_size": 64, "lr": 0.02, "momentum": 0.9,
             "every": 12_000 if small else 32_000, "look": 2000 if small else 8000},
        ),
    }  # fmt: skip
    return [
        Variant(
            "training", f"{name} {estimator}", {"problem": name, "estimator": estimator},
            Training(problem, estimator, **plan), details, needs=needs,
        )
        for name, (problem, details, needs, plan) in problems.items()
        for estimator in ESTIMATORS
    ]  # fmt: skip


def at(one: Table, x: str, value: float, column: str) -> float:
    """The column where x reaches a value, between the two looks around it."""
    rows = sorted(one.where(lambda r: r.get(x) is not None), key=lambda r: r[x])
    for left, right in pairwise(rows):
        if left[x] <= value <= right[x]:
            share = (value - left[x]) / (right[x] - left[x]) if right[x] > left[x] else 1.0
            return left[column] + share * (right[column] - left[column])
    raise ValueError(f"{x} never reaches {value}")


def relative(one: Table, estimator: str, x: str, column: str) -> float:
    """An estimator's value over SG-B's, both at the largest x that both reach."""
    pair = [one.where(estimator=name) for name in (estimator, "SG-B")]
    value = min(max(each.column(x)) for each in pair)
    ours, plain = (at(each, x, value, column) for each in pair)
    return ours / plain


def checks(table: Table) -> list[Check]:
    out = []
    for problem in table.distinct("problem"):
        own = table.where(problem=problem)
        for name in (n for n in ESTIMATORS[1:] if n in own.distinct("estimator")):
            for x, label in (("examples", "at equal examples"), ("seconds", "at equal processor time")):
                values = own.per_seed(partial(relative, estimator=name, x=x, column="train_loss"))
                out.append(check(f"{problem}: training loss ÷ SG-B's {label}, {name}", "–", values))
        for name in own.distinct("estimator"):
            values = own.where(estimator=name).per_seed(lambda one: one.column("accuracy")[-1])
            out.append(check(f"{problem}: test accuracy at the end, {name}", "–", values))
            values = own.where(estimator=name).per_seed(lambda one: max(one.column("seconds")))
            out.append(check(f"{problem}: processor seconds in all, {name}", "–", values))
    return out


def draw(table: Table) -> Any:
    problems = table.distinct("problem")
    figure, axes = canvas(len(problems), 3, "R13  Training with every estimator, snapshots paid for", height=3.8)
    for problem, panels in zip(problems, axes):
        own = table.where(problem=problem)
        lines(panels[0], own, "train_loss", x="examples", log_y=True, xlabel="examples seen", title=problem)
        by_time(panels[1], own)
        lines(panels[2], own, "accuracy", x="examples", xlabel="examples seen", title="test accuracy")
        last = [r["accuracy"] for r in own if r.get("examples", 0) > 0]
        panels[2].set_ylim(max(0.0, min(last) - 0.02), 1.0)
    legend(figure, [each for panels in axes for each in panels])
    return figure


def by_time(axes: Any, table: Table) -> None:
    """Loss against processor time: every seed's own line, as times differ between seeds."""
    for name in table.distinct("estimator"):
        for seed in table.seeds:
            own = table.where(lambda r: (r.get("seconds") or 0) > 0, estimator=name, seed=seed)
            look = {"color": COLORS[name], "lw": 1.2, "marker": MARKERS[name], "ms": 3, "alpha": 0.8}
            axes.plot(own.column("seconds"), own.column("train_loss"), **look)
    axes.set_yscale("log")
    axes.set_xscale("log")  # the paper's clustering takes most of its run's time
    axes.set(xlabel="processor seconds, snapshots included", ylabel=QUANTITIES["train_loss"])
    axes.grid(True, alpha=0.25)


ROW = Row(
    id="R13",
    title="training with each estimator",
    shows="what lower variance does for training: loss and accuracy at equal examples and at equal time",
    variants=variants,
    checks=checks,
    draw=draw,
    sizes={
        "small": "3000 digits of MNIST, MLP 784-128-128-10, lr .02, momentum .5, B = K = 128, 64,000 examples, "
        "snapshot every 32,000; R8's 1500 digits, CNN, lr .02, momentum .9, B = K = 64, 24,000 examples, snapshot "
        "every 12,000",
        "paper": "60,000 digits of MNIST, MLP 784-1024-1024-10, 2,560,000 examples, snapshot every 256,000; R8's 1500 "
        "digits, 256,000 examples, snapshot every 32,000",
    },
    paper="not reported.",
    remarks="The learning rate is the same for all. SG-2B makes half as many steps with the same examples, SVRG "
    "computes two gradients an example. Time is processor time of steps and snapshots: the machine was shared. Equal "
    "time is the shorter of the two runs': for GC factored that ends before or soon after its first snapshot.",
)
