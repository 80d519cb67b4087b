"""R3: random features, from under- to overparametrised."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from .figures import canvas, legend, lines
from .problems import random_features
from .row import Check, Row, Variant, check
from .table import Table, mean
from .trajectory import Trajectory

HIDDEN = 1000
STEPS = 5000
TAUS = (0.1, 1, 3, 10)
RATES = (0.1, 0.01, 0.001)
EARLY = (10, 30, 100, 300)


def variant(
    scale: str, tau: float, lr: float, copies: float = 0.0, *, hidden: int = HIDDEN, steps: int = STEPS
) -> Variant:
    """One trajectory as R3, R4, R5 and R11 measure it."""
    N, small = round(hidden / tau), scale == "small"
    size: dict[str, Any] = {"N": N, "hidden": hidden, "dim": 100, "teacher": hidden, "copies": copies}
    often = tuple(range(steps // 10, steps, steps // (10 if small else 20))) if N <= 1000 or not small else ()
    plan = Trajectory(
        problem=partial(random_features, **size),
        steps=steps,
        batch_size=10,
        lr=lr,
        weight_decay=1e-4,
        snapshots=tuple(range(0 if often else steps // 5, steps, steps // 5)),
        measure=(*(EARLY if tau == 1 and not copies else ()), *often),
        monte_carlo=100 if small else 400,
        monte_carlo_at=(steps,),
        stats_batch=1000,
        # the counts of the paper's rule grow batch by batch: its own 10 examples where cheap, else 20 batches a pass
        fit_batch=max(10, N // (20 if small else 100)),
    )
    name = f"tau={tau:g} lr={lr:g}" + (f" copies={copies:g}" if copies else "")
    return Variant("random_features", name, {"tau": tau, "lr": lr, "copies": copies}, plan, size)


def late(table: Table, steps: int | None = None) -> Table:
    """Measurements of the last 70 % of the trajectory."""
    steps = max(table.column("step"), default=0) if steps is None else steps
    return table.where(lambda r: r["step"] >= 0.3 * steps)


def level(table: Table, estimator: str, column: str = "variance_per_coordinate") -> float:
    """Mean over the last 70 %."""
    return mean(late(table).where(estimator=estimator).column(column))


def peak(table: Table, estimator: str) -> float:
    """Maximum over the last 70 %."""
    return max(late(table).where(estimator=estimator).column("variance_per_coordinate"))


def levels(table: Table, estimator: str) -> list[float]:
    return table.per_seed(lambda own: level(own, estimator))


def ratios(table: Table, estimator: str) -> list[float]:
    """Of the means over the last 70 %, to SG-B's."""
    return table.per_seed(lambda own: level(own, estimator, "variance") / level(own, "SG-B", "variance"))


def checks(table: Table) -> list[Check]:
    middle = table.where(lr=0.01)
    values = {tau: levels(middle.where(tau=tau), "SG-B") for tau in TAUS}
    papers = {0.1: "8e-3", 1: "1.2e-3", 3: "6e-5", 10: "2e-6"}
    out = [check(f"SG-B per coordinate at τ = {tau:g}, lr .01", papers[tau], values[tau]) for tau in TAUS]
    fall = middle.per_seed(lambda own: level(own.where(tau=10), "SG-B") / level(own.where(tau=1), "SG-B"))
    out.append(check("V(τ=10) ÷ V(τ=1), SG-B, lr .01", ".0017", fall, below=0.03))
    for tau in (1, 3, 10):
        own = middle.where(tau=tau)
        out.append(check(f"GC exact ÷ SG-B at τ = {tau}, lr .01", "–", ratios(own, "GC exact"), below=0.50))
        factored = ratios(own, "GC factored")
        out.append(
            check(f"GC factored ÷ SG-B at τ = {tau}, lr .01", ".55–.65", factored, above=0.5, below=0.75, strict=True)
        )
    ours = {tau: ratios(middle.where(tau=tau), "SVRG") for tau in TAUS}
    for low, high in pairwise(TAUS):
        steps = [b / a for a, b in zip(ours[low], ours[high])]
        out.append(
            check(f"SVRG ÷ SG-B at τ = {high:g}, over the same at τ = {low:g}", "rises", steps, above=1.0, strict=True)
        )
    return out


def draw(table: Table) -> Any:
    figure, axes = canvas(2, 3, "R3  Random features, 1000 hidden units, N = 1000 / τ, B = K = 10", height=3.8)
    for lr, above, below in zip(RATES, axes[0], axes[1]):
        rows = [
            {"seed": seed, "tau": tau, "estimator": name, "mean": level(own, name), "max": peak(own, name),
             "ratio": level(own, name, "variance") / level(own, "SG-B", "variance")}
            for seed in table.seeds for tau in TAUS for name in table.distinct("estimator")
            if (own := table.where(seed=seed, tau=tau, lr=lr)).records
        ]  # fmt: skip
        summary = Table(rows)
        lines(
            above,
            summary,
            "mean",
            x="tau",
            log_x=True,
            log_y=True,
            xlabel="τ = hidden ÷ N",
            title=f"learning rate {lr:g}",
        )
        above.set_ylabel("variance per coordinate, last 70 %")
        highest = summary.where(estimator="SG-B").curve("tau", "max")
        above.plot(highest[0], highest[1], ":", color="#444444", lw=1.2, label="maximum of SG-B (lines: means)")
        lines(below, summary, "ratio", x="tau", log_x=True, log_y=True, xlabel="τ = hidden ÷ N")
    legend(figure, axes[0])
    return figure


def variants(scale: str) -> list[Variant]:
    grid = [(tau, lr) for tau in TAUS for lr in RATES if scale == "paper" or tau >= 1 or lr == 0.01]
    return [variant(scale, tau, lr) for tau, lr in grid]


SIZE = "1000 hidden units, N = 1000 / τ, lr .1, .01, .001{}, 5000 steps, B = K = 10, snapshot every 1000"
ROW = Row(
    id="R3",
    title="random features, overparametrisation",
    shows="the more parameters for the data, the lower the variance, and the less SVRG helps",
    variants=variants,
    checks=checks,
    draw=draw,
    sizes={"small": SIZE.format(" (τ = .1: .01 only)"), "paper": SIZE.format("")},
    remarks="As in the authors' code: Gaussian inputs of dimension 100, two classes from a teacher's output above its "
    "mean, cross-entropy, weight decay 1e-4. With learning rate .1 at τ = 1 the variance falls by orders of "
    "magnitude between two snapshots, and strata (and SVRG's gradients) 1000 steps old can be worse than "
    "none: the left panels.",
    paper="with learning rate .01 SG-B's variance falls from 8e-3 to 2e-6 from τ = .1 to 10; GC has .55 to .65 of it.",
)
