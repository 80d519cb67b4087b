"""Writes the README's numbers and the guide's benchmark page from the committed results; nothing is typed by hand.

    python -m bench.readme [--results bench/results/<device>]

The results come from ``make bench`` (kernels) and ``python -m bench.study.mnist_mlp`` / ``snapshot_cost`` (study).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

from gradclust_fast._files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers: python -m bench.readme -->", "<!-- end of numbers -->"
YARDSTICKS = {
    "layer's forward + backward",
    "layer's weight gradient",
    "layer's weight gradient alone",
    "product alone (no norms)",
    "one sgemm (no algorithm)",
    "addmm + argmin (no algorithm)",
}
"""What gives a time its scale but does other work: more than 1 is no loss."""
PAGE = ROOT / "docs" / "benchmarks.md"


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def ratios(row: dict[str, str]) -> tuple[float, float, float]:
    """Median and quartiles."""
    return float(row["ratio"]), float(row["ratio_low"]), float(row["ratio_high"])


def best_baselines(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row a case: the fastest baseline, the one hardest to beat; a yardstick only where there is no baseline."""
    cases: dict[tuple[str, str], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: (row["baseline"] in YARDSTICKS, float(row["baseline_ms"] or "inf"))):
        if row["baseline_ms"]:
            cases.setdefault((row["op"], row["label"]), row)
    return [cases[key] for key in dict.fromkeys((row["op"], row["label"]) for row in rows) if key in cases]


def kernel_table(rows: list[dict[str, str]]) -> list[str]:
    lines = ["| op | sizes | fastest baseline | ours ÷ baseline | quartiles |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        ratio, low, high = ratios(row)
        remark = " (yardstick)" if row["baseline"] in YARDSTICKS else " (we lose)" if ratio > 1 else ""
        lines.append(
            f"| `{row['op']}` | {row['label']} | {row['baseline']} | {ratio:.2f}{remark} | {low:.2f} to {high:.2f} |"
        )
    return lines


def step_table(folder: Path) -> list[str]:
    """Models against ways: the step with every example's norm divided by the step without."""
    if not (folder / "training.csv").exists():
        return []
    rows = rows_of(folder / "training.csv")
    ways = list(dict.fromkeys(row["method"] for row in rows if row["ratio"]))
    lines = [
        "A training step with every example's gradient norm divided by the same step without, interleaved in one run "
        "of the same machine; medians of the per-round ratios (`python -m bench.run --training`; quartiles and peak "
        "memory are in the [guide](docs/benchmarks.md#training-steps)):",
        "",
        "| model | " + " | ".join(ways) + " |",
        "| --- |" + " --- |" * len(ways),
    ]
    for label in dict.fromkeys(row["label"] for row in rows):
        found = {row["method"]: row["ratio"] for row in rows if row["label"] == label}
        cells = [f"{float(found[way]):.2f}" if found.get(way) else "–" for way in ways]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def training_lines(folder: Path) -> list[str]:
    """Whole training steps, where they were measured; a peer that is missing or refuses the model says so."""
    if not (folder / "training.csv").exists():
        return []
    lines = [
        "## Training steps",
        "",
        "One step with every example's gradient norm divided by the same step without, interleaved, median and "
        "quartiles; peak memory (parameters, activations, gradients) likewise (`python -m bench.run --training`):",
        "",
        "| model | B | way | time ÷ plain | quartiles | memory ÷ plain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows_of(folder / "training.csv"):
        head = f"| {row['label'] or row['model']} | {row['B']} | {row['method']} |"
        if row["error"]:
            lines.append(f"{head} {row['error'].replace('|', '/')[:80]} | | |")
        else:
            ratio, low, high = ratios(row)
            lines.append(f"{head} {ratio:.2f} | {low:.2f} to {high:.2f} | {float(row['memory_ratio']):.2f} |")
    return [*lines, ""]


def bar_lines(results: Path) -> list[str]:
    """What the GPU kernels are held to: every ``bars.csv`` of ``make gpu-check``, unmeasured rows included."""
    lines = []
    found = sorted(results.glob("*/bars.csv"))
    measured = [path for path in found if path.parent.name != "no-gpu"]
    for path in measured or found:
        rows = [row for row in rows_of(path) if row["bar"]]
        lines += [
            f"## The bars of a Hopper GPU ({path.parent.name})",
            "",
            "What `make gpu-check` holds the GPU kernels to, against ceilings and baselines of the same run; "
            f"`{path.relative_to(ROOT).as_posix()}` also has the figures without a bar.",
            "",
            "| work | figure | bar | measured | |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {row['work']} | {row['measure']} | {row['bar']} | {row['value']} | "
                f"{row['outcome'] if row['outcome'] != row['value'] else ''} |"
                for row in rows
            ),
            "",
        ]
    return lines


def study_lines(folder: Path) -> list[str]:
    rows = rows_of(folder / "mnist_mlp.csv")
    steps = sorted({int(row["step"]) for row in rows})
    lines = [
        "Gradient variance of a mini-batch of 128 divided by plain SGD's, MNIST 10k, MLP 784-128-128-10, exact over "
        f"all examples, median of {len({row['seed'] for row in rows})} seeds; 0.50 is what doubling the batch buys "
        "(`python -m bench.study.mnist_mlp --data DIR`):",
        "",
        "| training step | " + " | ".join(map(str, steps)) + " |",
        "| --- |" + " --- |" * len(steps),
    ]
    for method, name in (
        ("exact", "Gradient Clustering, exact moves"),
        ("factored", "Gradient Clustering, the paper's"),
    ):
        medians = [
            statistics.median(float(r["ratio"]) for r in rows if r["method"] == method and int(r["step"]) == step)
            for step in steps
        ]
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in medians) + " |")
    cost = {row["model"]: row for row in rows_of(folder / "snapshot_cost.csv")}
    shown = "; ".join("{:.2f} ({:.2f} to {:.2f})".format(*ratios(row)) + f" for the MLP {m}" for m, row in cost.items())
    lines += [
        "",
        "Cost of the strata (one sketch pass and the sweeps) in plain forward + backward passes over the same 10,000 "
        f"digits, K = 128 (`python -m bench.study.snapshot_cost --data DIR`): {shown}. The paper's clustering makes 20 "
        "passes.",
    ]
    return lines


