"""Figures, the summary table and the page, from the rows' CSV files."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from .._files import write_atomically
from .figures import png
from .row import SEEDS_NEEDED, Check, Row
from .table import Table


def load(row: Row, out: Path) -> tuple[Table, dict[str, Any]] | None:
    """The row's table and what its JSON file says about the run, or None when it has not been run."""
    path = out / f"{row.stem}.csv"
    if not path.is_file():
        return None
    about = path.with_suffix(".json")
    return Table.read(path), json.loads(about.read_text()) if about.is_file() else {}


def evaluate(row: Row, table: Table) -> list[Check]:
    return row.checks(table) if len(table) else []


def verdict(checks: list[Check], about: dict[str, Any]) -> str:
    """One word or two for a row."""
    if not checks:
        return "not run"
    decided = [c.passed for c in checks if c.passed is not None]
    failed, undecided = decided.count(False), sum(c.passed is None and bool(c.bar) for c in checks)
    words = [f"{failed} of {len(decided)} fail" if failed else "pass" if decided else "no criterion"]
    if undecided:
        words.append(f"{undecided} undecided")
    missing = about.get("expected", 0) - len(about.get("units", []))
    if missing > 0:
        words.append(f"{missing} units not run yet")
    if any(c.passed is not None and c.seeds is not None and c.seeds < SEEDS_NEEDED for c in checks):
        words.append(f"fewer than {SEEDS_NEEDED} seeds")
    return "; ".join(words)


def text_of(row: Row, checks: list[Check], about: dict[str, Any]) -> str:
    """What the runner prints of a row."""
    head = f"{row.id}  {row.title}: {verdict(checks, about)}  ({about.get('seconds', 0):.0f} s of processor time)"
    table = [["", "claim", "paper", "ours", "criterion"]]
    table += [[c.verdict, c.claim, c.paper, c.ours, c.bar] for c in checks]
    widths = [max(map(len, column)) for column in zip(*table)]
    body = ["  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table]
    diverged = [u for u in about.get("units", []) if u["status"] == "diverged"]
    notes = [f"  diverged, left out: {u['variant']}, seed {u['seed']}: {u['message']}" for u in diverged]
    return "\n".join([head, *body, *notes])


def write_figure(row: Row, table: Table, out: Path) -> Path | None:
    """Draws ``rNN.png``; None without matplotlib or records."""
    if not len(table):
        return None
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        print(
            f"{row.stem}.png is not drawn: that needs matplotlib (pip install 'gradclust_fast[study]')", file=sys.stderr
        )
        return None
    return write_atomically(out / f"{row.stem}.png", png(row.draw(table)))


def write_report(rows: dict[str, Row], out: Path, page: Path) -> list[str]:
    """Figures, ``summary.csv`` and the page; returns the texts of the rows that have been run."""
    texts, lines, parts = [], [], []
    for row in rows.values():
        loaded = load(row, out)
        table, about = loaded if loaded is not None else (Table([]), {})
        checks = evaluate(row, table)
        if loaded is not None:
            texts.append(text_of(row, checks, about))
            write_figure(row, table, out)
        lines += [[row.id, c.claim, c.paper, c.ours, c.bar, c.verdict] for c in checks]
        parts.append((row, checks, {**about, "cross_check": cross_check(table)} if about else about))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "claim", "paper", "ours", "criterion", "verdict"])
    writer.writerows(lines)
    write_atomically(out / "summary.csv", text.getvalue())
    write_atomically(page, page_of(parts, os.path.relpath(out, page.parent)))
    return texts


