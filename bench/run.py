"""Runs the kernel benchmarks: ceilings first, then every case beside its baselines; a table, a CSV and a JSON file.

``python -m bench.run --op grad_sqnorm --seconds 1`` (or ``gradclust bench``, or ``make bench``) from the source tree.
Results of one machine live in ``bench/results/<device>/``; a run replaces the rows it measures anew and keeps the rest.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import io
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import gradclust_fast as gf
from bench.compare import compare
from bench.gate import refusal
from bench.harness import Case, Ceilings, Row, measure
from bench.training import run as training
from gradclust_fast import _native
from gradclust_fast._files import write_atomically

ROOT = Path(__file__).resolve().parent
COLUMNS = (
    "op", "label", "ours_ms", "ours_low_ms", "ours_high_ms", "percent_of_ceiling", "bound_by", "baseline",
    "baseline_ms", "ratio", "ratio_low", "ratio_high", "error", "threads", "commit", "date",
)  # fmt: skip


def available_ops() -> list[str]:
    """The ops that have a file bench/kernels/bench_<op>.py."""
    return sorted(path.stem.removeprefix("bench_") for path in (ROOT / "kernels").glob("bench_*.py"))


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: platform's answer below
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    """Names the results directory: processor, instruction set and threads, or the GPU."""
    if device != "cpu":
        name = torch.cuda.get_device_name()
    else:
        isa = gf.build_info()["C++ kernels"].split(",")[0].split(":")[0]
        name = f"{cpu_name()} {isa} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The commit the tree is at, marked when it has changes."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, Any]:
    waiting = os.environ.get("OMP_WAIT_POLICY", "default")
    facts: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "OMP_WAIT_POLICY": waiting}
    facts |= gf.build_info()
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def cases_of(module: ModuleType, device: str) -> Iterator[Case]:
    """The module's cases, their tensors made on the device, from the same random numbers in every run."""
    torch.manual_seed(0)
    cases = module.cases()
    while True:
        with torch.device(device):  # only while a case is built: the mode would slow the timed calls
            try:
                case = next(cases)
            except StopIteration:
                return
        yield case


def as_record(row: Row, ceilings: Ceilings) -> dict[str, Any]:
    floor, bound = ceilings.floor(row.case)
    return {
        "op": row.case.op,
        "label": row.case.label,
        "ours": asdict(row.ours),
        "percent_of_ceiling": 100 * floor / row.ours.median if floor else None,
        "bound_by": bound if floor else None,
        "baselines": {name: asdict(timing) for name, timing in row.baselines.items()},
        "ratios": {name: asdict(timing) for name, timing in row.ratios.items()},
        "failed": row.failed,
        "flops": row.case.flops,
        "bytes": row.case.bytes,
    }


def _milliseconds(timing: dict[str, float]) -> str:
    return "  ".join(f"{1e3 * timing[key]:8.3f}" for key in ("median", "low", "high"))


def print_record(record: dict[str, Any]) -> None:
    if "error" in record:
        print(f"{record['op']:<18} {record['label']}\n    FAILED: {record['error']}", flush=True)
        return
    percent = record["percent_of_ceiling"]
    ceiling = f"{percent:4.0f} % of the {record['bound_by']} ceiling" if percent is not None else "no ceiling given"
    print(f"{record['op']:<18} {record['label']}")
    print(f"    {'ours':<28} {_milliseconds(record['ours'])}   {ceiling}")
    for name, timing in record["baselines"].items():
        ratio = record["ratios"][name]
        text = f"ours/this {ratio['median']:6.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
        print(f"    {name:<28} {_milliseconds(timing)}   {text}")
    for name, reason in record["failed"].items():
        print(f"    {name:<28} failed: {reason}")
    sys.stdout.flush()


