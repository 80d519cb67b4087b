"""Figures that need no caption: labelled lines with bands over seeds, log axes where the values span decades."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from .table import Table

COLORS = {
    "SG-B": "#444444",
    "SG-2B": "#0072B2",
    "SVRG": "#D55E00",
    "GC factored": "#E69F00",
    "GC exact": "#009E73",
    "GC online": "#56B4E9",
    "GC Neyman": "#CC79A7",
    "GC+SVRG": "#8B5A2B",
    "GC guarded": "#7A3E9D",
}
"""Distinct without colour vision, together with the markers."""

MARKERS = dict(zip(COLORS, "osDv^Xp*P"))

LABELS = {
    "SG-B": "SG-B: plain batch of B",
    "SG-2B": "SG-2B: twice the batch",
    "SVRG": "SVRG (two gradients an example)",
    "GC factored": "GC factored: the paper's rule",
    "GC exact": "GC exact: exact moves",
    "GC online": "GC online: strata kept up to date",
    "GC Neyman": "GC exact, K = B/2, Neyman",
    "GC+SVRG": "GC exact with SVRG",
    "GC guarded": "GC exact, renewed by its guard",
}

QUANTITIES = {
    "variance": "gradient variance  E‖ĝ − ḡ‖²",
    "variance_per_coordinate": "gradient variance per coordinate",
    "normalized_variance": "normalized variance  V[ĝ] / E[ĝ²]",
    "ratio": "gradient variance ÷ SG-B's",
    "train_loss": "training loss",
    "accuracy": "accuracy",
}


def canvas(rows: int, columns: int, title: str, width: float = 5.4, height: float = 4.2) -> tuple[Any, list[list[Any]]]:
    """(figure, axes[row][column]); no pyplot: nothing global, no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    figure.suptitle(title, fontsize=13)
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def lines(
    axes: Any,
    table: Table,
    y: str,
    *,
    x: str = "step",
    by: str = "estimator",
    log_y: bool = False,
    log_x: bool = False,
    xlabel: str = "training step",
    title: str = "",
) -> None:
    """Mean over seeds and the band from the lowest to the highest, one line for every value of ``by``.

    At a snapshot there are two values, with the old strata and with the new: the line falls there.
    """
    drawn: list[float] = []
    for key in table.distinct(by):
        own = table.where(**{by: key})
        color, marker = COLORS.get(key), MARKERS.get(key, "o")
        xs, middle, low, high = _curve(own, x, y)
        style = {"color": color, "lw": 1.6, "marker": marker, "ms": 4, "label": LABELS.get(key, f"{by} {key}")}
        line = axes.plot(xs, middle, **style)[0]
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, lw=0)
        drawn += [v for v in middle if v > 0 and math.isfinite(v)]
    axes.set(xlabel=xlabel, ylabel=QUANTITIES.get(y, y), title=title)
    if log_x:
        axes.set_xscale("log")
    if log_y and drawn:
        # SVRG is 0 at its own snapshot: its line leaves the panel there instead of stretching it
        floor = min((v for v in drawn if v > 1e-9 * max(drawn)), default=min(drawn))
        axes.set_yscale("log")
        axes.set_ylim(floor / 2, 2 * max(drawn))
    axes.grid(True, which="major", alpha=0.25)


def _curve(table: Table, x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
    if x != "step" or "age" not in (table.records[0] if table.records else {}):
        return table.curve(x, y)
    stale = table.where(lambda r: bool(r.get("age"))).curve(x, y)
    fresh = table.where(lambda r: not r.get("age")).curve(x, y)
    points = [(step, 0, *rest) for step, *rest in zip(*stale)] + [(step, 1, *rest) for step, *rest in zip(*fresh)]
    points.sort()
    return tuple([point[i] for point in points] for i in (0, 2, 3, 4))  # type: ignore[return-value]


def legend(figure: Any, axes: Sequence[Any], columns: int = 3) -> None:
    """One legend below all panels, without repetitions."""
    entries: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9.5)


def trajectory_figure(table: Table, title: str, *, by: str | None = None, log_y: bool = True) -> Any:
    """Variance and normalized variance against the step; one pair of panels for every value of ``by``."""
    keys = [None] if by is None else table.distinct(by)
    figure, axes = canvas(len(keys), 2, title)
    for key, pair in zip(keys, axes):
        own = table if key is None else table.where(**{str(by): key})
        name = "" if key is None else f"{key}" if isinstance(key, str) else f"{by} = {key}"
        lines(pair[0], own, "variance_per_coordinate", log_y=log_y, title=name)
        lines(pair[1], own, "normalized_variance", title=name)
        pair[1].set_ylim(0, None)
    legend(figure, [each for pair in axes for each in pair])
    return figure


def png(figure: Any) -> bytes:
    image = io.BytesIO()
    # no software version or date inside: the same numbers give the same file
    figure.savefig(image, format="png", dpi=100, metadata={"Software": None})
    return image.getvalue()
