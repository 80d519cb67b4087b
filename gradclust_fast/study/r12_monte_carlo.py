"""R12: what Monte Carlo reads where the answer is known: SG-2B against SG-B, and the paper's estimators' bias."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..estimators import Uniform
from ..variance import compare_estimators
from .figures import canvas
from .problems import Problem, classifier, fetch, mlp
from .row import Check, Row, Variant, check
from .table import Table
from .trajectory import Run, Trajectory
from .unit import Unit

DRAWS = {"small": 4000, "paper": 20_000}
TRIALS = {"small": 200, "paper": 2000}
COUNTS = (5, 10, 50)


def measure(unit: Unit, plan: Trajectory, draws: int, trials: int) -> None:
    """Trains, then records Monte Carlo figures of SG-B and SG-2B, and the mean of many of the paper's estimates."""
    run = Run(plan, unit, resume=False)
    while run.step < plan.steps:
        run.train_step()
    problem, B = run.problem, plan.batch_size
    if unit.state is None:
        unit.progress(0.1, f"{draws} mini-batches of SG-B and SG-2B")
        report = compare_estimators(
            problem.model,
            problem.train,
            problem.loss,
            [Uniform(B, name="SG-B"), Uniform(2 * B, name="SG-2B")],
            monte_carlo=draws,
            seed=unit.seed,
            device=run.device,
        )
        for row in report:
            drawn = row.monte_carlo
            assert drawn is not None
            unit.record(
                what=row.name, T=drawn.draws, exact=row.variance, read=drawn.variance, error=drawn.variance_error,
                exact_nv=row.normalized_variance, read_nv=drawn.normalized_variance,
                error_nv=drawn.normalized_variance_error,
            )  # fmt: skip
        unit.checkpoint(lambda: {"drawn": True}, now=True)
    gradients = all_gradients(problem, run.device)
    for position, T in enumerate(COUNTS):
        unit.progress(0.5 + 0.15 * position, f"the paper's estimate with {T} batches")
        for what, rows in (("paper's estimate", gradients), ("of pure noise", gradients - gradients.mean(0))):
            rng = np.random.Generator(np.random.PCG64([unit.seed, T]))
            read = np.array([papers_estimate(rows, T, B, rng) for _ in range(trials)])
            mean = rows.mean(0)
            V = (rows - mean).square().mean(0) / B
            there = V + mean.square() > 0
            unit.record(
                what=what, T=T, exact=float(V.sum()), read=float(read[:, 0].mean()),
                error=float(read[:, 0].std(ddof=1)) / math.sqrt(trials),
                exact_nv=float((V / (V + mean.square()))[there].mean()), read_nv=float(read[:, 1].mean()),
                error_nv=float(read[:, 1].std(ddof=1)) / math.sqrt(trials),
            )  # fmt: skip


def all_gradients(problem: Problem, device: torch.device) -> Tensor:
    """[N, parameters] in float64, one example at a time."""
    parameters = list(problem.model.parameters())
    out = []
    for i in range(problem.num_examples):
        inputs, targets = fetch(problem.train, torch.tensor([i]), device)
        grads = torch.autograd.grad(problem.loss(problem.model(inputs), targets).sum(), parameters)
        out.append(torch.cat([grad.flatten() for grad in grads]).double().cpu())
    return torch.stack(out)


def papers_estimate(rows: Tensor, T: int, B: int, rng: np.random.Generator) -> tuple[float, float]:
    """(variance, normalized variance) as the authors compute them: the mean of T batches stands for the true one.

    Coordinates whose gradient was 0 in all T batches of the second kind are left out (theirs has a small constant).
    """
    index = torch.from_numpy(rng.integers(len(rows), size=(2, T, B)))
    first, second = rows[index].mean(2)  # [T, parameters] each
    deviation = (second - first.mean(0)).square().sum(0)
    square = second.square().sum(0)
    there = square > 0
    return float(deviation.sum()) / T, float((deviation[there] / square[there]).mean())


def variant(scale: str) -> Variant:
    plan = Trajectory(
        problem=partial(classifier, name="digits", model=partial(mlp, 64, 16, 10), tested=False),
        steps=300, batch_size=32, lr=0.05, momentum=0.5, snapshots=(),
    )  # fmt: skip
    run = partial(measure, plan=plan, draws=DRAWS[scale], trials=TRIALS[scale])
    details = {**plan.settings(), "draws": DRAWS[scale], "trials": TRIALS[scale]}
    return Variant("monte_carlo", "digits", {"data": "digits"}, run, details)