def as_csv(records: list[dict[str, Any]]) -> str:
    """One line for every pair of case and baseline."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for record in records:
        line: dict[str, Any] = {key: record.get(key) for key in ("op", "label", "error", "threads", "commit", "date")}
        if "error" not in record:
            ours = {f"ours{key}_ms": f"{1e3 * record['ours'][name]:.4f}" for key, name in _SPREAD}
            percent = record["percent_of_ceiling"]
            line |= ours | {"percent_of_ceiling": percent and f"{percent:.1f}", "bound_by": record["bound_by"]}
        for name, timing in record.get("baselines", {}).items():
            ratio = {f"ratio{key}": f"{record['ratios'][name][field]:.4f}" for key, field in _SPREAD}
            writer.writerow(line | ratio | {"baseline": name, "baseline_ms": f"{1e3 * timing['median']:.4f}"})
        for name, reason in record.get("failed", {}).items():
            writer.writerow(line | {"baseline": name, "error": reason})
        if not record.get("baselines") and not record.get("failed"):
            writer.writerow(line)
    return text.getvalue()


_SPREAD = (("", "median"), ("_low", "low"), ("_high", "high"))


class Results:
    """The rows of one machine, on disk after every row."""

    def __init__(self, directory: Path, device: str) -> None:
        self.directory, self.device = directory, device
        self.json, self.csv = directory / "kernels.json", directory / "kernels.csv"
        self.records: list[dict[str, Any]] = json.loads(self.json.read_text())["rows"] if self.json.exists() else []

    def add(self, record: dict[str, Any], ceilings: Ceilings) -> None:
        key = (record["op"], record["label"])
        kept = [old for old in self.records if (old["op"], old["label"]) != key]
        self.records = sorted([*kept, record], key=lambda row: row["op"])
        summary = {"machine": machine(self.device), "ceilings": ceilings.as_dict(), "rows": self.records}
        write_atomically(self.json, json.dumps(summary, indent=1, default=str) + "\n")
        write_atomically(self.csv, as_csv(self.records))


def run(
    ops: list[str] | None,
    out: Path | None,
    seconds: float,
    device: str = "cpu",
    *,
    limit: int | None = None,
    quick: bool = False,
    tested: bool = True,
) -> int:
    """Measures and writes; returns the number of cases that failed. ``limit`` keeps the first cases of each op.

    An op whose tests fail is not timed; ``tested=False`` leaves that to a caller that has run them.
    """
    unknown = sorted(set(ops or ()) - set(available_ops()))
    if unknown:
        raise SystemExit(f"--op: no benchmark for {', '.join(unknown)}; there are {', '.join(available_ops())}")
    results = Results(out or ROOT / "results" / device_name(device), device)
    stamp = {"threads": torch.get_num_threads(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    print("\n".join(f"{key}: {value}" for key, value in machine(device).items()))
    ceilings = Ceilings(device, megabytes=8, size=256) if quick else Ceilings(device)
    print(
        f"ceilings: copy {ceilings.copy_bandwidth() / 1e9:.1f} GB/s, read {ceilings.read_bandwidth() / 1e9:.1f} GB/s, "
        f"float32 matrix product {ceilings.gemm_rate() / 1e9:.0f} GFLOP/s, "
        f"multiply-add units {ceilings.fma_peak() / 1e9:.0f} GFLOP/s\n\n"
        f"{'':<32} {'median':>8}  {'low':>8}  {'high':>8}   (ms; low and high are quartiles)",
        flush=True,
    )
    failures = 0
    for op in ops or available_ops():
        label = ""
        reason = refusal(op) if tested else None
        if reason is not None:
            failures += 1
            print_record({"op": op, "label": "", "error": reason})
            continue
        try:
            cases = cases_of(importlib.import_module(f"bench.kernels.bench_{op}"), device)
            for case in itertools.islice(cases, limit):
                label = case.label
                try:
                    record = as_record(measure(case, seconds=seconds, device=device), ceilings)
                except Exception as error:  # one case must not cost the others
                    record = {"op": case.op, "label": label, "error": f"{type(error).__name__}: {error}"}
                    failures += 1
                print_record(record)
                results.add(record | stamp, ceilings)
        except Exception as error:  # the cases themselves could not be made: say so and go on
            failures += 1
            where = f"after {label}" if label else "before its first case"
            print_record({"op": op, "label": where, "error": f"{type(error).__name__}: {error}"})
    print(f"\nwritten: {results.csv} and {results.json}")
    return failures


def train(arguments: argparse.Namespace) -> int:
    """Whole training steps; returns how many of ours failed."""
    facts = machine(arguments.device)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    return training.run(
        arguments.training,
        arguments.out or ROOT / "results" / device_name(arguments.device),
        arguments.seconds or 15.0,
        arguments.device,
        facts,
        {"threads": torch.get_num_threads(), "commit": commit(), "date": time.strftime("%Y-%m-%d")},
        limit=arguments.cases,
        quick=arguments.quick,
    )


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gradclust bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op (repeatable)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<device>")
    parser.add_argument(
        "--seconds", type=positive, help="per case, all its baselines included (2; a whole training step: 15)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N cases of each op, or models")
    parser.add_argument(
        "--training", nargs="*", metavar="MODEL", help="whole training steps beside other packages' (all, or these)"
    )
    parser.add_argument("--quick", action="store_true", help="small ceilings: proves that all runs, measures nothing")
    parser.add_argument("--untested", action="store_true", help="do not run an op's tests before it is timed")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results, measured before")
    arguments = parser.parse_args(argv)
    if arguments.compare:
        compare(*arguments.compare)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")
    if _native.cpu_unavailable() == _native.STALE:  # its rows would be the reference's
        raise SystemExit(f"nothing was timed: {_native.STALE}")
    try:
        if arguments.training is not None:
            return 1 if train(arguments) else 0
        options = {"limit": arguments.cases, "quick": arguments.quick, "tested": not arguments.untested}
        return 1 if run(arguments.op, arguments.out, arguments.seconds or 2.0, arguments.device, **options) else 0
    except KeyboardInterrupt:
        print("\ninterrupted; the finished rows are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
