"""What the emulator of CUDA must notice, and kernels whose op has no test file that runs on it.

The test files of the other ops with CUDA kernels run them on the emulator as one backend more.
"""

from __future__ import annotations

import cuda_on_host
import pytest
import torch
from linear_cases import GRID, eager_grads, factors
from oracle import linear_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

pytestmark = pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable()))
FAULTS = ["none", "no_barrier", "no_wait", "overrun", "split_warp", "lone_barrier", "early_exit"]
ORDERS = [0, 1, 2, 3]
"""Threads and blocks ascending, descending, and two shuffles."""
ONE_POSITION = [(case.values[0], *case.values[2:]) for case in GRID if case.values[1] in ((), (1,))]


@pytest.fixture
def emulator(monkeypatch):
    with gf.backend("cuda"):
        yield cuda_on_host.emulated(monkeypatch)


def reverse(emulator, fault: str, order: int) -> bool:
    """Whether a kernel with this fault reverses 128 numbers."""
    emulator.set_order(order)
    values, out = torch.arange(128.0), torch.full((128,), float("nan"))
    emulator.reverse(values.data_ptr(), out.data_ptr(), 128, FAULTS.index(fault))
    return torch.equal(out, values.flip(0))


@pytest.mark.parametrize("order", ORDERS)
def test_the_right_kernel_is_right_in_every_order_of_threads(emulator, order):
    assert reverse(emulator, "none", order)


@pytest.mark.parametrize("fault", ["no_barrier", "no_wait"])
def test_what_was_not_waited_for_reads_as_nan(emulator, fault):
    assert not any(reverse(emulator, fault, order) for order in ORDERS)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("overrun", "wrote past the end of its shared memory"),
        ("split_warp", "lanes of one warp meet in different collectives|others never reach"),
        ("lone_barrier", "others never reach"),
        ("early_exit", "others never reach"),
    ],
)
def test_what_a_gpu_would_not_forgive_is_an_error_with_the_kernels_name(emulator, fault, message):
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=rf"reverse_kernel \(test\): .*({message})"):
            reverse(emulator, fault, order)
        assert reverse(emulator, "none", order), "a failed launch must not spoil the next"


def neighbours(emulator, fault: str, order: int) -> bool:
    """Whether blocks of a cooperative launch read what the others wrote."""
    emulator.set_order(order)
    values, between, out = torch.arange(96.0), torch.full((96,), float("nan")), torch.full((96,), float("nan"))
    emulator.neighbours(values.data_ptr(), between.data_ptr(), out.data_ptr(), 3, FAULTS.index(fault))
    return torch.equal(out, values.roll(1))


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_of_a_cooperative_launch_wait_for_each_other(emulator, order):
    assert neighbours(emulator, "none", order)
    assert not neighbours(emulator, "no_barrier", order)
    with pytest.raises(RuntimeError, match=r"neighbours_kernel \(test\): .*others never reach"):
        neighbours(emulator, "early_exit", order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "B, I, O", [(case.values[0], *case.values[2:]) for case in GRID if case.values[1] in ((), (1,))]
)
def test_grad_sqnorm_of_one_position(emulator, dtype, B, I, O, bias, order):
    emulator.set_order(order)
    act, grad = factors(B, (), I, O, dtype)
    oracle = linear_grads(act, grad, bias).square().sum((1, 2))
    eager = eager_grads(act, grad, bias).square().sum((1, 2))
    assert_close_to_oracle(gf.ops.grad_sqnorm(act, grad, bias=bias), oracle, eager, dtype)
    wide = torch.cat([act, act], 1)[:, : I + 3]  # rows that no 16-byte load may start at
    assert_close_to_oracle(gf.ops.grad_sqnorm(wide[:, :I], grad, bias=bias), oracle, eager, dtype)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_the_rounding_of_a_million_equal_squares_does_not_add_up(emulator, offset):
    act, grad = torch.full((2, (1 << 20) + offset), 1.1)[:, offset:], torch.full((2, 3), 0.7)
    expected = act.double().square().sum(1) * grad.double().square().sum(1)
    torch.testing.assert_close(gf.ops.grad_sqnorm(act, grad).double(), expected, rtol=3e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("R", [3, 8, 300])
def test_cluster_sums_in_every_order_of_threads(emulator, dtype, order, R):
    points, labels = torch.randn(700, R).to(dtype), torch.randint(0, 4, (700,)) * 2
    with gf.backend("reference"):
        expected = gf.ops.cluster_sums(points, labels, 8)
    emulator.set_order(order)
    sums, counts = gf.ops.cluster_sums(points, labels, 8)
    torch.testing.assert_close(sums, expected[0], rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=1e-5)
    assert torch.equal(counts, expected[1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("T, V", [(1, 3), (9, 2), (40, 1), (130, 40), (133, 4), (300, 1000)])
def test_embedding_rows_that_go_on_into_the_next_warp(emulator, dtype, T, V, order):
    emulator.set_order(order)
    index, grad = torch.randint(V, (3, T)), torch.randn(3, T, 136).to(dtype)
    index[0] = index[0, 0]
    for values in (grad, grad[..., 1:]):  # 16-byte reads, and one number a lane
        with gf.backend("reference"):
            oracle = gf.ops.embedding_sqnorm(index, values.double(), num_embeddings=V, padding_idx=V - 1)
            eager = gf.ops.embedding_sqnorm(index, values, num_embeddings=V, padding_idx=V - 1)
        out = gf.ops.embedding_sqnorm(index, values, num_embeddings=V, padding_idx=V - 1)
        assert_close_to_oracle(out, oracle, eager, dtype)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape, groups", [((2, 37, 40), None), ((1, 100, 3), None), ((2, 24, 9, 8), 4)])
def test_norm_grads_in_every_order_of_threads(emulator, dtype, shape, groups, order):
    emulator.set_order(order)
    input, grad = (3 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)
    with gf.backend("reference"):
        oracle = gf.ops.norm_grads(input.double(), grad.double(), groups=groups)
        eager = gf.ops.norm_grads(input, grad, groups=groups)
    for found, exact, rough in zip(gf.ops.norm_grads(input, grad, groups=groups), oracle, eager):
        assert_close_to_oracle(found, exact, rough, dtype)
