"""``gradclust demo``: gradient variance of four estimators along one training run, live, then as CSV and figure."""

from __future__ import annotations

import copy
import csv
import io
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from . import data as datasets
from ._files import write_atomically
from .clustering import GradientClustering
from .estimators import SVRG, Stratified, Uniform
from .sketching import Sketch
from .variance import compare_estimators

MEASUREMENTS = 15
REFRESHES = 5
COLORS = {"SG-B": "#444444", "SG-2B": "#0072B2", "SVRG": "#D55E00", "GC": "#009E73"}  # distinct without colour vision
COLUMNS = (
    "step", "age", "estimator", "batch_size", "gradients_per_step", "variance", "normalized_variance",
    "ratio_to_SG-B", "train_loss", "test_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, and how."""

    title: str
    train: TensorDataset
    test: TensorDataset
    batch_size: int
    learning_rate: float
    momentum: float
    steps: int
    seed: int

    @property
    def measure_every(self) -> int:
        return max(1, self.steps // MEASUREMENTS)

    @property
    def refresh_every(self) -> int:
        return self.measure_every * (MEASUREMENTS // REFRESHES)

    def describe(self, name: str) -> str:
        B = self.batch_size
        return {
            "SG-B": f"SGD, batch {B}",
            "SG-2B": f"SGD, batch {2 * B}",
            "SVRG": f"SVRG, batch {B}",
            "GC": f"Gradient Clustering, batch {B}",
        }[name]


@dataclass(frozen=True)
class Point:
    """One estimator at one moment of the run. ``age``: steps since its strata or snapshot were made."""

    step: int
    age: int
    estimator: str
    batch_size: int
    gradients_per_step: int
    variance: float
    normalized_variance: float
    ratio: float
    train_loss: float
    test_accuracy: float


def network(image: torch.Size, classes: int = 10) -> nn.Sequential:
    """Two convolutions and a linear layer, for images [C, H, W]."""
    channels, height, width = image
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * (height // 4) * (width // 4), classes),
    )  # fmt: skip


def losses(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")  # [B]


def setting(data: str | os.PathLike | None, steps: int, seed: int, limit: int) -> Setting:
    if data is None:
        train, test = datasets.digits("train", limit=limit), datasets.digits("test")
        return Setting(f"{len(train):,} of scikit-learn's digits", train, test, 64, 0.05, 0.9, steps, seed)
    train = datasets.mnist("train", data=data, limit=limit)
    test = datasets.mnist("test", data=data, limit=2000)
    return Setting(f"{len(train):,} MNIST digits", train, test, 128, 0.02, 0.9, steps, seed)


class Run:
    """One trajectory of plain SGD, measured along the way."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        images, self.labels = setting.train.tensors
        self.images = images
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            self.model = network(images.shape[1:])
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), setting.learning_rate, setting.momentum)
        self.order = torch.empty(0, dtype=torch.int64)
        self.step = self.snapshot_step = 0
        self.train_loss = math.nan
        self.points: list[Point] = []

    def train_step(self) -> None:
        B = self.setting.batch_size
        if len(self.order) < B:
            self.order = torch.randperm(len(self.images), generator=self.generator)
        index, self.order = self.order[:B], self.order[B:]
        self.optimizer.zero_grad()
        loss = losses(self.model(self.images[index]), self.labels[index]).mean()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        # a running mean: single batches of a few dozen examples jump about
        now = float(loss.detach())
        self.train_loss = now if math.isnan(self.train_loss) else 0.95 * self.train_loss + 0.05 * now
        if not math.isfinite(now):
            raise SystemExit(f"the loss is not finite at step {self.step}: training diverged; try another --seed")

    def refresh(self) -> None:
        """New strata and a new SVRG snapshot from the model as it is now."""
        B = self.setting.batch_size
        clustering = GradientClustering(
            self.model,
            num_clusters=B,
            method="exact",
            sketch=Sketch(dim=256, seed=self.setting.seed),
            seed=self.setting.seed,
        )
        self.strata = clustering.fit(self.setting.train, losses, batch_size=512, progress=False)
        self.snapshot = copy.deepcopy(self.model)
        self.snapshot_step = self.step

    def measure(self) -> list[Point]:
        B = self.setting.batch_size
        estimators = {
            "SG-B": Uniform(B, name="SG-B"),
            "SG-2B": Uniform(2 * B, name="SG-2B"),
            "SVRG": SVRG(B, self.snapshot, name="SVRG"),
            "GC": Stratified(self.strata, B, name="GC"),
        }
        report = compare_estimators(self.model, self.setting.train, losses, list(estimators.values()), batch_size=512)
        with torch.no_grad():
            images, labels = self.setting.test.tensors
            accuracy = float((self.model(images).argmax(1) == labels).float().mean())
        base = report["SG-B"].variance
        new = [
            Point(
                self.step, self.step - self.snapshot_step, name, estimator.batch_size, estimator.gradients_per_step,
                report[name].variance, report[name].normalized_variance,
                report[name].variance / base if base > 0 else math.nan, self.train_loss, accuracy,
            )
            for name, estimator in estimators.items()
        ]  # fmt: skip
        self.points += new
        return new

    def events(self) -> Iterator[bool]:
        """Trains to the end; yields True after a measurement, False now and then between."""
        while True:
            due = self.step % self.setting.measure_every == 0 or self.step == self.setting.steps
            renew = self.step % self.setting.refresh_every == 0 and self.step < self.setting.steps
            if due and self.step > 0:
                self.measure()  # with the strata and snapshot as training would have used them up to here
                yield True
            if renew:
                self.refresh()
                self.measure()
                yield True
            if self.step == self.setting.steps:
                return
            self.train_step()
            if self.step % 10 == 0:
                yield False


def used(points: list[Point], name: str) -> list[Point]:
    """The measurements with strata and snapshot of some age, as training meets them; all if there are no such."""
    mine = [point for point in points if point.estimator == name]
    return [point for point in mine if point.age > 0] or mine


def mean_ratio(points: list[Point], name: str) -> float:
    """Geometric mean over the run of the estimator's variance over SG-B's."""
    ratios = [point.ratio for point in used(points, name)]
    if not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        return sum(ratios) / len(ratios)
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def conclusion(points: list[Point], setting: Setting) -> str:
    """One plain sentence that says what was found, whatever it is."""
    gc, double, svrg = (mean_ratio(points, name) for name in ("GC", "SG-2B", "SVRG"))
    ratios = [point.ratio for point in used(points, "GC")]
    oldest = max(point.age for point in points)
    if gc < double:
        verdict = f"less than the {double:.2f} that doubling the batch gives"
    elif gc < 1:
        verdict = f"not as good as the {double:.2f} that doubling the batch gives"
    else:
        verdict = f"so it did not help here (doubling the batch gives {double:.2f})"
    return (
        f"Gradient Clustering's batches of {setting.batch_size} had {gc:.2f} times the gradient variance of plain "
        f"SGD's, on average over this run (from {min(ratios):.2f} to {max(ratios):.2f}, with strata up to {oldest} "
        f"steps old), {verdict}; SVRG, at two gradients per example, had {svrg:.2f} times."
    )


def as_csv(points: list[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for p in points:
        numbers = (p.variance, p.normalized_variance, p.ratio, p.train_loss, p.test_accuracy)
        writer.writerow(
            [p.step, p.age, p.estimator, p.batch_size, p.gradients_per_step, *(f"{each:.6g}" for each in numbers)]
        )
    return text.getvalue()


def figure(points: list[Point], setting: Setting) -> bytes:
    """Two panels against training steps: gradient variance, and normalized variance."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    from matplotlib.ticker import NullFormatter

    picture = Figure(figsize=(12, 5.2), layout="constrained")
    picture.suptitle(f"Gradient variance along one training run: small CNN on {setting.title}", fontsize=14)
    panels = {
        "variance": "gradient variance  E‖ĝ − ḡ‖²",
        "normalized_variance": "normalized variance  V[ĝ] / E[ĝ²]",
    }
    for axes, (field, title) in zip(picture.subplots(1, len(panels)), panels.items()):
        logarithmic = field == "variance"
        # SVRG's variance is 0 at its own snapshot, which no log axis can show: its line leaves the panel there
        shown = [getattr(p, field) for p in points if p.estimator != "SVRG" or p.age > 0]
        shown = [value for value in shown if value > 0 and math.isfinite(value)]
        low, high = (min(shown) / 2, max(shown) * 2) if shown else (1e-3, 1.0)
        for name, color in COLORS.items():
            mine = [p for p in points if p.estimator == name]
            values = [max(getattr(p, field), low / 1e3 if logarithmic else 0.0) for p in mine]
            axes.plot([p.step for p in mine], values, color=color, marker="o", ms=4, label=setting.describe(name))
        for step in sorted({p.step for p in points if p.age == 0}):
            label = "new strata and SVRG snapshot" if step == 0 else None
            axes.axvline(step, color="#999999", lw=0.8, ls=":", zorder=0, label=label)
        axes.set(title=title, xlabel="training steps")
        if logarithmic:
            axes.set(yscale="log", ylim=(low, high))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set(ylim=(0, 1.05))
        axes.grid(True, which="major", alpha=0.25)
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=10)
    image = io.BytesIO()
    picture.savefig(image, format="png", dpi=120)
    return image.getvalue()


def sparkline(values: list[float]) -> str:
    """The history of a ratio, on a log scale."""
    logs = [math.log(value) if value > 0 else None for value in values if math.isfinite(value)]
    known = [value for value in logs if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if value is None else "▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in logs)


def live_table(run: Run) -> Any:
    from rich.table import Table

    setting = run.setting
    last = {point.estimator: point for point in run.points}
    accuracy = f"{100 * run.points[-1].test_accuracy:.1f} %" if run.points else "–"
    table = Table(
        title=f"step {run.step} of {setting.steps}   training loss {run.train_loss:.3f}   test accuracy {accuracy}",
        caption=(
            f"Small CNN on {setting.title}, B = {setting.batch_size}.\n"
            f"Strata and snapshot are {run.step - run.snapshot_step} steps old."
        ),
    )
    table.add_column("estimator", no_wrap=True)
    for column in ("variance", "normalized", "÷ SG-B"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("÷ SG-B so far", no_wrap=True)
    for name in COLORS:
        if name in last:
            point = last[name]
            history = [each.ratio for each in run.points if each.estimator == name]
            numbers = (f"{point.variance:.2e}", f"{point.normalized_variance:.3f}", f"{point.ratio:.2f}")
            table.add_row(name, *numbers, sparkline(history) if name != "SG-B" else "")
    return table


@contextmanager
def display(run: Run) -> Iterator[Any]:
    """Yields ``show(measured)``: a live table on a terminal, else one line a measurement."""
    if not sys.stdout.isatty():
        print(
            f"{'step':>6} {'age':>5} {'accuracy':>9}" + "".join(f"{name + ' var':>12}{'ratio':>7}" for name in COLORS)
        )

        def lines(measured: bool) -> None:
            if measured:
                p = run.points[-1]
                row = {each.estimator: each for each in run.points[-len(COLORS) :]}
                numbers = "".join(f"{row[name].variance:12.3g}{row[name].ratio:7.2f}" for name in COLORS)
                print(f"{p.step:6} {p.age:5} {100 * p.test_accuracy:8.1f}%{numbers}", flush=True)

        yield lines
        return
    from rich.live import Live

    with Live(live_table(run), auto_refresh=False) as live:
        yield lambda measured: live.update(live_table(run), refresh=True)


def demo(
    *, data: str | os.PathLike | None = None, steps: int = 600, out: str | os.PathLike = "demo-out", seed: int = 0,
    limit: int = 10000,
) -> list[Point]:  # fmt: skip
    """Runs the demo: trains, measures, shows, and writes ``variance.csv`` and ``variance.png`` to ``out``.

    Args:
        data: directory with MNIST's files; None takes scikit-learn's digits.
        steps: training steps.
        seed: of the network, the batches and the clustering.
        limit: use the first so many training examples.

    Raises:
        ModuleNotFoundError, FileNotFoundError: a package or file that is missing, with how to get it.
    """
    for package in ("rich", "matplotlib"):
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"the demo needs {package}, which is not installed: pip install 'gradclust_fast[demo]'"
            ) from error
    begin = time.monotonic()
    run = Run(setting(data, steps, seed, limit))
    folder = Path(out)
    table = folder / "variance.csv"
    with display(run) as show:
        for measured in run.events():
            if measured:
                write_atomically(table, as_csv(run.points))
            show(measured)
    picture = write_atomically(folder / "variance.png", figure(run.points, run.setting))
    print(f"\n{table} and {picture} were written after {time.monotonic() - begin:.0f} s.\n")
    print(conclusion(run.points, run.setting))
    return run.points
