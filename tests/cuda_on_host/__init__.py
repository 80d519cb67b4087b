"""The CUDA kernels compiled for the CPU by g++ over a small emulator, so that their results are tested without a GPU.

``emulated(monkeypatch)`` sends every op's CUDA kernel to that build: with ``gf.backend("cuda")`` in force the sources
of ``csrc/cuda`` then run on CPU tensors. The build takes some 20 seconds and is kept in ``build/``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-DGRADCLUST_ON_HOST"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def compiler() -> list[str] | None:
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def unavailable() -> str | None:
    """Why the kernels cannot be compiled for this CPU, or None."""
    if sys.platform != "linux":
        return "the emulator's fibers are Linux's"
    if compiler() is None:
        return "no C++ compiler is on PATH to build the CUDA kernels for the CPU"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed, and the emulated kernels are bound with it"
    return None


def sources() -> list[Path]:
    own = [HERE / name for name in ("module.cpp", "emulator.cpp", "tensor_maps.cpp")]
    return [*own, *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]


@lru_cache(maxsize=1)
def module() -> ModuleType:
    """Builds (or finds) and imports the emulated kernels."""
    import pybind11

    csrc = ROOT / "csrc"
    headers = [*csrc.glob("*.h"), *(csrc / "cuda").glob("*.*h"), *HERE.glob("**/*.h"), csrc / "bindings_cuda.cpp"]
    common = hashlib.sha256(" ".join([sys.version, *compiler(), *FLAGS]).encode())
    for path in sorted(headers):
        common.update(path.read_bytes())
    folder = ROOT / "build" / "cuda_on_host"
    folder.mkdir(parents=True, exist_ok=True)
    include = [HERE / "include", HERE, csrc, csrc / "cuda", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [*compiler(), *FLAGS, *WARNINGS, *(f"-I{path}" for path in include)]

    def compile(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        return made(folder / f"{source.stem}-{digest.hexdigest()[:16]}.o", [*command, "-x", "c++", "-c", source])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources()))
    names = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()
    target = made(folder / f"_cuda_on_host-{names[:16]}.so", [*compiler(), "-shared", *objects])
    spec = importlib.util.spec_from_file_location("_cuda_on_host", target)
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    return built


def made(target: Path, command: list[Any]) -> Path:
    """The file that the command writes, unless it is there; another process may be making it too."""
    if not target.exists():
        begun = target.with_suffix(f".{os.getpid()}")
        text = list(map(str, [*command, "-o", begun]))
        done = subprocess.run(text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(text)}\n{done.stdout[-6000:]}")
        begun.replace(target)
    return target


def emulated(monkeypatch) -> ModuleType:
    """Until the monkeypatch is undone, every op's CUDA kernel runs on CPU tensors."""
    from gradclust_fast.ops import _cuda

    built = module()

    def launch(name: str, device: torch.device, *args: Any) -> None:
        getattr(built, name)(*args, 0)

    def refuses(main: torch.Tensor) -> str | None:
        return None if main.device.type == "cpu" else f"the emulated kernel needs CPU tensors, got {main.device}"

    monkeypatch.setattr(_cuda, "native", lambda: built)
    monkeypatch.setattr(_cuda, "launch", launch)
    monkeypatch.setattr(_cuda, "refuses", refuses)
    built.set_order(0)
    built.set_device(9, True)
    return built