def checks(table: Table) -> list[Check]:
    error = table.per_seed(
        lambda one: ratio_error(*(value(one, w, c) for w in ("SG-2B", "SG-B") for c in ("read", "error")))
    )
    out = [
        check("SG-2B ÷ SG-B by Monte Carlo, with replacement", ".5", halving(table, "read"), above=0.485, below=0.515),
        check("its standard error, one seed", "–", error),
        check("SG-2B ÷ SG-B, exact", ".5", halving(table, "exact"), above=0.4999, below=0.5001),
    ]
    for name in ("SG-B", "SG-2B"):
        out.append(check(f"{name}: Monte Carlo − exact, in standard errors", "–", deviations(table, name), below=3.0))
    for T in COUNTS:
        own = table.where(T=T)
        high = own.per_seed(partial(quotient, what="paper's estimate"))
        out.append(check(f"the paper's estimate, T = {T}: variance read ÷ true", f"1 + 1/{T} = {1 + 1 / T:.3g}", high))
        noise = own.per_seed(partial(value, what="of pure noise", column="read_nv"))
        expected = f"{1 + 1 / (T - 2):.4g} if Gaussian"
        claim = f"the paper's estimate, T = {T}: normalized variance of pure noise (true: 1)"
        out.append(check(claim, expected, noise))
    return out


def value(one: Table, what: str, column: str) -> float:
    return one.where(what=what).column(column)[0]


def quotient(one: Table, what: str) -> float:
    return value(one, what, "read") / value(one, what, "exact")


def halving(table: Table, column: str) -> list[float]:
    return table.per_seed(lambda one: value(one, "SG-2B", column) / value(one, "SG-B", column))


def deviations(table: Table, name: str) -> list[float]:
    """|Monte Carlo − exact| in standard errors."""
    return table.per_seed(
        lambda one: abs(value(one, name, "read") - value(one, name, "exact")) / value(one, name, "error")
    )


def ratio_error(a: float, a_error: float, b: float, b_error: float) -> float:
    """Standard error of a/b for independent a and b."""
    return a / b * math.hypot(a_error / a, b_error / b)


def draw(table: Table) -> Any:
    figure, axes = canvas(1, 2, "R12  What Monte Carlo reads where the truth is known (digits, MLP 64-16-10, B = 32)")
    left, right = axes[0]
    for seed in table.seeds:
        own = table.where(seed=seed)
        values = [
            (own.where(what=w).column("read")[0], own.where(what=w).column("error")[0]) for w in ("SG-2B", "SG-B")
        ]
        (a, a_error), (b, b_error) = values
        bar = 2 * ratio_error(a, a_error, b, b_error)
        left.errorbar([seed], [a / b], yerr=[bar], fmt="o", color="#0072B2", capsize=4,
                      label="debiased Monte Carlo ± 2 standard errors" if seed == table.seeds[0] else None)  # fmt: skip
    left.axhline(0.5, color="#444444", lw=1, label="exact")
    left.axhspan(0.485, 0.515, color="#0072B2", alpha=0.12, lw=0, label="criterion, ± 3 %")
    left.set(xlabel="seed", ylabel="variance of SG-2B ÷ SG-B", xticks=table.seeds, ylim=(0.46, 0.54))
    left.set_title("doubling the batch halves the variance")
    for what, column, color, label in (
        ("paper's estimate", "variance", "#D55E00", "variance read ÷ true"),
        ("of pure noise", "nv", "#009E73", "normalized variance of pure noise (true: 1)"),
    ):
        rows = [
            {**r, "value": r["read"] / r["exact"] if column == "variance" else r["read_nv"]}
            for r in table.where(what=what)
        ]
        xs, middle, low, high = Table(rows).curve("T", "value")
        right.plot(xs, middle, "o-", color=color, label=label)
        right.fill_between(xs, low, high, color=color, alpha=0.2, lw=0)
    grid = np.geomspace(5, 50, 50)
    right.plot(grid, 1 + 1 / grid, ":", color="#D55E00", label="1 + 1/T")
    right.plot(grid, 1 + 1 / (grid - 2), ":", color="#009E73", label="1 + 1/(T − 2), of Gaussian noise")
    right.axhline(1, color="#444444", lw=1)
    right.set(xscale="log", xlabel="T, the paper's number of batches", ylabel="what its estimate reads")
    right.set_xticks(COUNTS, [str(T) for T in COUNTS])
    right.minorticks_off()
    right.set_title("the bias of the paper's Monte Carlo")
    for axis in (left, right):
        axis.grid(True, alpha=0.25)
        axis.legend(fontsize=9)
    return figure


ROW = Row(
    id="R12",
    title="Monte Carlo, where the answer is known",
    shows="doubling the batch halves the variance; and how far the paper's Monte Carlo is off",
    variants=lambda scale: [variant(scale)],
    checks=checks,
    draw=draw,
    sizes={
        scale: f"1500 digits, MLP 64-16-10, step 300, B = 32, {DRAWS[scale]} mini-batches of each; {TRIALS[scale]} of "
        f"the paper's estimates for T = 5, 10, 50"
        for scale in ("small", "paper")
    },
    remarks="The paper's estimate of the normalized variance is further off than Gaussian noise would have it: "
    "gradients have heavy tails, and its denominator is a mean of T squares. With T = 10, as in most of its "
    "runs, it reads pure noise as 1.4.",
    paper="it shows SG-2B at half of SG-B's variance throughout; its estimates use T = 10 or 50.",
)
