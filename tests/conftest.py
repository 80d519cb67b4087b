from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast._dispatch import OPS
from gradclust_fast.triton_kernels import _support

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def available_backends() -> list[str]:
    names = ["reference"]
    if _native.cpu_unavailable() is None:
        names.append("cpu")
    if _support.unavailable(torch.device("cpu")) is None:
        names.append("triton")
    return names


def pytest_collection_modifyitems(config, items):
    """Leaves out what Triton refuses: ops without a Triton kernel, and float64."""

    def refused(item):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("backend") != "triton":
            return False
        op = OPS.get(item.path.stem.removeprefix("test_"))
        return op is None or "triton" not in op.kernels or parameters.get("dtype") == torch.float64

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


@pytest.fixture(params=available_backends())
def backend(request):
    """Runs the test once per backend that this machine has, forced."""
    with gf.backend(request.param):
        yield request.param


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param
