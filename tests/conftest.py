from __future__ import annotations

import os

import cuda_on_host
import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast._dispatch import OPS
from gradclust_fast.triton_kernels import _support

HALF_SHAPES = ("vector-ragged", "sequence-shorter", "sequence-longer", "ragged", "several-blocks-of-positions")
"""Parts of the ids of the shapes that Triton's interpreter gets in half precision too."""
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


TAKE_FLOAT64 = [OPS[name] for name in ("assign", "assign_points", "cluster_sums", "exact_moves")]  # in Triton


def available_backends() -> list[str]:
    names = ["reference"]
    if _native.cpu_unavailable() is None:
        names.append("cpu")
    if _support.unavailable(torch.device("cpu")) is None:
        names.append("triton")
    if cuda_on_host.unavailable() is None:
        names.append("cuda")
    return names


def pytest_collection_modifyitems(config, items):
    """Leaves out what Triton and CUDA refuse: ops without such a kernel; in Triton float64, in CUDA T > 1."""

    def refused(item):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backend = parameters.get("backend")
        if backend not in ("triton", "cuda"):
            return False
        op = OPS.get(parameters.get("what") or item.path.stem.removeprefix("test_"))
        if backend == "cuda" and op is OPS["grad_sqnorm"]:
            return True  # one position alone: test_cuda_on_host.py
        if op is OPS["exact_moves"]:
            return True  # compared label by label, while these move rows together: test_batched_moves.py
        if op is None or backend not in op.kernels:
            return True
        if backend == "cuda":
            return False
        dtype = parameters.get("dtype", torch.float32)
        if dtype == torch.float64:
            return op not in TAKE_FLOAT64
        # the interpreter is slow: half precision on a few shapes of a grid
        return dtype != torch.float32 and len(parameters) > 2 and not any(shape in item.name for shape in HALF_SHAPES)

    dropped = [item for item in items if refused(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in set(dropped)]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Every torch.empty is filled with NaN (integers: their largest value), so an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cuda_kernels_on_the_cpu(request, monkeypatch):
    """Where a test's parameters name the backend "cuda": its kernels, compiled for the CPU (cuda_on_host)."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if any(value == "cuda" or (isinstance(value, tuple) and "cuda" in value) for value in parameters.values()):
        cuda_on_host.emulated(monkeypatch)


@pytest.fixture(params=available_backends())
def backend(request):
    """Runs the test once per backend that this machine has, forced."""
    with gf.backend(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param
