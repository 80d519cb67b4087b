"""R4: random features at τ = 1, learning rates compared at equal steps and at equal training loss."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

from .figures import QUANTITIES, canvas
from .r03_random_features import RATES, STEPS, level, levels, variant
from .row import Check, Row, check
from .table import Table, mean

COLORS = dict(zip(RATES, ("#D55E00", "#009E73", "#0072B2")))


def at_loss(table: Table, lr: float, loss: float) -> float:
    """SG-B's variance per coordinate where the training loss passes ``loss``, interpolated between logarithms."""
    own = table.where(lr=lr, estimator="SG-B")
    points = sorted({(r["train_loss"], r["variance_per_coordinate"]) for r in own if r["train_loss"] > 0})
    for (low, v), (high, w) in pairwise(points):
        if low <= loss <= high:
            share = (math.log(loss) - math.log(low)) / (math.log(high) - math.log(low)) if high > low else 0.0
            return math.exp((1 - share) * math.log(v) + share * math.log(w))
    raise ValueError(f"learning rate {lr} never has the loss {loss}")


def matched(table: Table, slow: float, fast: float) -> float:
    """V(fast) ÷ V(slow) at equal loss, geometric mean over losses that both trajectories pass."""
    ends = [table.where(lr=lr, estimator="SG-B").column("train_loss") for lr in (slow, fast)]
    low, high = max(min(losses) for losses in ends), min(max(losses) for losses in ends)
    if not 0 < low < high:
        raise ValueError("no loss in common")
    grid = [low * (high / low) ** (k / 10) for k in range(1, 10)]
    return math.exp(mean(math.log(at_loss(table, fast, x) / at_loss(table, slow, x)) for x in grid))


def unmatched(table: Table, slow: float, fast: float) -> float:
    """V(fast) ÷ V(slow) over the same steps."""
    return level(table.where(lr=fast), "SG-B") / level(table.where(lr=slow), "SG-B")


def checks(table: Table) -> list[Check]:
    papers = {0.001: "5e-3", 0.01: "1.2e-3", 0.1: "8e-6"}
    out = [check(f"SG-B per coordinate, lr {lr:g}", papers[lr], levels(table.where(lr=lr), "SG-B")) for lr in papers]
    for slow, fast in ((0.001, 0.01), (0.01, 0.1)):
        equal_steps = table.per_seed(partial(unmatched, slow=slow, fast=fast))
        paper = f"{float(papers[fast]) / float(papers[slow]):.2g}"
        out.append(check(f"V(lr {fast:g}) ÷ V(lr {slow:g}), equal steps", paper, equal_steps, below=1.0, strict=True))
        equal_loss = table.per_seed(partial(matched, slow=slow, fast=fast))
        out.append(check(f"V(lr {fast:g}) ÷ V(lr {slow:g}), equal training loss", "–", equal_loss))
    return out


def draw(table: Table) -> Any:
    figure, axes = canvas(1, 2, "R4  Random features at τ = 1: SG-B's variance for three learning rates")
    for axis, x, label in zip(
        axes[0], ("step", "train_loss"), ("training step", "training loss (training goes right)")
    ):
        for lr in RATES:
            for seed in table.seeds:
                own = table.where(lr=lr, seed=seed, estimator="SG-B").records
                points = [(r[x], r["variance_per_coordinate"]) for r in sorted(own, key=lambda r: r["step"])]
                name = f"learning rate {lr:g}" if seed == table.seeds[0] else None
                axis.plot(*zip(*points), "o-", ms=3, lw=1.2, color=COLORS[lr], alpha=0.8, label=name)
        axis.set(xlabel=label, ylabel=QUANTITIES["variance_per_coordinate"], yscale="log")
        axis.grid(True, alpha=0.25)
    axes[0][0].set_title("at equal steps: a smaller rate, a higher variance")
    axes[0][1].set_title("at equal loss")
    axes[0][1].set_xscale("log")
    axes[0][1].invert_xaxis()
    axes[0][0].legend(fontsize=9.5)
    return figure


SIZE = f"1000 hidden units, N = 1000, lr .1, .01, .001, {STEPS} steps, B = 10 (R3's trajectories at τ = 1)"
ROW = Row(
    id="R4",
    title="random features, learning rate",
    shows="at equal steps a smaller learning rate has the higher variance; at equal loss it may only be behind",
    variants=lambda scale: [variant(scale, 1, lr) for lr in RATES],
    checks=checks,
    draw=draw,
    sizes={"small": SIZE, "paper": SIZE},
    remarks="At equal training loss the variances of the three learning rates are within a factor two of each other, "
    "with those at equal steps up to a hundred apart: a smaller rate has the higher variance because it is "
    "behind.",
    paper="5e-3 for learning rate .001, 1.2e-3 for .01, 8e-6 for .1.",
)
