"""R11: how long strata stay good."""

from __future__ import annotations

from functools import partial
from typing import Any

from .figures import COLORS, MARKERS, canvas, legend
from .problems import classifier, mlp, random_features
from .row import Check, Row, Variant, check
from .table import Table
from .trajectory import Trajectory

AGES = (0, 10, 100, 1000)
MADE = {"random features": (500, 2000), "MNIST": (500, 1500)}


def variants(scale: str) -> list[Variant]:
    small = scale == "small"
    size: dict[str, Any] = {"N": 1000, "hidden": 1000, "dim": 100, "teacher": 1000}
    limit = 3000 if small else 10_000
    methods: tuple[str, ...] = ("SG-B", "GC exact", "GC online")
    methods = methods if small else (*methods, "GC factored")
    features = Trajectory(
        problem=partial(random_features, **size), batch_size=10, lr=0.01, weight_decay=1e-4, steps=3000,
        methods=(*methods, "GC+SVRG"), stats_batch=500, **schedule("random features"),
    )  # fmt: skip
    digits = Trajectory(
        problem=partial(classifier, name="mnist", model=partial(mlp, 784, 128, 128, 10), limit=limit),
        batch_size=128, lr=0.02, momentum=0.5, steps=2500, methods=methods, stats_batch=500, **schedule("MNIST"),
    )  # fmt: skip
    return [
        Variant("staleness", "random features", {"problem": "random features"}, features, size),
        Variant("staleness", "MNIST", {"problem": "MNIST"}, digits, {"limit": limit}, needs=("mnist",)),
    ]


def schedule(problem: str) -> dict[str, Any]:
    made = MADE[problem]
    return {"snapshots": made, "measure": tuple(step + age for step in made for age in AGES[1:])}


def value(one: Table, made: int, age: int, column: str, estimator: str = "GC exact") -> float:
    return one.where(step=made + age, age=age, estimator=estimator).column(column)[0]


def decay(one: Table, made: int, age: int, column: str) -> float:
    return value(one, made, age, column) / value(one, made, 0, column)


def made_at(table: Table, made: int) -> Table:
    """Measurements with the strata of one snapshot."""
    return table.where(lambda r: r.get("age") is not None and r["step"] - made == r["age"] <= AGES[-1])


def checks(table: Table) -> list[Check]:
    out = []
    for problem in table.distinct("problem"):
        own = table.where(problem=problem)
        for made in MADE[problem]:
            for age in AGES[1:]:
                bar = 1.2 if (problem, age) == ("random features", 1000) else None
                values = own.per_seed(partial(decay, made=made, age=age, column="variance"))
                claim = f"{problem}, strata of step {made}: V({age} later) ÷ V(0), GC exact"
                out.append(check(claim, "–", values, below=bar))
            for age in (0, 1000):
                for name in ("GC exact", "GC online"):
                    values = own.per_seed(partial(value, made=made, age=age, column="ratio", estimator=name))
                    label = "strata that follow training" if name == "GC online" else f"strata of step {made}"
                    out.append(check(f"{problem}, step {made + age}: {name} ÷ SG-B, {label}", "–", values))
    return out


def draw(table: Table) -> Any:
    figure, axes = canvas(1, 2, "R11  Strata reused: their variance over SG-B's, by age")
    for problem, panel in zip(table.distinct("problem"), axes[0]):
        own = table.where(problem=problem)
        for made, style in zip(MADE[problem], ("-", "--")):
            for name in ("GC exact", "GC factored", "GC online", "GC+SVRG"):
                xs, middle, low, high = made_at(own, made).where(estimator=name).curve("age", "ratio")
                if not xs:
                    continue
                label = f"{name}, from step {made}"
                look = {"color": COLORS[name], "marker": MARKERS[name], "ms": 4, "ls": style, "label": label}
                panel.plot(xs, middle, **look)
                panel.fill_between(xs, low, high, color=COLORS[name], alpha=0.15, lw=0)
        panel.axhline(0.5, color="0.6", lw=1, ls=":")
        panel.text(0, 0.51, "SG-2B", fontsize=8.5, color="0.4")
        panel.set_xscale("symlog", linthresh=10)
        panel.set_xlim(-1, 1500)
        panel.set_xticks(AGES, [str(age) for age in AGES])
        panel.set(title=problem, xlabel="age of the strata, training steps", ylabel="gradient variance ÷ SG-B's")
        panel.set_ylim(0, None)
        panel.grid(True, alpha=0.25)
    legend(figure, axes[0])
    return figure


ROW = Row(
    id="R11",
    title="stale strata",
    shows="what strata are worth 10, 100 and 1000 steps after they were made, beside strata that follow training",
    variants=variants,
    checks=checks,
    draw=draw,
    sizes={
        "small": "random features at τ = 1 (R3: lr .01, B = K = 10), 3000 steps, strata made at 500 and 2000; the MLP "
        "784-128-128-10 on 3000 digits (R6: lr .02, momentum .5, B = K = 128), 2500 steps, strata made at 500, 1500; "
        "GC online is updated every 4th step",
        "paper": "the same with 10,000 digits, and GC factored",
    },
    paper="not reported; it renews strata every 1000 to 2000 steps.",
    remarks="V(later) ÷ V(0) also holds what training itself does to the variance, which falls on MNIST; the ratios to "
    "SG-B at the same step show the strata alone. GC online starts from random strata at step 0 and makes no pass over "
    "the data.",
)
