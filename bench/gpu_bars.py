"""What the kernels are held to on a Hopper GPU: one row a figure, with the bar it must reach, all of one run.

    python -m bench.gpu_bars --out DIR                       (or make gpu-check, a process for each bar)
    python -m bench.gpu_bars --bar norms-of-sequences --device cuda

Ceilings are measured first. Every time is the median of interleaved calls between two events, behind work that keeps
the GPU busy while the call is queued, so launches do not count; what they cost the host has a row of its own. "L2 hot"
repeats the call, "L2 cold" overwrites the cache before it. Without a GPU everything is called once, at small sizes, and
the rows read "not measured". Written after every figure: ``bars.json`` and ``bars.csv``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu_meter import Figure, Meter
from bench.gpu_works import WORKS
from gradclust_fast._files import write_atomically


class Table:
    """The rows of all bars, on disk after every figure."""

    def __init__(self, out: Path) -> None:
        self.json, self.csv = out / "bars.json", out / "bars.csv"
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads(self.json.read_text()) if self.json.exists() else {}
        self.rows: list[dict[str, Any]] = found.get("rows", [])
        self.ceilings: dict[str, float] = found.get("ceilings", {})  # GB/s and GFLOP/s

    def start(self, name: str) -> None:
        self.rows = [row for row in self.rows if row["name"] != name]

    def add(self, name: str, figure: Figure, ceilings: dict[str, float] | None = None) -> None:
        work = WORKS[name].work
        self.ceilings |= ceilings or {}
        self.rows.append({"name": name, "work": work, **asdict(figure), "bar": figure.bar, "outcome": figure.outcome})
        order = list(WORKS)
        self.rows.sort(key=lambda row: order.index(row["name"]))
        data = {"torch": torch.__version__, "device": device_name(), "ceilings": self.ceilings, "rows": self.rows}
        write_atomically(self.json, json.dumps(data, indent=1) + "\n")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("name", "work", "measure", "value", "bar", "outcome"))
        for row in self.rows:
            writer.writerow(
                [row["name"], row["work"], row["measure"], number(row["value"]), row["bar"], row["outcome"]]
            )
        write_atomically(self.csv, text.getvalue())


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"


def number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The table as text."""
    work = ""
    for row in rows:
        if row["work"] != work:
            work = row["work"]
            yield work
        yield f"    {row['measure']:<62} {number(row['value']):>12}  {row['bar']:<8} {row['outcome']}"


def measure(name: str, meter: Meter, table: Table) -> bool:
    """Every figure of one bar; whether none of our own failed to come."""
    table.start(name)
    try:
        for figure in WORKS[name].figures(meter):
            table.add(name, figure, meter.ceilings.as_dict())
    except Exception as error:  # the figures before it stand
        table.add(
            name, Figure("failed", None, error=f"{type(error).__name__}: {error}"[:300]), meter.ceilings.as_dict()
        )
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_bars", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--table", action="store_true", help="print the table of --out, with what was not run, and stop"
    )
    parser.add_argument("--bar", action="append", choices=list(WORKS), help="only this one (repeatable)")
    parser.add_argument("--out", type=Path, default=Path("gpu-check-out"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of every group of interleaved calls")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(WORKS))
        return 0
    table = Table(arguments.out)
    if arguments.table:
        for name in WORKS.keys() - {row["name"] for row in table.rows}:
            table.add(name, Figure("not run", None))
        print("\n".join(lines(table.rows)))
        return 0
    meter = Meter(arguments.device, arguments.seconds)
    names = arguments.bar or list(WORKS)
    good = [measure(name, meter, table) for name in names]
    print("\n".join(lines([row for row in table.rows if row["name"] in names])))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
