"""R5: random features with duplicated points."""

from __future__ import annotations

from typing import Any

from .figures import canvas, legend, lines
from .r03_random_features import TAUS, level, levels, ratios, variant
from .row import Check, Row, check
from .table import Table

SHARES = (0.5, 0.9)
BARS = {0.5: (0.30, 0.50), 0.9: (0.10, 0.25)}


def checks(table: Table) -> list[Check]:
    out = []
    for share in SHARES:
        for tau in TAUS:
            own, where = table.where(copies=share, tau=tau), f"{share:.0%} copies, τ = {tau:g}"
            exact, factored = BARS[share]
            paper = ".15" if (share, tau) == (0.9, 0.1) else "–"
            out.append(check(f"GC exact ÷ SG-B, {where}", "–", ratios(own, "GC exact"), below=exact))
            out.append(check(f"GC factored ÷ SG-B, {where}", paper, ratios(own, "GC factored"), below=factored))
    for tau in (1, 3, 10):
        own = table.where(copies=0.9, tau=tau)
        over = own.per_seed(lambda one: level(one, "GC exact", "variance") / level(one, "SVRG", "variance"))
        out.append(check(f"GC exact ÷ SVRG, 90 % copies, τ = {tau}", "–", over, below=1.0, strict=True))
    own = table.where(copies=0.9, tau=0.1)
    out.append(check("SG-B per coordinate, 90 % copies, τ = .1", "3e-4", levels(own, "SG-B")))
    out.append(check("GC factored per coordinate, 90 % copies, τ = .1", "4.5e-5", levels(own, "GC factored")))
    return out


def draw(table: Table) -> Any:
    figure, axes = canvas(2, 2, "R5  Random features, 5 points copied, learning rate .01, B = K = 10")
    for share, column in zip(SHARES, range(2)):
        rows = [
            {"seed": seed, "tau": tau, "estimator": name, "mean": level(own, name),
             "ratio": level(own, name, "variance") / level(own, "SG-B", "variance")}
            for seed in table.seeds for tau in TAUS for name in table.distinct("estimator")
            if (own := table.where(seed=seed, tau=tau, copies=share)).records
        ]  # fmt: skip
        above, below, summary = axes[0][column], axes[1][column], Table(rows)
        title = f"copies of 5 points are {share:.0%} of the data"
        lines(above, summary, "mean", x="tau", log_x=True, log_y=True, xlabel="τ = hidden ÷ N", title=title)
        above.set_ylabel("gradient variance per coordinate\nmean over the last 70 %")
        lines(below, summary, "ratio", x="tau", log_x=True, log_y=True, xlabel="τ = hidden ÷ N")
        for bar, color in zip(BARS[share], ("#009E73", "#E69F00")):
            below.axhline(bar, color=color, lw=0.8, ls="--")
        below.set_title("dashed: the criteria for GC exact and GC factored", fontsize=9.5)
    legend(figure, axes[0])
    return figure


SIZE = "as R3 with lr .01; the last 50 % or 90 % of the N examples are copies of the first 5"
ROW = Row(
    id="R5",
    title="random features, duplicates",
    shows="copies cost a plain batch twice and a stratified one nothing",
    variants=lambda scale: [variant(scale, tau, 0.01, share) for share in SHARES for tau in TAUS],
    checks=checks,
    draw=draw,
    sizes={"small": SIZE, "paper": SIZE},
    remarks="With 90 % copies, τ = 10 leaves 10 different examples for 10 strata: the variance is then 0 for GC exact.",
    paper="with 90 % copies and τ = .1 SG-B has 3e-4, GC 4.5e-5.",
)
