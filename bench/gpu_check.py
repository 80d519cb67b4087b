"""Everything that needs a GPU, in one offline command: build, tests, compute-sanitizer, bars, benchmarks.

    python bench/gpu_check.py            (or make gpu-check)

Uses the torch, compiler and tools of the Python that runs it and installs nothing into it. Every stage is a process of
its own with its own time limit, so one failure, crash or hang hides no other. Writes to ``$OUT`` (default
``gpu-check-out/``): ``gpu-check.json``, ``gpu-check.log``, ``bars.json``, ``bars.csv`` (what the kernels are held to,
and whole recorded steps), ``kernels.json``, ``kernels.csv``. Without a CUDA device it says so and goes through the
same stages on the CPU, with the shortest timings; what needs a GPU reads "not measured".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Stage:
    name: str
    outcome: str
    """``"passed"``, ``"failed"``, ``"timed out"`` or ``"not run"``."""
    seconds: float
    note: str = ""


class Check:
    def __init__(self, out: Path, minutes: float, device: str) -> None:
        self.out, self.device = out, device
        self.deadline = time.monotonic() + 60 * minutes
        self.work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.stages: list[Stage] = []
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "gpu-check.log").open("w", encoding="utf-8")
        path = os.pathsep.join([str(self.work / "site"), str(ROOT)])  # the installed package, then bench/
        self.environment = {**os.environ, "PYTHONPATH": path, "GRADCLUST_TEST_DEVICE": device}
        self.environment["TRITON_INTERPRET"] = (
            "0"  # the suite tests the interpreted kernels; here it would cost minutes
        )

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skip(self, name: str, note: str) -> None:
        self.record(Stage(name, "not run", 0.0, note))

    def record(self, stage: Stage) -> None:
        with self._lock:
            self.stages.append(stage)
            print(f"{stage.outcome:<10} {stage.seconds:6.1f} s  {stage.name}  {stage.note}", flush=True)
            report = {"device": device_facts(), "stages": [asdict(each) for each in self.stages]}
            (self.out / "gpu-check.json").write_text(json.dumps(report, indent=1) + "\n")

    def together(self, groups: list[Callable[[Check], list[Callable[[], object]]]]) -> None:
        """Stages in which nothing is timed, side by side on a GPU machine, whose processors would else idle."""
        with ThreadPoolExecutor(6 if self.device == "cuda" else 1) as pool:
            for done in [pool.submit(stage) for group in groups for stage in group(self)]:
                done.result()

    def run(self, name: str, *command: object, limit: float, accept: tuple[int, ...] = (0,), **variables: str) -> bool:
        """One stage. Its output goes to the log; its last telling line becomes the note."""
        limit = min(limit, self.left())
        if limit < 5:
            self.skip(name, "no time left")
            return False
        text = [str(part) for part in command]
        begin = time.monotonic()
        # a process group of its own: a hung compiler or worker is ended with its parent
        process = subprocess.Popen(
            text, cwd=self.work, env=self.environment | variables, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            outcome = "passed" if process.returncode in accept else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            outcome = "timed out"
        seconds = time.monotonic() - begin
        with self._lock:
            self.log.write(f"\n===== {name}: {' '.join(text)}\n{output}\n===== {outcome}, {seconds:.1f} s\n")
            self.log.flush()
        if outcome != "passed":
            print("\n".join("    | " + line for line in output.splitlines()[-25:]), flush=True)
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        self.record(Stage(name, outcome, seconds, lines[-1][:120] if lines else ""))
        return outcome == "passed"


def device_facts() -> dict[str, object]:
    facts: dict[str, object] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        facts |= {"multiprocessors": properties.multi_processor_count, "memory_gib": properties.total_memory / 2**30}
    return facts


def cuda_arguments() -> str:
    """Only this GPU's architecture: the other one would double the build time."""
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if major >= 9 else ""
    return f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}{suffix}-real"


def build(check: Check) -> bool:
    target = check.work / "site"
    variables = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "")}
    if check.device == "cuda" and not variables["CMAKE_ARGS"]:
        variables["CMAKE_ARGS"] = cuda_arguments()
    return check.run(
        "build", sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target",
        target, ROOT, limit=240, **variables,
    )  # fmt: skip