def page_of(parts: list[tuple[Row, list[Check], dict[str, Any]]], folder: str) -> str:
    """The page as Markdown. ``folder``: of the figures and CSVs, relative to the page."""
    folder = folder.replace(os.sep, "/")
    out = [HEAD.strip(), ""]
    out += ["| row | what | verdict | processor time |", "| --- | --- | --- | --- |"]
    for row, checks, about in parts:
        seconds = _duration(about["seconds"]) if about else "–"
        out.append(f"| [{row.id}](#{row.id.lower()}) | {row.title} | {verdict(checks, about)} | {seconds} |")
    total = sum(about.get("seconds", 0) for _, _, about in parts)
    out += [
        "",
        f"All together: {_duration(total)} of processor time in single threads (R4's units, which are R3's, twice).",
        "",
        LIMITS.strip(),
        "",
    ]
    for row, checks, about in parts:
        out += [f'<a id="{row.id.lower()}"></a>', "", f"## {row.id}: {row.title}", "", _sentence(row.shows), ""]
        if not checks:
            out += [f"Not run. Sizes at `--scale small`: {row.sizes['small']}.", ""]
            continue
        scale = about.get("scale", "small")
        out += [f"Sizes (`--scale {scale}`): {row.sizes[scale]}. {len(about.get('seeds', []))} seeds.", ""]
        out += [f"The paper: {row.paper}", ""]
        out += [
            "| claim | paper | ours: mean (lowest to highest of the seeds) | criterion | |",
            "| --- | --- | --- | --- | --- |",
        ]
        out += [f"| {c.claim} | {c.paper} | {c.ours} | {c.bar} | {c.verdict} |" for c in checks]
        diverged = [u for u in about.get("units", []) if u["status"] == "diverged"]
        if diverged:
            names = ", ".join(f"{u['variant']} (seed {u['seed']}: {u['message']})" for u in diverged)
            out += ["", f"Diverged and left out of every average: {names}."]
        if row.remarks:
            out += ["", row.remarks]
        if about.get("cross_check"):
            out += ["", about["cross_check"]]
        out += [
            "",
            f"![{row.id}: {row.title}]({folder}/{row.stem}.png)",
            "",
            f"Numbers: [{row.stem}.csv]({folder}/{row.stem}.csv).",
            "",
        ]
    return "\n".join(out).rstrip() + "\n"


def cross_check(table: Table) -> str:
    """A sentence on the Monte Carlo columns beside the exact ones, or nothing where there are none."""
    # where nothing varies, float32 batches and float64 sums differ by rounding, which has no standard error
    drawn = [r for r in table if (r.get("mc_variance_error") or 0) > 0 and (r.get("ratio") or 0) > 1e-9]
    if not drawn:
        return ""
    off = [(r["mc_variance"] - r["variance"]) / r["mc_variance_error"] for r in drawn]
    within = sum(abs(value) <= 2 for value in off)
    far = [value for value in off if abs(value) > 3]
    text = (
        f"Monte Carlo beside the exact figures ({drawn[0]['mc_draws']} mini-batches each): {within} of {len(off)} "
        f"variances within two standard errors, the furthest at {max(map(abs, off)):.1f}."
    )
    if far:
        text += (
            f" Of the {len(far)} beyond three, {sum(value < 0 for value in far)} read too low: where few examples make "
            f"most of the variance, mini-batches that miss them lower the standard error as well."
        )
    return text


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


HEAD = """
# The study

Faghri, Duvenaud, Fleet & Ba, *A Study of Gradient Variance in Deep Learning*, 2020 (arXiv:2007.04532), measured again.
Written by `gradclust study report` from the CSV files of `gradclust study run`. The paper's values are read off its
figures, so they are approximate.

All estimators are measured at the same parameters, along one trajectory trained with SG-B (batches drawn uniformly,
with replacement). B is the batch, K the number of strata. Variances are `E‖ĝ − ḡ‖²` from exact sums over all examples,
not from repeated batches; columns `mc_*` of the CSVs hold a Monte Carlo estimate around the exact mean, with its
standard error. GC is shown with the paper's rule (*factored*: rank-1 centres, size-weighted assignment) and with ours
(*exact*: exact moves on sketches). GC Neyman has half as many strata as examples in the batch.
"""

LIMITS = """
What the paper could not see, and what limits its figures:

- It estimated variances by Monte Carlo with 10 or 50 batches, around the mean of those batches. With T batches the
  variance is 1 + 1/T too high, and pure noise reads as a normalized variance of 1 + 1/(T − 2), 1.125 at T = 10 (R12
  measures both). The sums here are exact.
- Each estimator was a process of its own, so two lines of a figure belong to two trajectories. Here they share one.
- Its clustering assigns as if adding an example to a cluster left the cluster's weight as it is. Exact moves do not.
- Biases and norm layers were left out of clustering and counted in the variance. Here all trained parameters count in
  both.
- Its "label smoothing" runs never read the option, and its augmentation made "duplicates" differ.
- It compares learning rates at equal steps, which confounds noise with progress (R4 compares at equal loss as well).

Not reproduced at these sizes: ImageNet with ResNet18 (there GC overlaps SG-B, SG-B 0.9e-7 → 8.6e-7, normalized
variance .5 → 1.14) and CIFAR-100 with ResNet32. `--data` and `--model` take a data set and a model of one's own.
"""
