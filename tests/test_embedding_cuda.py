"""The CUDA kernels of embedding tables, compiled for the CPU, on sizes that fill more than one warp, tile and split."""

from __future__ import annotations

import cuda_on_host
import pytest
import torch
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

pytestmark = pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable()))
ORDERS = (0, 2)


@pytest.fixture
def emulator(monkeypatch):
    with gf.backend("cuda"):
        yield cuda_on_host.emulated(monkeypatch)


def check(emulator, name, index, grad, *more, **options):
    """In every order of threads the same bits, and those near the reference in float64."""
    op = getattr(gf.ops, name)
    results = []
    for order in ORDERS:
        emulator.set_order(order)
        out = op(index, grad, *more, **options)
        results.append(out if isinstance(out, tuple) else (out,))
    with gf.backend("reference"):
        wide = [each if each is None else each.double() for each in more]
        oracle, eager = op(index, grad.double(), *wide, **options), op(index, grad, *more, **options)
    if isinstance(oracle, torch.Tensor):
        oracle, eager = (oracle,), (eager,)
    for first, *others, exact, rough in zip(*results, oracle, eager, strict=True):
        assert all(torch.equal(first, other) for other in others), "the order of threads shows"
        assert_close_to_oracle(first, exact, rough, grad.dtype)


TABLES = [  # B, T, V, D, why
    pytest.param(1, 1, 1, 1, id="all-ones"),
    pytest.param(3, 70, 2, 5, id="rows-go-on-past-the-loads-under-way"),
    pytest.param(3, 150, 40, 72, id="several-warps-of-positions-and-features"),
    pytest.param(5, 9, 5000, 33, id="hardly-a-common-row"),
]


@pytest.mark.parametrize("B, T, V, D", TABLES)
@pytest.mark.parametrize("name", ["embedding_gram", "embedding_moments"])
def test_sums_of_a_tables_rows(emulator, name, dtype, B, T, V, D):
    index, grad = torch.randint(V, (B, T)), torch.randn(B, T, D + 1).to(dtype)
    for values in (grad[..., :D].contiguous(), grad[..., 1:]):  # aligned where D allows it, and never
        check(emulator, name, index, values, num_embeddings=V, padding_idx=V - 1)
    check(emulator, name, index.T, grad.movedim(0, 1)[..., :D], num_embeddings=V)


PRODUCTS = [  # B, T, D, P or rank, Q or K, why
    pytest.param(2, 1, 1, 1, 1, id="all-ones"),
    pytest.param(3, 70, 20, 3, 5, id="two-chunks-each-a-split"),
    pytest.param(1, 200, 17, 2, 70, id="two-tiles-of-columns"),
    pytest.param(20, 3, 4, 1, 2, id="one-split"),
]


@pytest.mark.parametrize("B, T, D, P, Q", PRODUCTS)
def test_products_summed_over_positions(emulator, dtype, B, T, D, P, Q):
    V = 11
    index, grad = torch.randint(V, (B, T)), torch.randn(B, T, D).to(dtype)
    left, right = torch.randn(V, P).to(dtype), torch.randn(D, Q).to(dtype)
    for sides in ((left, right), (left, None), (torch.randn(V, 66).to(dtype)[:, : max(P, 65) if B == 1 else P], right)):
        check(emulator, "embedding_sketch", index, grad, *sides, num_embeddings=V, padding_idx=3)
    for lead in ((Q,), (Q, P)):
        centers = torch.randn(*lead, V).to(dtype), torch.randn(*lead, D).to(dtype)
        check(emulator, "embedding_dot", index, grad, *centers, num_embeddings=V, padding_idx=-1)


def test_a_split_of_several_chunks(emulator):
    index, grad = torch.randint(5, (140, 130)), torch.randn(140, 130, 2)
    check(emulator, "embedding_sketch", index, grad, torch.randn(5, 1), None, num_embeddings=5)


def test_nan_stays_in_its_own_example_and_out_of_the_padding_row(emulator):
    index, grad = torch.randint(1, 6, (4, 80)), torch.randn(4, 80, 6)
    index[:, ::7] = 0
    sides = torch.randn(6, 3), torch.randn(6, 4)
    sides[0][0] = float("nan")  # nobody looks it up but the padding positions
    grad[:, ::7] = float("inf")
    clean = gf.ops.embedding_sketch(index, grad, *sides, num_embeddings=6, padding_idx=0)
    assert clean.isfinite().all()
    grad[2, 1, 3] = float("nan")
    out = gf.ops.embedding_sketch(index, grad, *sides, num_embeddings=6, padding_idx=0)
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]]) and out[2].isnan().any()


def test_a_sketch_as_large_as_the_table_is_refused_and_short_examples_are_left_to_others(emulator):
    index, grad = torch.randint(9, (2, 3)), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="without left the sketch is as large as the table"):
        gf.ops.embedding_sketch(index, grad, None, torch.randn(4, 2), num_embeddings=9)
    with gf.backend("auto"):
        for T, chosen in ((15, False), (16, True)):
            args = torch.randint(9, (2, T)), torch.randn(2, T, 4), torch.randn(9, 2), torch.randn(4, 2)
            plan = gf.explain("embedding_sketch", *args, num_embeddings=9)
            assert (plan.backend == "cuda") == chosen
            assert chosen or "most of a block would be idle" in plan.others["cuda"]


def test_empty_results(emulator):
    index, grad = torch.randint(9, (2, 3)), torch.randn(2, 3, 4)
    for B, T, D in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        index, grad = torch.randint(9, (B, T)), torch.randn(B, T, D)
        assert torch.equal(gf.ops.embedding_gram(index, grad, num_embeddings=9), torch.zeros(B, B))
        assert all(not m.any() for m in gf.ops.embedding_moments(index, grad, num_embeddings=9))
        sides, centers = (torch.randn(9, 2), torch.randn(D, 5)), (torch.randn(6, 2, 9), torch.randn(6, 2, D))
        assert torch.equal(gf.ops.embedding_sketch(index, grad, *sides, num_embeddings=9), torch.zeros(B, 2, 5))
        assert torch.equal(gf.ops.embedding_dot(index, grad, *centers, num_embeddings=9), torch.zeros(B, 6))
    assert (
        gf.ops.embedding_dot(index, grad, torch.ones(3, 0, 9), torch.ones(3, 0, 0), num_embeddings=9).tolist()
        == [[0.0] * 3] * 2
    )
