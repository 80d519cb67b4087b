"""R10: how far the clustering objective falls as strata are added."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..clustering import GradientClustering
from ..estimators import Stratified, Uniform
from ..sketching import Sketch
from ..strata import Strata
from ..variance import compare_estimators
from .figures import COLORS, MARKERS, canvas
from .problems import classifier, cnn, mlp
from .row import Check, Row, Variant, check
from .table import Table
from .trajectory import Run, Trajectory
from .unit import Unit

SIZES = tuple(2**power for power in range(9))
FEWER = {"random": (1, 4, 16, 64, 256), "factored": (256,)}
"""Sizes at which the small scale measures these, beside exact strata at all."""


def measure(unit: Unit, plan: Trajectory, sizes: dict[str, tuple[int, ...]]) -> None:
    """Trains, then records J of exact, factored and random equal strata for every K, exact over all examples."""
    run = Run(plan, unit, resume=False)
    while run.step < plan.steps:
        run.train_step()
    problem, N = run.problem, run.problem.num_examples
    done = [] if unit.state is None else list(unit.state["done"])
    kinds = [(kind, K) for kind in ("random", "exact", "factored") for K in sizes.get(kind, SIZES)]
    for position, (kind, K) in enumerate(kinds):
        if [kind, K] in done or K > N:
            continue
        unit.progress(position / len(kinds), f"{kind} strata, K = {K}")
        report = compare_estimators(
            problem.model,
            problem.train,
            problem.loss,
            [Uniform(1, name="one"), Stratified(strata_of(run, kind, K), name=kind)],
            batch_size=plan.stats_batch,
            device=run.device,
        )
        # with one draw from each of K strata V = J/N²; J₁ = N² σ², the variance of one uniform draw
        relative = report[1].batch_size * report[1].variance / report[0].variance
        unit.record(method=kind, K=K, N=N, J=N * N * report[1].variance, relative=relative)
        done.append([kind, K])
        unit.checkpoint(lambda: {"done": done})


def strata_of(run: Run, kind: str, K: int) -> Strata:
    seed, N = run.unit.seed, run.problem.num_examples
    if kind == "random":
        labels = torch.empty(N, dtype=torch.int64)
        labels[torch.randperm(N, generator=torch.Generator().manual_seed(1000 * seed + K))] = torch.arange(N) % K
        return Strata(labels, K)
    clustering = GradientClustering(run.problem.model, K, kind, Sketch(seed=seed), seed=seed)
    batch = run.plan.stats_batch if kind == "exact" else run.plan.fit_batch or run.plan.batch_size
    return clustering.fit(run.problem.train, run.problem.loss, batch_size=batch, device=run.device, progress=False)


def variant(
    title: str, name: str, model: Callable[[], nn.Module], limit: int | None, steps: int, lr: float, scale: str
) -> Variant:
    plan = Trajectory(
        problem=partial(classifier, name=name, model=model, limit=limit, tested=False),
        steps=steps, batch_size=128, lr=lr, momentum=0.5, snapshots=(), stats_batch=500,
        fit_batch=500 if scale == "small" else 128,
    )  # fmt: skip
    sizes = FEWER if scale == "small" else {}
    details = {**plan.settings(), "limit": limit, "sizes": sizes}
    needs = () if name == "digits" else (name,)
    return Variant("clusterability", title, {"data": title}, partial(measure, plan=plan, sizes=sizes), details, needs)


def variants(scale: str) -> list[Variant]:
    if scale == "small":
        return [
            variant("digits, MLP 64-64-10", "digits", partial(mlp, 64, 64, 10), None, 300, 0.05, scale),
            variant(
                "MNIST 10k, MLP 784-128-128-10", "mnist", partial(mlp, 784, 128, 128, 10), 10_000, 1000, 0.02, scale
            ),
            variant("CIFAR-10 2k, CNN", "cifar10", partial(cnn, 3, 32, 4), 2000, 1000, 0.02, scale),
        ]
    return [
        variant("digits, MLP 64-64-10", "digits", partial(mlp, 64, 64, 10), None, 300, 0.05, scale),
        variant("MNIST 60k, MLP 784-1024-1024-10", "mnist", partial(mlp, 784, 1024, 1024, 10), None, 2000, 0.02, scale),
        variant("CIFAR-10 50k, CNN", "cifar10", partial(cnn, 3, 32, 16), None, 2000, 0.02, scale),
    ]


def curve(one: Table, kind: str, column: str) -> dict[int, float]:
    """{K: value} of one seed."""
    return {r["K"]: r[column] for r in one.where(method=kind)}


def largest_rise(one: Table) -> float:
    return max(b / a for a, b in pairwise(curve(one, "exact", "J").values()))


def formula_error(one: Table) -> float:
    """Largest relative error of (J₁/K)(N−K)/(N−1), the expectation for random strata of equal sizes."""
    N = one.column("N")[0]
    return max(abs(v * (N - 1) / (N - K) - 1) for K, v in curve(one, "random", "relative").items())


def worst_from_16(one: Table) -> float:
    return max(v for K, v in curve(one, "exact", "relative").items() if K >= 16)


def at_256(one: Table, kind: str) -> float:
    return curve(one, kind, "relative")[256]


def checks(table: Table) -> list[Check]:
    out = []
    for data in table.distinct("data"):
        own = table.where(data=data)
        claim = f"{data}: largest J(2K) ÷ J(K), exact"
        out.append(check(claim, "< 1", own.per_seed(largest_rise), below=1.0, strict=True))
        claim = f"{data}: random equal strata, largest error of (J₁/K)(N−K)/(N−1)"
        out.append(check(claim, "–", own.per_seed(formula_error), below=0.03))
        if data.startswith("MNIST"):
            claim = f"{data}: J ÷ (J₁/K), the largest for K ≥ 16, exact"
            out.append(check(claim, "–", own.per_seed(worst_from_16), below=0.5))
        paper = {"M": "≈ .25", "C": "≈ .55"}.get(data[0], "–")
        for kind in ("exact", "factored"):
            values = own.per_seed(partial(at_256, kind=kind))
            out.append(check(f"{data}: J ÷ (J₁/K) at K = 256, {kind}", paper if kind == "factored" else "–", values))
    return out


def draw(table: Table) -> Any:
    names = table.distinct("data")
    figure, axes = canvas(
        2, len(names), "R10  How clusterable gradients are: J against the number of strata", height=3.8
    )
    labels = {
        "random": ("#777777", "s", "random equal strata"),
        "exact": (COLORS["GC exact"], MARKERS["GC exact"], "GC exact"),
        "factored": (COLORS["GC factored"], MARKERS["GC factored"], "GC factored: the paper's rule"),
    }
    for column, name in enumerate(names):
        for axis, y in ((axes[0][column], "J"), (axes[1][column], "relative")):
            for kind, (color, marker, label) in labels.items():
                xs, middle, low, high = table.where(data=name, method=kind).curve("K", y)
                axis.plot(xs, middle, marker=marker, ms=4, color=color, label=label)
                axis.fill_between(xs, low, high, color=color, alpha=0.2, lw=0)
            axis.set_xscale("log", base=2)
            axis.set_xlabel("strata K")
            axis.grid(True, alpha=0.25)
        axes[0][column].set(yscale="log", title=name, ylabel="J = Σ N_k Σ ‖g − c_k‖²")
        axes[1][column].set(ylabel="J ÷ (J₁/K)", ylim=(0, 1.05))
    axes[0][0].legend(fontsize=9.5)
    return figure


ROW = Row(
    id="R10",
    title="how clusterable gradients are",
    shows="the clustering objective J against the number of strata; J/N² is the variance of one draw from each",
    variants=variants,
    checks=checks,
    draw=draw,
    sizes={
        "small": "1500 digits (MLP 64-64-10, step 300), 10,000 of MNIST (MLP 784-128-128-10, step 1000), 2000 of "
        "CIFAR-10 (CNN, step 1000); K = 1 to 256",
        "paper": "1500 digits (MLP 64-64-10, step 300), MNIST (MLP 784-1024-1024-10, step 2000), CIFAR-10 (CNN, step "
        "2000); K = 1 to 256",
    },
    remarks="The paper's figures are of its own rule (factored), of larger networks and, for CIFAR-10, of 50,000 "
    "images instead of 2000, where 256 strata have 8 examples each.",
    paper="J is about .25 of J₁/K for MNIST, .55 for CIFAR-10 and .5 for ImageNet at K = 256.",
)
