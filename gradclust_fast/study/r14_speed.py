"""R14: does normalized variance tell the speed of convergence, and better than variance?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..variance import gradient_stats
from .figures import canvas, legend
from .images import SIZES, cifar
from .problems import Problem, classifier, evaluate, fetch, mlp
from .row import Check, Row, Variant, check
from .table import Table, mean
from .unit import Diverged, Unit

SPAN = math.sqrt(2)
"""The speed at n examples is that between n/√2 and n√2."""


@dataclass(frozen=True)
class Speed:
    """Trains with one learning rate and batch size; at each of ``at`` examples seen, SG-B's variances and the speed."""

    problem: Callable[[Unit], Problem]
    lr: float
    batch_size: int
    momentum: float
    at: tuple[int, ...]

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "problem"}

    def __call__(self, unit: Unit) -> None:
        device = torch.device(unit.options.device)
        problem = self.problem(unit)
        model = problem.model.to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), self.lr, self.momentum)
        step, marks = 0, {}
        for n in self.at:
            marks[self.steps(n / SPAN)] = ("before", n)
            marks[self.steps(n)] = ("here", n)
            marks[self.steps(n * SPAN)] = ("after", n)
        open_points: dict[int, dict[str, Any]] = {}
        if unit.state is not None:
            model.load_state_dict(unit.state["model"])
            optimizer.load_state_dict(unit.state["optimizer"])
            step, open_points = unit.state["step"], unit.state["open"]
        last = max(marks)
        while step < last:
            rng = np.random.Generator(np.random.PCG64([unit.seed, step]))
            index = torch.from_numpy(rng.integers(problem.num_examples, size=self.batch_size))
            inputs, targets = fetch(problem.train, index, device)
            optimizer.zero_grad()
            loss = problem.loss(model(inputs), targets).mean()
            if not math.isfinite(float(loss.detach())):
                raise Diverged(f"the loss of the batch at step {step} is {float(loss.detach())}")
            loss.backward()
            optimizer.step()
            step += 1
            if step in marks:
                self.mark(unit, problem, device, step, *marks[step], open_points)
            if step % 20 == 0:
                unit.progress(step / last, f"step {step} of {last}")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                unit.checkpoint(partial(dict, state, open=open_points))

    def steps(self, n: float) -> int:
        return max(1, round(n / self.batch_size))

    def mark(
        self, unit: Unit, problem: Problem, device: torch.device, step: int, kind: str, n: int, open_points: dict
    ) -> None:
        point = open_points.setdefault(n, {})
        if kind == "here":
            try:
                stats = gradient_stats(problem.model, problem.train, problem.loss, batch_size=500, device=device)
            except ValueError as error:
                if "is not finite" not in str(error):
                    raise
                raise Diverged(f"step {step}: {error}") from error
            point["variance"] = stats.variance / self.batch_size
            point["variance_per_coordinate"] = stats.variance_per_coordinate / self.batch_size
            point["normalized_variance"] = stats.normalized_variance(self.batch_size)
            point["gradient_sqnorm"] = stats.gradient_sqnorm
            return
        loss = evaluate(problem.model, problem, problem.train, device)[0]
        if not math.isfinite(loss):
            raise Diverged(f"the training loss at step {step} is {loss}")
        point[kind], point[f"{kind}_step"] = loss, step
        if kind == "after":
            del open_points[n]
            gone = math.log(point["after_step"] / point["before_step"])
            speed = math.log(point["before"] / point["after"]) / gone
            unit.record(examples=n, train_loss=point["after"], speed=speed, **{k: point[k] for k in KEPT})


KEPT = ("variance", "variance_per_coordinate", "normalized_variance", "gradient_sqnorm")


def variants(scale: str) -> list[Variant]:
    small = scale == "small"
    limit = 2000 if small else 10_000
    problems: dict[str, tuple[Callable, dict[str, Any], float, tuple, tuple, tuple[int, ...], str]] = {
        "MNIST": (
            partial(classifier, name="mnist", model=partial(mlp, 784, 128, 128, 10), limit=limit),
            {"limit": limit}, 0.5, (0.005, 0.02, 0.08), (32, 128, 512),
            (6000, 24_000) if small else (20_000, 80_000, 320_000), "mnist",
        ),
        "CIFAR-10": (
            partial(cifar, **SIZES[scale], tested=False), dict(SIZES[scale]), 0.9,
            (0.003, 0.02) if small else (0.005, 0.01, 0.02, 0.04), (32, 128) if small else (32, 128, 512),
            (6000, 12_000) if small else (20_000, 80_000, 240_000), "cifar10",
        ),
    }  # fmt: skip
    return [
        Variant(
            "speed", f"{name} lr={lr:g} B={B}", {"problem": name, "lr": lr, "batch": B},
            Speed(problem, lr, B, momentum, at), details, needs=(data,),
        )
        for name, (problem, details, momentum, rates, batches, at, data) in problems.items()
        for lr in rates for B in batches
    ]  # fmt: skip


