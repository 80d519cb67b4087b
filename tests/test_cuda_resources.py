"""What the compiled CUDA kernels take of a multiprocessor, read from the native module: no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from gradclust_fast import _native


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found is None and (triton := importlib.util.find_spec("triton")) is not None and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    return found


pytestmark = [
    pytest.mark.skipif(not getattr(_native._C, "cuda", False), reason=f"no CUDA kernels: {_native.cuda_unavailable()}"),
    pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump is neither on PATH nor in Triton's package"),
]
REGISTERS = {  # most that a kernel may take, by what it needs to hide latency behind
    "conv_sqnorm_tensor_kernel": 168,  # three blocks of 128 threads
    "conv_sqnorm_scalar_kernel": 168,
    "conv_sqnorm_correlate_kernel": 128,  # two blocks of 256
    "conv_moments_tensor_kernel": 255,  # three sums of a tile
    "conv_moments_scalar_kernel": 255,
    "conv_moments_correlate_kernel": 128,
    "conv_products_tensor_kernel": 168,  # three blocks of 128: the tile and 20 numbers of the sides
    "conv_products_scalar_kernel": 168,
    "conv_products_correlate_kernel": 128,
    "exact_moves_sweep_kernel": 128,  # two blocks of 256
    "cluster_objective_kernel": 128,
    "embedding_sqnorm_kernel": 64,  # two blocks of 512
    "embedding_gram_kernel": 64,  # eight blocks of 128
    "embedding_products_kernel": 192,  # float64's; two blocks of 256 of the others
    "embedding_moments_kernel": 128,  # two blocks of 256: three sums of up to 8 features
    "cluster_sums_pieces_kernel": 64,  # four blocks of 256
    "grad_sqnorm_rank1_kernel": 64,
    "norm_grads_stats_kernel": 64,
    "norm_grads_rows_kernel": 80,  # three blocks of 256
    "norm_grads_channels_kernel": 64,
    "random_signs_kernel": 64,
    "sign_product_kernel": 192,  # float64's; two blocks of 256 of the others
}


@cache
def dump(option: str) -> str:
    return subprocess.run([cuobjdump(), option, _native._C.__file__], capture_output=True, text=True, check=True).stdout


@cache
def resources() -> list[tuple[str, int, int, int]]:
    """(kernel, registers, stack bytes, static shared bytes) of every kernel for every architecture."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        (name, int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(pattern, dump("--dump-resource-usage"))
    ]


def test_every_kernel_is_there():
    names = " ".join(name for name, *_ in resources())
    assert all(kernel in names for kernel in REGISTERS)


def test_no_kernel_spills_or_takes_static_shared_memory():
    reserved = 1024  # by CUDA itself, from sm_90 on
    assert [row for row in resources() if row[2] or row[3] > reserved] == []


@pytest.mark.parametrize("kernel", REGISTERS)
def test_registers_leave_room_for_the_blocks_that_hide_latency(kernel):
    taken = [registers for name, registers, *_ in resources() if kernel in name]
    assert taken and max(taken) <= REGISTERS[kernel]


def test_tiles_use_asynchronous_copies_matrix_loads_and_tensor_cores():
    functions = re.split(r"\n\s*Function : ", dump("--dump-sass"))
    tiles = [text for text in functions[1:] if "_tensor_kernel" in text.split("\n", 1)[0]]
    assert tiles
    for text in tiles:
        assert "LDGSTS" in text and "HMMA" in text
        assert ("LDSM" in text) == ("kernelIf" not in text.split("\n", 1)[0]), "float32 has no transposing matrix load"


def test_tiles_of_16_bit_factors_use_bulk_copies_from_sm_90_on():
    found = set()
    for module in re.split(r"\narch = sm_", dump("--dump-sass"))[1:]:
        architecture = int(re.match(r"\d+", module)[0])
        for text in re.split(r"\n\s*Function : ", module)[1:]:
            name = text.split("\n", 1)[0]
            if re.search("conv_.*_tensor_kernel", name):
                bulk = architecture >= 90 and "kernelIf" not in name
                found.add(bulk)
                assert all((word in text) == bulk for word in ("UTMALDG", "SYNCS.PHASECHK")), (architecture, name)
    assert True in found


def test_products_with_signs_take_tensor_cores_and_leave_room_for_two_blocks():
    functions = re.split(r"\n\s*Function : ", dump("--dump-sass"))
    products = [text for text in functions[1:] if "sign_product_kernel" in text.split("\n", 1)[0]]
    assert products
    for text in products:
        assert ("DMMA" if "sign_product_kernelId" in text.split("\n", 1)[0] else "HMMA") in text
    taken = {name: registers for name, registers, *_ in resources() if "sign_product_kernel" in name}
    assert all(registers <= 128 for name, registers in taken.items() if "sign_product_kernelId" not in name)


def test_sweeps_of_exact_moves_take_float64_tensor_cores():
    functions = re.split(r"\n\s*Function : ", dump("--dump-sass"))
    sweeps = [text for text in functions[1:] if "exact_moves_sweep_kernel" in text.split("\n", 1)[0]]
    assert sweeps and all("DMMA" in text for text in sweeps)
