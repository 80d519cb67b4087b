"""The benchmark figures of the guide, drawn from the committed results: ratios, roofline, scaling."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIN, LOSE, OTHER = "#1b7837", "#b2182b", "#777777"
MARKERS = ("o", "s", "^")


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date and no version in the file: the same results give the same bytes
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def draw_ratios(rows: Sequence[dict[str, str]], path: Path, yardsticks: Collection[str] = ()) -> None:
    """Ours ÷ fastest baseline of every case, with quartiles; left of 1 we win. ``rows`` as in kernels.csv.

    A baseline among ``yardsticks`` does other work and only gives the time its scale: it is drawn in grey.
    """
    rows = sorted(rows, key=lambda row: float(row["ratio"]), reverse=True)
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(rows) + 1.2))
    for y, row in enumerate(rows):
        ratio, low, high = float(row["ratio"]), float(row["ratio_low"]), float(row["ratio_high"])
        colour = OTHER if row["baseline"] in yardsticks else WIN if ratio <= 1 else LOSE
        axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.5)
        axes.plot(ratio, y, "o", color=colour, markersize=4)
    names = [f"{row['op']}  {row['label']}  vs {row['baseline']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xscale("log")
    ticks = [
        tick for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5) if tick <= 1.1 * max(float(r["ratio_high"]) for r in rows)
    ]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time of our kernel ÷ time of the fastest baseline (median, quartiles; log scale)")
    axes.set_title("Left of 1 our kernel is faster; grey: beside other work, for scale", fontsize=10)
    save(figure, path)


def draw_roofline(summary: dict[str, Any], path: Path) -> None:
    """Every op's first case as a point under the measured ceilings. ``summary`` is kernels.json."""
    ceilings = summary["ceilings"]
    bandwidth = max(ceilings["copy"], ceilings["read"])  # GB/s
    peak = max(ceilings["gemm float32"], ceilings.get("FMA peak", 0.0))  # GFLOP/s
    figure, axes = plt.subplots(figsize=(8, 5.2))
    points = {}
    for row in summary["rows"]:
        if row.get("flops") and row.get("bytes"):
            points.setdefault(row["op"], (row["flops"] / row["bytes"], row["flops"] / row["ours"]["median"] / 1e9))
    left = min(x for x, _ in points.values()) / 2
    right = max(max(x for x, _ in points.values()), peak / bandwidth) * 2
    axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color="black", linewidth=1.5)
    for index, (op, (x, y)) in enumerate(sorted(points.items(), key=lambda item: item[1])):
        axes.plot(
            x, y, MARKERS[index // 10 % len(MARKERS)], color=f"C{index % 10}", markersize=8, linestyle="", label=op
        )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, title="op (by intensity)", title_fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs executed per byte that must move")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title(
        f"Roofline: measured bandwidth {bandwidth:.0f} GB/s, measured multiply-add peak {peak:.0f} GFLOP/s", fontsize=10
    )
    axes.grid(alpha=0.3, which="both")
    save(figure, path)


def draw_scaling(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel a variable, one line a sweep, its exponent in the legend. ``rows`` of scaling.json."""
    variables = list(dict.fromkeys(row["variable"] for row in rows))
    columns = 3
    lines = -(-len(variables) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(12, 4.3 * lines), squeeze=False)
    for axes, variable in zip(grid.flat, variables):
        for row in (row for row in rows if row["variable"] == variable):
            times = [1e3 * timing["median"] for timing in row["timings"]]
            low, high = ([1e3 * timing[key] for timing in row["timings"]] for key in ("low", "high"))
            label = f"{row['op']} ({row['fixed']}): {row['exponent']:.2f}"
            (line,) = axes.plot(row["values"], times, "o-", markersize=4, label=label)
            axes.fill_between(row["values"], low, high, alpha=0.2, color=line.get_color())
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(variable)
        axes.set_ylabel("ms")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.17), frameon=False)
        axes.set_title(f"time against {variable} (below: exponents)", fontsize=9)
    for axes in list(grid.flat)[len(variables) :]:
        axes.remove()
    figure.tight_layout()
    save(figure, path)


def draw_all(
    folder: Path, best: Sequence[dict[str, str]], images: Path, yardsticks: Collection[str]
) -> list[tuple[str, str]]:
    """Draws what ``folder`` has results for; returns (file name, what it shows) of each figure."""
    drawn = [("bench-ratios.png", "Time of every kernel divided by the fastest baseline's")]
    draw_ratios(best, images / drawn[0][0], yardsticks)
    draw_roofline(json.loads((folder / "kernels.json").read_text()), images / "bench-roofline.png")
    drawn.append(("bench-roofline.png", "Every op's first case under the measured ceilings"))
    scaling = folder / "scaling.json"
    if scaling.is_file():
        draw_scaling(json.loads(scaling.read_text())["rows"], images / "bench-scaling.png")
        drawn.append(
            ("bench-scaling.png", "How time grows with sizes and falls with threads (`python -m bench.scaling`)")
        )
    return drawn