def pytest(*arguments: object) -> list[object]:
    options = ["-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def tests(check: Check) -> list[Callable[[], object]]:
    """test_gpu.py one function a process: an illegal address in one kernel fails every later call of its process."""
    file = ROOT / "tests" / "test_gpu.py"
    functions = [
        line.split("(")[0].removeprefix("def ")
        for line in file.read_text().splitlines()
        if line.startswith("def test_") and "every_op_is_covered" not in line
    ]

    def run(function: str) -> Callable[[], object]:
        return lambda: check.run(f"test_gpu.py::{function}", *pytest(f"{file}::{function}", "-x"), limit=120)

    stages = [run(function) for function in functions]
    if check.device == "cuda":
        arguments = pytest(ROOT / "tests", "-m", "gpu", "--ignore", file)
        stages.append(lambda: check.run("gpu tests of other files", *arguments, limit=120, accept=(0, 5)))  # 5: none
    return stages


def compiler(check: Check) -> list[Callable[[], object]]:
    """Registers, spills and tensor cores of the first cases of every op that has a Triton kernel."""
    if importlib.util.find_spec("triton") is None:
        return [lambda: check.skip("Triton ahead of time", "Triton is not installed")]
    command = [sys.executable, "-m", "bench.aot_check", "--arch", 90, "--cases", 1 if check.device == "cpu" else 2]
    return [lambda: check.run("Triton ahead of time", *command, limit=180)]


def sanitizer(check: Check) -> list[Callable[[], object]]:
    tool = shutil.which("compute-sanitizer")
    if check.device != "cuda" or tool is None:
        note = "needs a GPU" if tool else "compute-sanitizer is not on PATH"
        return [lambda: check.skip("compute-sanitizer", note)]
    small = (
        "ragged or all-ones or sequence-gram or nan_stays or 3x3-non-square or depthwise-strided or every-row-repeats "
        "or (fetched_by_bulk_copies and (strided or every-second)) "
        "or (over_several_tiles and bfloat16 and (left or centres-of)) "
        "or (sign_product and float32 and (1-127-65 or 70-45-8500))"
    )
    chosen = pytest(ROOT / "tests" / "test_gpu.py", "-k", f"({small}) and not float64")
    caching = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own: its ends are seen

    def run(kind: str) -> Callable[[], object]:
        command = [tool, "--tool", kind, "--error-exitcode", 9, *chosen]
        return lambda: check.run(f"compute-sanitizer {kind}", *command, limit=120, **caching)

    return [run(kind) for kind in ("memcheck", "racecheck", "initcheck")]


def run_bars(check: Check) -> None:
    """What the kernels are held to, a process a bar; on the CPU all in one, where nothing is measured."""
    command = [sys.executable, "-m", "bench.gpu_bars", "--out", check.out, "--device", check.device]
    if check.device == "cpu":
        check.run("bars", *command, limit=180)
        return
    listed = subprocess.run(
        [*map(str, command), "--list"], cwd=check.work, env=check.environment, text=True, capture_output=True
    )
    for name in listed.stdout.split():
        check.run(f"bar {name}", *command, "--bar", name, limit=60)


def print_bars(check: Check) -> None:
    """The table, with the works that no stage came to."""
    command = [sys.executable, "-m", "bench.gpu_bars", "--out", str(check.out), "--table"]
    done = subprocess.run(command, cwd=check.work, env=check.environment, text=True, capture_output=True)
    print(done.stdout or done.stderr, flush=True)


def run_benchmarks(check: Check) -> None:
    """One process an op; the rows of all of them come together in kernels.json and kernels.csv."""
    ops = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "bench" / "kernels").glob("bench_*.py"))
    for op in ops:
        command = [sys.executable, "-m", "bench.run", "--op", op, "--out", check.out, "--device", check.device]
        command.append("--untested")  # the tests are stages of their own; one that failed stands in the report
        budget = ["--seconds", "0.5"] if check.device == "cuda" else ["--seconds", "0.01", "--cases", "1", "--quick"]
        check.run(f"benchmark {op}", *command, *budget, limit=60)


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "gpu-check-out")))
    parser.add_argument("--minutes", type=float, default=7.5, help="stages that would begin later are not run")
    parser.add_argument("--bars-only", action="store_true", help="build, then the bars alone")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check = Check(arguments.out.resolve(), arguments.minutes, device)
    print(", ".join(f"{key} {value}" for key, value in device_facts().items()))
    if device == "cpu":
        print("no CUDA device: dry run (the same stages on CPU tensors, with the shortest timings)")
    try:
        if build(check):
            code = "import gradclust_fast as gf; print(gf.build_info()); print(gf.__file__)"
            check.run("import", sys.executable, "-c", code, limit=60)
            if not arguments.bars_only:
                check.together([compiler, tests, sanitizer])
            run_bars(check)
            if not arguments.bars_only:
                run_benchmarks(check)
        print_bars(check)
    finally:
        check.log.close()
        shutil.rmtree(check.work, ignore_errors=True)
    bad = [stage.name for stage in check.stages if stage.outcome in ("failed", "timed out")]
    skipped = sum(stage.outcome == "not run" for stage in check.stages)
    what = "dry run, no CUDA device" if device == "cpu" else "GPU check"
    print(f"{what}: {len(check.stages)} stages, {len(bad)} failed, {skipped} not run; written to {check.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