def ranks(values: list[float]) -> np.ndarray:
    """Average ranks, ties sharing theirs."""
    array = np.asarray(values)
    order = array.argsort(kind="stable")
    out = np.empty(len(array))
    out[order] = np.arange(len(array))
    for value in np.unique(array):
        out[array == value] = out[array == value].mean()
    return out


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's ρ; NaN where one of them is constant."""
    x, y = ranks(a) - (len(a) - 1) / 2, ranks(b) - (len(b) - 1) / 2
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size else math.nan


def correlations(records: list[dict[str, Any]]) -> tuple[float, float]:
    """(ρ_NV, ρ_V) of speed, within each number of examples seen, averaged: progress differs between those."""
    out = []
    for n in sorted({r["examples"] for r in records}):
        own = [r for r in records if r["examples"] == n]
        speed = [r["speed"] for r in own]
        columns = ([r[c] for r in own] for c in ("normalized_variance", "variance"))
        out.append([rank_correlation(speed, column) for column in columns])
    return mean(row[0] for row in out), mean(row[1] for row in out)


def of_seed(one: Table, which: int) -> float:
    return correlations(one.records)[which]


def interval(records: list[dict[str, Any]], draws: int = 2000) -> tuple[float, float, list[float]]:
    """95 % bootstrap interval of |ρ_NV| − |ρ_V|, whole training runs drawn with replacement."""
    runs: dict[tuple, list[dict[str, Any]]] = {}
    for r in records:
        runs.setdefault((r["lr"], r["batch"], r["seed"]), []).append(r)
    rng = np.random.Generator(np.random.PCG64(0))
    groups = list(runs.values())
    found = []
    for _ in range(draws):
        pick = [r for i in rng.integers(len(groups), size=len(groups)) for r in groups[i]]
        nv, v = correlations(pick)
        if math.isfinite(nv) and math.isfinite(v):
            found.append(abs(nv) - abs(v))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high), found


def verdict(low: float, high: float) -> str:
    return "confirmed" if low > 0 else "refuted" if high < 0 else "inconclusive"


def checks(table: Table) -> list[Check]:
    out = []
    for problem in table.distinct("problem"):
        own = table.where(problem=problem)
        if len(own) < 8:
            out.append(Check(f"{problem}: |ρ_NV| − |ρ_V|", "> 0", "no finished trajectory", None))
            continue
        nv, v = correlations(own.records)
        for name, column in (("normalized variance", 0), ("variance", 1)):
            values = own.per_seed(partial(of_seed, which=column))
            out.append(check(f"{problem}: rank correlation of speed with {name}, by seed", "–", values))
        low, high, _ = interval(own.records)
        ours = f"ρ_NV = {nv:.2f}, ρ_V = {v:.2f}; |ρ_NV| − |ρ_V| in [{low:.2f}, {high:.2f}]: {verdict(low, high)}"
        out.append(Check(f"{problem}: normalized variance tells more about speed than variance", "claimed", ours, None))
    return out


def draw(table: Table) -> Any:
    problems = table.distinct("problem")
    figure, axes = canvas(len(problems), 2, "R14  Speed of convergence, normalized variance, and variance")
    for problem, pair in zip(problems, axes):
        own = table.where(problem=problem)
        nv, v = correlations(own.records)
        for panel, column, rho, label in (
            (pair[0], "normalized_variance", nv, "normalized variance of SG-B"),
            (pair[1], "variance", v, "gradient variance of SG-B"),
        ):
            for n, marker in zip(sorted(own.distinct("examples")), "osD^v"):
                points = own.where(examples=n)
                panel.plot(
                    points.column(column), points.column("speed"), marker, ms=4.5, alpha=0.75,
                    label=f"{problem}: after {n:,} examples",
                )  # fmt: skip
            panel.set(title=f"{problem}: rank correlation {rho:.2f}", xlabel=label)
            panel.set_ylabel("speed  −d log(loss) / d log(examples)")
            panel.grid(True, alpha=0.25)
        pair[1].set_xscale("log")
    legend(figure, [each for pair in axes for each in pair])
    return figure


ROW = Row(
    id="R14",
    title="speed of convergence",
    shows="whether normalized variance tells how fast the loss falls, and better than variance does, over learning "
    "rates and batch sizes",
    variants=variants,
    checks=checks,
    draw=draw,
    sizes={
        "small": "MLP 784-128-128-10 on 2000 digits, lr .005, .02, .08, B 32, 128, 512, after 6000 and 24,000 "
        "examples; R7's network on its 1500 images, lr .003, .02, B 32, 128, after 6000 and 12,000 examples",
        "paper": "MLP on 10,000 digits, the same grid, after 20,000, 80,000 and 320,000 examples; R7's network on 5000 "
        "images, lr .005 to .04, B 32, 128, 512, after 20,000, 80,000 and 240,000 examples",
    },
    paper="claims that normalized variance correlates with the speed of convergence better than variance does; no "
    "number is given.",
    remarks="Correlations are over learning rates, batch sizes and seeds at the same number of examples seen, averaged "
    "over those numbers, as progress changes both variance and speed; the bootstrap draws whole training runs. The "
    "claim is confirmed, refuted or inconclusive as the interval lies above 0, below it, or around it.",
)
