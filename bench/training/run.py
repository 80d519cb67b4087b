"""Whole training steps with every example's gradient norm, beside the same step without: time and peak memory.

``python -m bench.run --training`` (all models) or ``--training mlp cnn``. Peers that are missing, refuse a model or
raise are named in their row.
"""

from __future__ import annotations

import csv
import gc
import importlib.util
import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.harness import summarise, time_call
from bench.memory import peak_bytes
from gradclust_fast._files import write_atomically

from .models import TASKS, Task
from .steps import PACKAGES, REMEDY, WAYS, plain

COLUMNS = (
    "model", "label", "B", "parameters", "method", "ms", "plain_ms", "ratio", "ratio_low", "ratio_high", "peak_mb",
    "plain_peak_mb", "memory_ratio", "difference", "error", "threads", "commit", "date",
)  # fmt: skip
_SPREAD = (("", "median"), ("_low", "low"), ("_high", "high"))
SLOW = 8
"""A way this many times slower than the plain step is timed in three rounds only."""


def size_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def measure_task(task: Task, seconds: float, device: str = "cpu", B: int | None = None) -> list[dict[str, Any]]:
    """One row a way: times interleaved with the plain step's, ratios taken round by round."""
    B = task.B if B is None else B
    common = {"model": task.name, "label": task.label, "B": B}
    if task.requires and importlib.util.find_spec(task.requires) is None:
        return [common | {"method": "gf.record", "error": f"not installed (pip install --no-deps {task.requires})"}]
    torch.manual_seed(0)
    batch = tuple(tensor.to(device) for tensor in task.batch(B))
    state = task.build().state_dict()

    def fresh() -> nn.Module:
        model = task.build()
        model.load_state_dict(state)
        return model.to(device)

    model = fresh()
    common["parameters"] = sum(p.numel() for p in model.parameters())
    steps: dict[str, Callable[[], Any]] = {"plain": plain(task, model, batch)}
    steps["plain"]()
    peaks = {"plain": peak_of(steps["plain"], model, device)}
    rows: dict[str, dict[str, Any]] = {}
    norms: torch.Tensor | None = None
    for name, way in WAYS.items():
        row = rows[name] = common | {"method": name}
        package = PACKAGES.get(name, "torch")
        if importlib.util.find_spec(package) is None:
            row["error"] = f"not installed ({REMEDY})"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                own = fresh()
                step = way(task, own, batch)
                found = step().detach().double().cpu()
                steps[name], peaks[name] = step, peak_of(step, own, device)
            norms = found if norms is None else norms
            row["difference"] = float(((found - norms).abs() / norms).max())
        except Exception as error:  # a peer's fault must not cost the other rows; our own shows in its row
            steps.pop(name, None)
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times = interleaved(steps, seconds, device)
    base = summarise(times["plain"])
    for name, row in rows.items():
        if name not in steps:
            continue
        own_times = times[name]
        ratio = summarise([t / p for t, p in zip(own_times, times["plain"])])
        row |= {
            "step": vars(summarise(own_times)),
            "plain": vars(base),
            "ratio": vars(ratio),
            "peak_bytes": peaks[name],
            "plain_peak_bytes": peaks["plain"],
            "memory_ratio": peaks[name] / peaks["plain"],
        }
    return list(rows.values())


def peak_of(step: Callable[[], Any], model: nn.Module, device: str) -> int:
    """Parameters, buffers and everything that a step allocates, ``.grad`` included."""
    for p in model.parameters():
        p.grad = None
    gc.collect()
    return size_of(model) + peak_bytes(step, device)


def interleaved(steps: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Rounds of every step in turn, at least three and for about ``seconds``; slow ways drop out after three."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.perf_counter()
    while len(times["plain"]) < 3 or time.perf_counter() - begin < seconds:
        for name, step in steps.items():
            if len(times[name]) >= 3 and min(times[name]) > SLOW * min(times["plain"]):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                times[name].append(time_call(step, device))
    return times


def as_csv(records: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for record in records:
        line = {key: value for key, value in record.items() if not isinstance(value, dict)}
        if "ratio" in record:
            line |= {f"ratio{end}": f"{record['ratio'][key]:.4f}" for end, key in _SPREAD}
            for key in ("step", "plain"):
                line["ms" if key == "step" else "plain_ms"] = f"{1e3 * record[key]['median']:.3f}"
            for key in ("peak", "plain_peak"):
                line[f"{key}_mb"] = f"{record[f'{key}_bytes'] / 1e6:.2f}"
            line |= {"memory_ratio": f"{record['memory_ratio']:.4f}", "difference": f"{record['difference']:.2g}"}
        writer.writerow(line)
    return text.getvalue()


def print_row(row: dict[str, Any]) -> None:
    if "ratio" not in row:
        print(f"    {row['method']:<26} failed: {row['error']}", flush=True)
        return
    ratio = row["ratio"]
    print(
        f"    {row['method']:<26} {1e3 * row['step']['median']:9.2f} ms   {ratio['median']:6.2f} × plain "
        f"({ratio['low']:.2f} to {ratio['high']:.2f})   memory {row['memory_ratio']:.2f} ×   "
        f"norms off by {row['difference']:.1g}",
        flush=True,
    )


def run(
    models: list[str],
    directory: Path,
    seconds: float,
    device: str,
    machine: dict[str, Any],
    stamp: dict[str, Any],
    *,
    limit: int | None = None,
    quick: bool = False,
) -> int:
    """Measures and writes after every model; returns how many of our own rows failed."""
    known = [task.name for task in TASKS]
    unknown = sorted(set(models) - set(known))
    if unknown:
        raise SystemExit(f"--training: no model {', '.join(unknown)}; there are {', '.join(known)}")
    table, data = directory / "training.csv", directory / "training.json"
    records: list[dict[str, Any]] = json.loads(data.read_text())["rows"] if data.exists() else []
    failures = 0
    for task in [task for task in TASKS if not models or task.name in models][:limit]:
        print(f"{task.name}: {task.label}", flush=True)
        try:
            rows = measure_task(task, seconds, device, 2 if quick else None)
        except Exception as error:  # one model must not cost the others
            rows = [{"model": task.name, "method": "gf.record", "error": f"{type(error).__name__}: {error}"}]
        for row in rows:
            print_row(row)
            failures += "error" in row and row["method"].startswith("gf.") and "not installed" not in row["error"]
        kept = [old for old in records if old["model"] != task.name]
        records = sorted([*kept, *(row | stamp for row in rows)], key=lambda row: known.index(row["model"]))
        write_atomically(data, json.dumps({"machine": machine, "rows": records}, indent=1, default=str) + "\n")
        write_atomically(table, as_csv(records))
    print(f"\nwritten: {table} and {data}")
    return failures
