"""The random matrices of sketches from the CUDA kernel, compiled for the CPU: the bits of the definition."""

from __future__ import annotations

import cuda_on_host
import pytest
import torch

import gradclust_fast as gf
from gradclust_fast import sketching
from gradclust_fast.ops._random_signs import random_signs_cuda

pytestmark = pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable()))
ORDERS = [0, 1, 2, 3]


@pytest.fixture
def emulator(monkeypatch):
    with gf.backend("cuda"):
        yield cuda_on_host.emulated(monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, cols", [(0, 3), (3, 0), (1, 1), (5, 127), (3, 128), (4, 132), (2, 1000), (300, 36)])
def test_random_signs_are_the_definitions_bits(emulator, rows, cols, dtype):
    key, scale = (0x12345678, 0x9ABCDEF0), 0.3
    expected = sketching.sign_matrix(rows, cols, key, dtype, torch.device("cpu")) * scale
    for order in ORDERS:
        emulator.set_order(order)
        for transposed in (False, True):
            out = random_signs_cuda(rows, cols, key, dtype, torch.device("cpu"), scale, transposed)
            assert torch.equal(out, expected.T if transposed else expected) and out.is_contiguous()


def test_a_sketch_takes_its_matrices_from_the_kernel(emulator, monkeypatch):
    found = gf.Sketch(dim=40, seed=3).matrices("layer.weight", (50, 70), torch.float32, torch.device("cpu"))
    with gf.backend("reference"):
        monkeypatch.setattr(sketching._random_signs, "random_signs_cuda", None)
        expected = gf.Sketch(dim=40, seed=3).matrices("layer.weight", (50, 70), torch.float32, torch.device("cpu"))
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected))
