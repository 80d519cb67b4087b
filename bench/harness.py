"""How kernels are timed here: ours and every baseline interleaved in one run, medians with quartiles, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Case:
    """One benchmark row: an op at one size beside what a user would otherwise write."""

    op: str
    label: str
    """The sizes, in the letters of the guide, e.g. ``"B=32 T=256 512→512 float32"``."""
    ours: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]
    flops: float = 0.0
    """Floating-point operations that our kernel executes."""
    bytes: float = 0.0
    """Bytes that any implementation must move: each input read once, each output written once."""


@dataclass
class Timing:
    """Seconds per call: median and quartiles over interleaved repetitions."""

    median: float
    low: float
    high: float


@dataclass
class Row:
    case: Case
    ours: Timing
    baselines: dict[str, Timing] = field(default_factory=dict)
    ratios: dict[str, Timing] = field(default_factory=dict)
    """Ours divided by the baseline, per repetition, then median and quartiles: below 1 we win."""


def summarise(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Timing(median, low, high)


def measure(case: Case, *, seconds: float = 2.0, least: int = 7) -> Row:
    """Times every function of a case in turn, again and again, for about ``seconds`` in all."""
    functions = {"ours": case.ours, **case.baselines}
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    while len(times["ours"]) < least or time.perf_counter() - begin < seconds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    ratios = {name: [o / b for o, b in zip(times["ours"], times[name])] for name in case.baselines}
    return Row(
        case,
        summarise(times["ours"]),
        {name: summarise(times[name]) for name in case.baselines},
        {name: summarise(values) for name, values in ratios.items()},
    )