def headline(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first case of every op, in the order of the benchmark files."""
    first: dict[str, dict[str, str]] = {}
    for row in rows:
        first.setdefault(row["op"], row)
    return list(first.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="directory with kernels.csv (default: the only one there is)")
    options = parser.parse_args()
    found = sorted((ROOT / "bench" / "results").glob("*/kernels.csv"))
    if options.results is None and len(found) != 1:
        raise SystemExit(f"--results must name one of {', '.join(str(p.parent) for p in found) or 'no results yet'}")
    folder = options.results or found[0].parent
    rows = best_baselines(rows_of(folder / "kernels.csv"))
    machine = json.loads((folder / "kernels.json").read_text())["machine"]
    isa = machine["C++ kernels"].split(",")[0]
    where = f"{machine['cpu']}, {isa}, {machine['threads']} threads, torch {machine['torch']}"
    about = (
        f"Ours and the baselines interleaved in one run ({where}); medians of the per-repetition ratios, below 1 we win"
    )
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    numbers = [
        *study_lines(ROOT / "bench" / "results" / "study"),
        "",
        *step_table(folder),
        f"Kernels (`make bench`). {about}. One row an op; all rows, losing ones included, are in the "
        "[guide](docs/benchmarks.md).",
        "",
        *kernel_table(headline(rows)),
    ]
    write_atomically(ROOT / "README.md", "\n".join([before + BEGIN, "", *numbers, "", END + after]))
    from bench.figures import draw_all  # matplotlib only here: the numbers need none

    figures = draw_all(folder, rows, ROOT / "docs" / "images", YARDSTICKS)
    page = [
        "# Benchmarks",
        "",
        f"Written by `python -m bench.readme` from `{folder.relative_to(ROOT).as_posix()}/kernels.csv`, which "
        f"`make bench` measures. {about}. Where several baselines were timed the fastest is shown (a yardstick, which "
        "does other work, only where there is nothing else); the CSV has all, with times and the share of the measured "
        "ceilings.",
        "",
        *kernel_table(rows),
        "",
        *training_lines(folder),
        *bar_lines(ROOT / "bench" / "results"),
        *(line for name, what in figures for line in (f"![{what}](images/{name})", f"*{what}.*", "")),
    ]
    write_atomically(PAGE, "\n".join(page))


if __name__ == "__main__":
    main()
