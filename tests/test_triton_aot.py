"""The Triton kernels compiled for the GPUs they are for, where there is none: one process without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradclust_fast._dispatch import OPS
from gradclust_fast.triton_kernels import _support

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(_support.missing() is not None, reason=str(_support.missing()))


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    cache = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "triton_aot.py"],
        env=environment | {"PYTHONPATH": path, "TRITON_CACHE_DIR": cache}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(lines):
    return [line for line in lines if "kernel" in line]


def test_every_op_with_a_triton_kernel_is_compiled_for_both_architectures(compiled):
    wanted = {(op, arch) for op, entry in OPS.items() if "triton" in entry.kernels for arch in (80, 90)}
    assert {(each["case"].split(":")[0], each["arch"]) for each in compiled} == wanted


def test_nothing_spills_and_everything_fits(compiled):
    faults = [f"sm_{each['arch']} {each['kernel']} ({each['constants']}): {each['fault']}" for each in compiled]
    assert not [fault for fault, each in zip(faults, compiled) if each["fault"]]
    assert all(0 < each["registers"] <= 255 and each["spills"] == 0 for each in compiled)


def test_half_precision_products_run_on_hoppers_tensor_cores(compiled):
    tiles = [each for each in compiled if each["arch"] == 90 and each["products"] >= 64]
    assert tiles and all(each["wgmma"] for each in tiles)
    assert all(each["mma"] for each in compiled if each["arch"] == 80 and each["products"])


def test_batch_and_sequence_lengths_do_not_recompile(lines):
    found = {line["calls"]: line["keys"] for line in lines if "calls" in line}
    assert found
    assert not {name: keys for name, keys in found.items() if set(keys.values()) != {1}}
