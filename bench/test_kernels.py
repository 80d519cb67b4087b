"""The kernel benchmarks under pytest-benchmark, for its own tools (histograms, profiles, its --benchmark-compare):

    pytest bench/test_kernels.py -k "grad_dot" --benchmark-group-by=param:op

It times a case's functions one after the other. The published ratios come from ``gradclust bench``, which interleaves
them: on a shared machine, two stretches of time are two different machines.
"""

from __future__ import annotations

import importlib
import itertools
from functools import lru_cache
from typing import Any

import pytest

from bench.harness import Case
from bench.run import available_ops, cases_of


def parameters() -> list[Any]:
    """(op, number of the case, function) of every row; meta tensors give the labels without allocating anything."""
    found = []
    for op in available_ops():
        for number, case in enumerate(cases_of(importlib.import_module(f"bench.kernels.bench_{op}"), "meta")):
            for name in ("ours", *case.baselines):
                found.append(pytest.param(op, number, name, id=f"{op}, {case.label}, {name}"))
    return found


@lru_cache(maxsize=1)
def built(op: str, number: int) -> Case:
    cases = cases_of(importlib.import_module(f"bench.kernels.bench_{op}"), "cpu")
    return next(itertools.islice(cases, number, None))


@pytest.mark.parametrize(("op", "number", "function"), parameters())
def test_kernel(op: str, number: int, function: str, benchmark: Any) -> None:
    case = built(op, number)
    benchmark(case.ours if function == "ours" else case.baselines[function])
