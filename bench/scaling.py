"""How the costs of the ops grow with their sizes and fall with threads: ``python -m bench.scaling``.

Every sweep times all its sizes in turn, again and again, so that a noisy minute falls on all of them; the exponent is
the slope of log time against log size. Written to ``scaling.csv`` and ``scaling.json`` beside the kernels' results.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import gradclust_fast as gf
from bench.harness import Timing, summarise, time_call
from bench.run import ROOT, commit, device_name, machine, positive
from gradclust_fast._files import write_atomically


@dataclass
class Sweep:
    """One op at growing sizes; everything but ``variable`` is fixed."""

    op: str
    variable: str
    fixed: str
    values: tuple[int, ...]
    build: Callable[[int], Callable[[], object]]
    expected: float
    """The exponent that the op's FLOPs have in this variable; -1 for threads."""


def randn(*size: int) -> torch.Tensor:
    return torch.randn(*size)


def grad_sqnorm(B: int, T: int, I: int, O: int) -> Callable[[], object]:
    act, grad = randn(B, T, I), randn(B, T, O)
    return lambda: gf.ops.grad_sqnorm(act, grad)


def conv_sqnorm(B: int, C: int, side: int) -> Callable[[], object]:
    act, grad = randn(B, C, side, side), randn(B, C, side, side)
    return lambda: gf.ops.conv_sqnorm(act, grad, kernel_size=3, padding=1)


def grad_dot(B: int, K: int) -> Callable[[], object]:
    act, grad, center_grad, center_act = randn(B, 512), randn(B, 512), randn(K, 512), randn(K, 512)
    return lambda: gf.ops.grad_dot(act, grad, center_grad, center_act)


def assign_points(N: int, K: int, R: int) -> Callable[[], object]:
    points, centers = randn(N, R), randn(K, R)
    return lambda: gf.ops.assign_points(points, centers)


def exact_moves(N: int, K: int, R: int) -> Callable[[], object]:
    # clustered data after a first sweep: the state in which most sweeps run
    points = randn(K, R)[torch.arange(N) % K] + 0.5 * randn(N, R)
    labels = gf.ops.exact_moves(points, torch.arange(N) % K, K)[0]
    return lambda: gf.ops.exact_moves(points, labels, K)


def with_threads(threads: int, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            call()
        finally:
            torch.set_num_threads(before)

    return run


def sweeps() -> Iterator[Sweep]:
    doubling = (1, 2, 4, 8, 16)
    yield Sweep(
        "grad_sqnorm", "B", "T=64 256→256", tuple(64 * v for v in doubling), lambda B: grad_sqnorm(B, 64, 256, 256), 1
    )
    yield Sweep(
        "grad_sqnorm",
        "T",
        "B=16 1024→1024, Gram route",
        (64, 128, 256, 512),
        lambda T: grad_sqnorm(16, T, 1024, 1024),
        2,
    )
    yield Sweep(
        "grad_sqnorm", "T", "B=32 64→64, direct route", tuple(256 * v for v in doubling),
        lambda T: grad_sqnorm(32, T, 64, 64), 1,
    )  # fmt: skip
    yield Sweep(
        "grad_sqnorm", "I·O", "B=8 T=1024, direct route", (64**2, 128**2, 256**2, 512**2),
        lambda product: grad_sqnorm(8, 1024, math.isqrt(product), math.isqrt(product)), 1,
    )  # fmt: skip
    yield Sweep(
        "conv_sqnorm", "B", "3×3 64→64 16×16", tuple(16 * v for v in doubling), lambda B: conv_sqnorm(B, 64, 16), 1
    )
    yield Sweep("conv_sqnorm", "I·O", "B=16 3×3 C→C 32×32", (16**2, 32**2, 64**2, 128**2),
                lambda product: conv_sqnorm(16, math.isqrt(product), 32), 1)  # fmt: skip
    yield Sweep("grad_dot", "K", "B=4096 512+512", tuple(32 * v for v in doubling), lambda K: grad_dot(4096, K), 1)
    yield Sweep(
        "assign_points", "N", "R=64 K=256", tuple(8000 * v for v in doubling), lambda N: assign_points(N, 256, 64), 1
    )
    yield Sweep(
        "assign_points", "K", "N=40000 R=64", tuple(32 * v for v in doubling), lambda K: assign_points(40000, K, 64), 1
    )
    yield Sweep(
        "exact_moves", "N", "R=128 K=128", tuple(4000 * v for v in doubling), lambda N: exact_moves(N, 128, 128), 1
    )
    yield Sweep(
        "exact_moves", "K", "N=20000 R=128", tuple(32 * v for v in doubling), lambda K: exact_moves(20000, K, 128), 1
    )
    counts = tuple(2**i for i in range(torch.get_num_threads().bit_length()) if 2**i <= torch.get_num_threads())
    if len(counts) > 1:
        for op, fixed, call in (
            ("grad_sqnorm", "B=32 T=256 512→512", grad_sqnorm(32, 256, 512, 512)),
            ("conv_sqnorm", "B=64 3×3 64→64 16×16", conv_sqnorm(64, 64, 16)),
            ("assign_points", "N=30000 R=64 K=256", assign_points(30000, 256, 64)),
            ("exact_moves", "N=20000 R=256 K=128", exact_moves(20000, 128, 256)),
        ):
            yield Sweep(op, "threads", fixed, counts, lambda n, call=call: with_threads(n, call), -1)  # type: ignore[misc]


def exponent(values: tuple[int, ...], seconds: list[float]) -> float:
    """Least-squares slope of log seconds against log values."""
    x, y = [math.log(v) for v in values], [math.log(s) for s in seconds]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def measure(sweep: Sweep, seconds: float) -> list[Timing]:
    calls = [sweep.build(value) for value in sweep.values]
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - begin < seconds:
        for call, spent in zip(calls, times):
            spent.append(time_call(call))
    return [summarise(spent) for spent in times]


def run(out: Path | None, seconds: float) -> None:
    folder = out or ROOT / "results" / device_name("cpu")
    stamp = {"threads": torch.get_num_threads(), "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    rows = []
    for sweep in sweeps():
        timings = measure(sweep, seconds)
        slope = exponent(sweep.values, [timing.median for timing in timings])
        rows.append(
            {"op": sweep.op, "variable": sweep.variable, "fixed": sweep.fixed, "exponent": slope,
             "expected": sweep.expected, "values": sweep.values, "timings": [asdict(t) for t in timings], **stamp}
        )  # fmt: skip
        print(f"{sweep.op:<16} {sweep.variable:<8} {sweep.fixed:<28} exponent {slope:5.2f} (FLOPs: {sweep.expected:g})",
              flush=True)  # fmt: skip
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["op", "variable", "fixed", "exponent", "flop_exponent", "value", "ms", "low_ms", "high_ms"])
        for row in rows:
            for value, timing in zip(row["values"], row["timings"]):
                spread = [f"{1e3 * timing[key]:.4f}" for key in ("median", "low", "high")]
                head = [row["op"], row["variable"], row["fixed"], f"{row['exponent']:.3f}", row["expected"]]
                writer.writerow([*head, value, *spread])
        write_atomically(folder / "scaling.csv", text.getvalue())
        summary = {"machine": machine("cpu"), "rows": rows}
        write_atomically(folder / "scaling.json", json.dumps(summary, indent=1, default=str) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<device>")
    parser.add_argument("--seconds", type=positive, default=2.0, help="per sweep, all its sizes included")
    arguments = parser.parse_args()
    try:
        run(arguments.out, arguments.seconds)
    except KeyboardInterrupt:
        print("\ninterrupted; the finished sweeps are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
