"""``gradclust study list | run | report``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .report import evaluate, load, text_of, write_figure, write_report
from .row import Row, all_rows
from .runner import missing_data, run_rows
from .unit import Options

SCALES = ("small", "paper")


def whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_clone() -> bool:
    """Whether the current directory is the root of the source tree, where results and page have their places."""
    return Path("bench/study").is_dir() and Path("gradclust_fast/study").is_dir()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="gradclust study", description="The measurements of Faghri et al. 2020 (arXiv:2007.04532), made anew."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("list", help="the rows: what each measures, and at which sizes")
    run = commands.add_parser(
        "run",
        help="measure rows; what is finished is kept, what was interrupted goes on",
        description="Measures rows (all by default) and prints their pass criteria. It can be killed at any time: run "
        "again, it goes on where it was and ends with the same numbers.",
    )
    run.add_argument("rows", nargs="*", metavar="ROW", help="such as R3 R6; default: all")
    run.add_argument("--seeds", type=whole, default=3, metavar="N", help="trajectories of every variant (%(default)s)")
    run.add_argument("--scale", choices=SCALES, default="small", help="sizes: see 'gradclust study list' (%(default)s)")
    run.add_argument(
        "--data",
        metavar="DIR",
        help="directory with MNIST's and CIFAR-10's files (default: $GRADCLUST_DATA), or module:factory of a data set "
        "of your own, or of (training, test), in the rows that allow it",
    )
    run.add_argument("--model", metavar="module:factory", help="a model of your own, in the rows that allow it")
    run.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (%(default)s)")
    run.add_argument("--jobs", type=whole, metavar="N", help="processes; default: one a core, 1 on a GPU")
    run.add_argument("--threads", type=whole, default=1, metavar="N", help="of torch in each process (%(default)s)")
    report = commands.add_parser(
        "report",
        help="figures, summary table and page from what has been measured",
        description="Draws one figure a row, writes summary.csv beside them and the page.",
    )
    report.add_argument("--page", type=Path, metavar="FILE", help="default: docs/study.md in a clone, else in --out")
    report.add_argument("--scale", choices=SCALES, default="small", help=argparse.SUPPRESS)
    for command in (run, report):
        command.add_argument(
            "--out", type=Path, metavar="DIR", help="default: bench/results/study in a clone, else study-results"
        )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    rows = all_rows()
    if parsed.command == "list":
        return show_list(rows)
    default = Path("bench/results/study") if in_clone() else Path("study-results")
    out = parsed.out or (default if parsed.scale == "small" else default / "paper")
    if parsed.command == "report":
        in_docs = in_clone() and parsed.out is None and parsed.scale == "small"
        page = parsed.page or (Path("docs/study.md") if in_docs else out / "study.md")
        for text in write_report(rows, out, page):
            print(text, end="\n\n")
        print(f"{page}, {out / 'summary.csv'} and the figures are written")
        return 0
    return run(rows, parsed, out)


def show_list(rows: dict[str, Row]) -> int:
    for row in rows.values():
        needs = row.needs("small")
        print(f"{row.id:4} {row.title}")
        print(f"     {row.shows}")
        for scale in SCALES:
            print(f"     {scale}: {row.sizes[scale]}")
        extras = [f"needs {', '.join(needs)}"] if needs else []
        extras += ["takes --model and --data module:factory"] if row.model else []
        if extras:
            print(f"     {'; '.join(extras)}")
    return 0


def run(rows: dict[str, Row], parsed: argparse.Namespace, out: Path) -> int:
    wanted = [name.upper() for name in parsed.rows] or list(rows)
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise SystemExit(f"gradclust study: no row {', '.join(unknown)}; there are {', '.join(rows)}")
    try:
        torch.zeros(1, device=parsed.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"gradclust study: --device {parsed.device} cannot be used: {error}") from None
    options = Options(parsed.data, parsed.model, parsed.device, out, parsed.scale)
    chosen: list[str] = []
    left_out: list[str] = []
    for name in dict.fromkeys(wanted):
        reason = missing_data(rows[name], options)
        if reason is None and (parsed.model or options.own_data) and not rows[name].model:
            reason = "it has a model and data of its own; leave out --model and --data module:factory"
        (chosen if reason is None else left_out).append(name)
        if reason is not None:
            print(f"{name} is not run: {reason}", file=sys.stderr)
    if chosen:
        jobs = parsed.jobs or (cores() if torch.device(parsed.device).type == "cpu" else 1)
        begin = time.monotonic()
        try:
            failed = run_rows(
                [rows[n] for n in chosen], options, range(parsed.seeds), jobs=jobs, threads=parsed.threads
            )
        except KeyboardInterrupt:
            print("\ninterrupted; run the same again to go on", file=sys.stderr)
            return 130
        print(f"\nthis run took {time.monotonic() - begin:.0f} s\n")
        for name in chosen:
            loaded = load(rows[name], out)
            if loaded is not None:
                table, about = loaded
                print(text_of(rows[name], evaluate(rows[name], table), about), end="\n\n")
                write_figure(rows[name], table, out)
        if failed:
            print(f"{failed} units failed; run the same again to repeat them", file=sys.stderr)
            return 1
    return 1 if left_out else 0
