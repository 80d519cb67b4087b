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


EXTENT, STEP = (24, 3, 7, 5, 2), (1, 1, 2, 1, 1)
"""Of a tensor in memory order [2, 5, 7, 3, 24], innermost dimension first; every second element of the third."""
CORNERS = [(0, 0, -3, 0, 0), (16, 1, 1, 3, 1)]
"""Boxes that begin before the tensor's third dimension, and that end after the others."""
BULK_FAULTS = [
    "right", "unwaited", "same_parity", "other_parity", "too_few_bytes", "too_many_bytes", "unfenced", "unopened",
    "opened_twice", "written_over", "misaligned", "past_the_end", "overlapping", "unread", "closed_early",
    "arrives_twice",
]  # fmt: skip


def boxes(emulator, order: int, fault: str = "right", line: int = 64, **changed) -> tuple[bool, torch.Tensor, list]:
    """Whether there is a tensor map, two of its boxes, as they lie in shared memory, and the same by indexing."""
    emulator.set_order(order)
    tensor = torch.randint(1, 2**15, EXTENT[::-1], dtype=torch.int16)
    arguments = {"stride": tensor.stride()[::-1], "count": (line // 2, 2, 5, 3, 1), "step": STEP} | changed
    out = torch.full((2, 1, 3, 5, 2, line // 2), -1, dtype=torch.int16)  # NaN
    made = emulator.boxes(
        tensor.data_ptr(), EXTENT, arguments["stride"], arguments["count"], arguments["step"], line, CORNERS,
        out.data_ptr(), BULK_FAULTS.index(fault),
    )  # fmt: skip
    return made, out, [box_by_indexing(tensor, corner, out.shape[1:]) for corner in CORNERS]


def box_by_indexing(tensor, corner, shape) -> torch.Tensor:
    at = [first + step * torch.arange(n) for first, step, n in zip(corner, STEP, shape[::-1])][::-1]
    values = tensor[torch.meshgrid(*(x.clamp(0, n - 1) for x, n in zip(at, tensor.shape)), indexing="ij")]
    inside = torch.meshgrid(*((x >= 0) & (x < n) for x, n in zip(at, tensor.shape)), indexing="ij")
    return values * torch.stack(inside).all(0)


def unswizzled(box: torch.Tensor, line: int) -> torch.Tensor:
    """The box with each unit of 16 bytes back at its place, which changed with the number of its 128 bytes."""
    units = box.reshape(-1, 8)
    number = torch.arange(len(units))
    return units[number ^ (number // 8 % (line // 16))].view(box.shape)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("line", [16, 32, 64, 128])
def test_bulk_copies_bring_boxes_swizzled_with_zeros_outside(emulator, line, order):
    made, out, expected = boxes(emulator, order, line=line)
    assert made
    for found, box in zip(out, expected):
        assert torch.equal(unswizzled(found, line), box) and (box == 0).any() and (box != 0).any()


@pytest.mark.parametrize("fault", ["unwaited", "same_parity", "other_parity", "unread"])
def test_a_bulk_copy_that_is_not_waited_for_is_an_error_or_reads_as_nan(emulator, fault):
    for order in ORDERS:
        try:
            made, out, _ = boxes(emulator, order, fault)
        except RuntimeError as error:
            assert "boxes_kernel (test): " in str(error)
        else:
            assert made and (out == -1).any()


@pytest.mark.parametrize(
    "fault, message",
    [
        ("too_few_bytes", "more bytes than their barrier expects|others never reach"),
        ("too_many_bytes", "a phase that others never reach"),
        ("unfenced", "no fence towards it"),
        ("unopened", "a barrier that is not open"),
        ("opened_twice", "opened twice"),
        ("written_over", "was written over"),
        ("misaligned", "not 128-byte aligned"),
        ("past_the_end", "past the end of shared memory"),
        ("overlapping", "two bulk copies under way to one place"),
        ("closed_early", "closed in the midst of a phase"),
        ("arrives_twice", "second arrival"),
    ],
)
def test_wrong_use_of_bulk_copies_is_an_error_with_the_kernels_name(emulator, fault, message):
    for order in ORDERS:
        with pytest.raises(RuntimeError, match=rf"boxes_kernel \(test\): .*({message})"):
            boxes(emulator, order, fault)
        assert boxes(emulator, order)[0], "a failed launch must not spoil the next"


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": (1, 20, 72, 504, 2520)},  # 40 bytes
        {"stride": (1, 24, 0, 504, 2520)},  # an expanded dimension
        {"count": (32, 1, 200, 1, 1)},  # 400 numbers wide, by its step
        {"step": (1, 9, 1, 1, 1)},
    ],
)
def test_tensor_maps_that_the_driver_would_refuse_are_not_made(emulator, changed):
    assert not boxes(emulator, 0, **changed)[0]
