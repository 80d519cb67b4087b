"""How ``bench.gpu_bars`` measures: figures, clocks, ceilings of a GPU; one call of everything where there is none."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.harness import Ceilings

Function = Callable[[], Any]


@dataclass
class Figure:
    """One number of a bar."""

    measure: str
    value: float | None
    least: float | None = None
    most: float | None = None
    error: str = ""
    """Why there is no value, other than that there is no GPU."""

    @property
    def bar(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}" if self.most is not None else ""

    @property
    def outcome(self) -> str:
        if self.error:
            return self.error
        if self.value is None:
            return "not measured"
        if not self.bar:
            return "reported"
        low, high = self.least is None or self.value >= self.least, self.most is None or self.value <= self.most
        return "reached" if low and high else "missed"


class Meter:
    """Tensors, clocks and ceilings of the device; on the CPU it calls everything once and measures nothing."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.measures = device == "cuda"
        self.ceilings = Ceilings(device) if self.measures else Ceilings(device, megabytes=1, size=64)
        self._cache = torch.empty(2**28 if self.measures else 1, dtype=torch.int8, device=device)  # larger than any L2

    def sizes(self, full: tuple[int, ...], small: tuple[int, ...]) -> tuple[int, ...]:
        return full if self.measures else small

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.float32).to(dtype)

    def times(self, functions: dict[str, Function], *, cold: bool = False) -> dict[str, float | None]:
        """Median seconds of each, interleaved; None on the CPU."""
        for function in functions.values():
            function()  # compiles, allocates
        if not self.measures:
            return dict.fromkeys(functions)
        torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in functions}
        begun = time.perf_counter()
        while len(found[next(iter(found))]) < 7 or time.perf_counter() - begun < self.seconds:
            for name, function in functions.items():
                if not cold:
                    function()
                found[name].append(self._once(function, cold))
        return {name: statistics.median(values) for name, values in found.items()}

    def _once(self, function: Function, cold: bool) -> float:
        if cold:
            self._cache.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond in which the call is queued
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host_microseconds(self, function: Function, calls: int = 50) -> float | None:
        """What the host spends on one call, the kernels not waited for."""
        function()
        if not self.measures:
            return None
        rounds = []
        for _ in range(9):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            rounds.append((time.perf_counter() - begin) / calls)
        torch.cuda.synchronize()
        return 1e6 * statistics.median(rounds)

    def peak(self, function: Function) -> float | None:
        """Bytes that a call allocates at most, its outputs included."""
        function()
        if not self.measures:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def bandwidth(self) -> float:
        return max(self.ceilings.copy_bandwidth(), self.ceilings.read_bandwidth())

    def compiled(self, function: Function) -> Function:
        """By torch.compile with its own search of configurations; on the CPU, where nothing is timed, the function."""
        return torch.compile(function, mode="max-autotune-no-cudagraphs") if self.measures else function


def ratio(top: float | None, bottom: float | None) -> float | None:
    return None if top is None or bottom is None else top / bottom
