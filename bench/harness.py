"""How kernels are timed here: ours and every baseline interleaved in one run, medians with quartiles, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gradclust_fast import _native


def on_gpu() -> bool:
    """Whether cases are being made for a GPU (or, on the meta device, for its compiler): torch's default device."""
    return torch.get_default_device().type != "cpu"


@dataclass
class Case:
    """One benchmark row: an op at one size beside what a user would otherwise write.

    The tensors are made on torch's default device, which the runner sets; so one ``cases()`` serves CPU and CUDA.
    """

    op: str
    label: str
    """The sizes, in the letters of the guide, e.g. ``"B=32 T=256 512→512 float32"``."""
    ours: Callable[[], Any]
    baselines: dict[str, Callable[[], Any]]
    flops: float = 0.0
    """Floating-point operations that our kernel executes."""
    bytes: float = 0.0
    """Bytes that any implementation must move: each input read once, each output written once."""
    dtype: torch.dtype = torch.float32
    """Whose matrix-product rate is the ceiling."""
    missing: dict[str, str] = field(default_factory=dict)
    """Baselines that could not be built, and what would bring them, e.g. ``{"faiss": "pip install faiss-cpu"}``."""


@dataclass
class Timing:
    """Seconds per call (or a ratio of them): median and quartiles over interleaved repetitions."""

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
    failed: dict[str, str] = field(default_factory=dict)
    """Baselines without a time: those that raised, and what; those not installed, and the remedy."""


def summarise(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Timing(median, low, high)


def time_call(function: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call; on CUDA between two events, so that the launch queue does not count."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(case: Case, *, seconds: float = 2.0, least: int = 7, device: str = "cpu") -> Row:
    """Times every function of a case in turn, again and again, for about ``seconds`` in all.

    At least ``least`` rounds are taken, but a slow baseline may not stretch a case beyond four times ``seconds``
    (three rounds are taken even then). A baseline that raises is recorded and left out; ours raising is the caller's.
    """
    functions = {"ours": case.ours}
    failed = {name: f"not installed ({remedy})" for name, remedy in case.missing.items()}
    case.ours()
    for name, function in case.baselines.items():
        try:
            function()  # warm-up: allocations, compilation, page faults
            functions[name] = function
        except Exception as error:  # a peer's fault must not cost the other rows
            failed[name] = f"{type(error).__name__}: {error}"
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()

    def enough() -> bool:
        rounds, spent = len(times["ours"]), time.perf_counter() - begin
        return (rounds >= least and spent >= seconds) or (rounds >= 3 and spent >= 4 * seconds)

    while not enough():
        for name, function in functions.items():
            times[name].append(time_call(function, device))
    others = [name for name in functions if name != "ours"]
    ratios = {name: [o / b for o, b in zip(times["ours"], times[name])] for name in others}
    return Row(
        case,
        summarise(times["ours"]),
        {name: summarise(times[name]) for name in others},
        {name: summarise(values) for name, values in ratios.items()},
        failed,
    )


class Ceilings:
    """What this machine can do, measured when first asked for: bytes and floating-point operations per second."""

    def __init__(self, device: str = "cpu", *, megabytes: int | None = None, size: int | None = None) -> None:
        self.device = device
        self.megabytes = megabytes or (256 if device == "cpu" else 2048)  # well beyond any last-level cache
        self.size = size or (2048 if device == "cpu" else 8192)
        self._known: dict[str, float] = {}

    def _best_rate(self, name: str, work: float, function: Callable[[], Any]) -> float:
        """The fastest of at least five calls and half a second: a ceiling, so interruptions must not lower it."""
        if name not in self._known:
            function()
            times: list[float] = []
            while len(times) < 5 or (sum(times) < 0.5 and len(times) < 200):
                times.append(time_call(function, self.device))
            self._known[name] = work / min(times)
        return self._known[name]

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        if "copy" in self._known:
            return self._known["copy"]
        source = torch.randn(self.megabytes * 2**18, device=self.device)
        target = torch.empty_like(source)
        return self._best_rate("copy", 2 * source.nbytes, lambda: target.copy_(source))

    def read_bandwidth(self) -> float:
        """Bytes per second of a large sum."""
        if "read" in self._known:
            return self._known["read"]
        source = torch.randn(self.megabytes * 2**18, device=self.device)
        return self._best_rate("read", source.nbytes, source.sum)

    def gemm_rate(self, dtype: torch.dtype = torch.float32) -> float:
        """Floating-point operations per second of torch's square matrix product in a dtype."""
        name = f"gemm {str(dtype).removeprefix('torch.')}"
        if name in self._known:
            return self._known[name]
        n = self.size
        left, right = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
        return self._best_rate(name, 2.0 * n**3, lambda: left @ right)

    def fma_peak(self) -> float:
        """float32 operations per second of multiply-adds in registers; 0 without C++ kernels, and on CUDA."""
        native = None if self.device != "cpu" else _native._C
        if native is None:
            return 0.0
        if "FMA peak" in self._known:
            return self._known["FMA peak"]
        threads = torch.get_num_threads()
        work = native.fma_peak_cpu(1_000_000, threads)
        return self._best_rate("FMA peak", work, lambda: native.fma_peak_cpu(1_000_000, threads))

    def compute_rate(self, dtype: torch.dtype) -> float:
        """The faster of torch's matrix product and, in float32, the measured peak of the multiply-add units."""
        return max(self.gemm_rate(dtype), self.fma_peak() if dtype == torch.float32 else 0.0)

    def floor(self, case: Case) -> tuple[float, str]:
        """The least seconds the case can take here, and what bounds it: ``"memory"`` or ``"compute"``."""
        moved = case.bytes / max(self.read_bandwidth(), self.copy_bandwidth())
        computed = case.flops / self.compute_rate(case.dtype) if case.flops > 0 else 0.0
        return (moved, "memory") if moved >= computed else (computed, "compute")

    def as_dict(self) -> dict[str, float]:
        """Everything measured so far, in GB/s and GFLOP/s."""
        return {name: rate / 1e9 for name, rate in self._known.items()}
