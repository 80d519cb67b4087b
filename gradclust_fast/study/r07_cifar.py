"""R7: CIFAR-10, variance rises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .figures import canvas, legend, lines
from .images import clean
from .row import Check, Row, check
from .table import Table, mean


def ratio(one: Table, estimator: str, step: int, fresh: bool) -> float:
    used = one.where(lambda r: (r["age"] == 0) == fresh, estimator=estimator, step=step)
    return used.column("ratio")[0]


def against(one: Table, estimator: str, reference: str) -> list[float]:
    """Variance over another estimator's, at every measurement after the start."""
    out = []
    for r in one.where(lambda r: r["step"] > 0, estimator=estimator):
        other = one.where(estimator=reference, step=r["step"], age=r["age"])
        out.append(r["variance"] / other.column("variance")[0])
    return out


def parts(one: Table, column: str) -> tuple[list[float], list[float]]:
    """SG-B's values before and after the drop, the untrained network left out."""
    plain = one.where(lambda r: r["step"] > 0, estimator="SG-B")
    drop = plain.records[0]["drop"]
    return plain.where(lambda r: r["step"] <= drop).column(column), plain.where(lambda r: r["step"] > drop).column(
        column
    )


def growth(one: Table) -> float:
    before, after = parts(one, "variance")
    return after[-1] / before[0]


def normalized_growth(one: Table) -> float:
    before, after = parts(one, "normalized_variance")
    return mean(after) / mean(before)


def snapshots(one: Table, estimator: str = "GC guarded") -> float:
    """How many the guard asked for."""
    return max(one.column("guard_snapshots"))


def aged(table: Table, fresh: bool) -> Table:
    """Measurements right after a snapshot, or the others."""
    return table.where(lambda r: (r["age"] == 0) == fresh)


def picked(one: Table, pick: Callable[[list[float]], float]) -> float:
    return pick(one.column("ratio"))


def guarded_checks(table: Table, name: str = "") -> list[Check]:
    """What the guard did, for R7 and R9."""
    worst = table.per_seed(lambda own: max(against(own, "GC guarded", "SG-B")))
    average = table.per_seed(lambda own: mean(against(own, "GC guarded", "SG-B")))
    plain = table.per_seed(lambda own: mean(against(own, "GC exact", "SG-B")))
    return [
        check(f"GC guarded ÷ SG-B, the worst measurement{name}", "–", worst, below=1.0, strict=True),
        check(f"GC guarded ÷ SG-B, mean{name}", "–", average),
        check(f"GC exact ÷ SG-B, mean, snapshots at fixed steps{name}", "–", plain),
        check(f"snapshots that the guard took{name}", "–", table.per_seed(snapshots)),
    ]


def checks(table: Table) -> list[Check]:
    def at(i: int) -> list[float]:
        plain = table.where(lambda r: r["step"] > 0, estimator="SG-B")
        return plain.per_seed(lambda own: own.column("variance_per_coordinate")[i])

    out = [
        check("SG-B per coordinate, first measurement after the start", "3.5e-5", at(0)),
        check("SG-B per coordinate, end", "1.05e-4", at(-1)),
        check("V(end) ÷ V(first), SG-B", "3", table.per_seed(growth), above=1.5),
        check(
            "normalized variance of SG-B, mean after the drop ÷ mean before",
            ".97 ÷ .62", table.per_seed(normalized_growth), above=1.0, strict=True,
        ),
        check(
            "GC exact ÷ SG-2B, the largest of all measurements",
            "–", table.per_seed(lambda own: max(against(own, "GC exact", "SG-2B"))), below=1.0, strict=True,
        ),
    ]  # fmt: skip
    for fresh, label in ((True, "right after a snapshot"), (False, "before the next")):
        exact = aged(table.where(lambda r: r["step"] > 0, estimator="GC exact"), fresh)
        for name, pick in (("least", min), ("most", max)):
            values = exact.per_seed(partial(picked, pick=pick))
            out.append(check(f"GC exact ÷ SG-B {label}, {name}", "–", values))
    for name in (n for n in ("SVRG", "GC factored", "GC+SVRG") if n in table.distinct("estimator")):
        values = table.where(lambda r: bool(r["age"]), estimator=name).per_seed(lambda own: mean(own.column("ratio")))
        out.append(check(f"{name} ÷ SG-B, mean before the next snapshot", "–", values))
    return out + guarded_checks(table)


def shown(table: Table) -> Table:
    """What a figure shows: the trained network, and SVRG not at its own snapshot, where it has no variance."""
    return table.where(lambda r: r["step"] > 0 and (r.get("estimator") not in ("SVRG", "GC+SVRG") or bool(r["age"])))


def mark_drop(axes: Any, table: Table) -> None:
    drop = table.column("drop")[0]
    axes.axvline(drop, color="0.5", lw=1, ls="--")
    axes.text(drop, axes.get_ylim()[1], " learning rate ÷ 10", va="top", fontsize=8.5, color="0.3")


def draw(table: Table) -> Any:
    figure, axes = canvas(1, 3, "R7  CIFAR-10, ResNet8 without norm layers, learning rate .02 then .002, B = K = 128")
    trained = shown(table)
    lines(axes[0][0], trained, "variance_per_coordinate", log_y=True)
    lines(axes[0][1], trained, "normalized_variance")
    axes[0][1].set_ylim(0, 1.05)
    lines(axes[0][2], trained, "ratio", log_y=True)
    for each in axes[0]:
        mark_drop(each, table)
    legend(figure, axes[0])
    return figure


ROW = Row(
    id="R7",
    title="CIFAR-10, ResNet8",
    shows="variance rises as training goes on, most after the learning rate's drop, and strata stay useful",
    variants=lambda scale: [clean(scale)],
    checks=checks,
    draw=draw,
    sizes={
        "small": "the first 1500 training images, averaged to 16×16; ResNet8 of 8, 16, 32 channels without norm layers "
        "(18,954 parameters); 600 steps, lr .02, .002 from step 400, momentum .9, B = K = 128, snapshot every 150; "
        "SVRG is measured at steps 300 and 600, GC factored (20 passes a snapshot) at --scale paper only",
        "paper": "5000 images of 32×32, ResNet8 of 16, 32, 64 channels; 2400 steps, lr .02, .002 from step 1600, "
        "momentum .9, B = K = 128, snapshot every 500",
    },
    paper="SG-B's variance per coordinate rises from 3.5e-5 to 1.05e-4, normalized variance from .62 to .97.",
    remarks="GC guarded is GC exact behind StratifiedBatchSampler(refresh='auto'), fed with one recorded batch of its "
    "own every 5 steps along the same trajectory. It asks for new strata above half of SG-B's variance, so it takes "
    "fewer snapshots than the fixed schedule and stays noisier than that.",
    model=True,
)
