from __future__ import annotations

import pytest
import torch

import gradclust_fast as gf
from gradclust_fast import _native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def available_backends() -> list[str]:
    names = ["reference"]
    if _native.cpu_unavailable() is None:
        names.append("cpu")
    return names


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
