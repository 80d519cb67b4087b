"""The Triton kernels of embedding tables in the interpreter, with tiles and pieces so small that there are many."""

from __future__ import annotations

import importlib

import pytest
import torch
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from gradclust_fast._dispatch import OPS
from gradclust_fast.triton_kernels import _support

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
triangle = importlib.import_module("gradclust_fast.triton_kernels.grad_gram").triangle

pytestmark = pytest.mark.skipif(
    not _support.interpreted() or _support.missing() is not None, reason="needs Triton's interpreter"
)


@pytest.fixture(autouse=True)
def forced():
    with gf.backend("triton"):
        yield


@pytest.fixture
def small(monkeypatch):
    """Gram tiles of 16 positions, moments in pieces of 16, 8 at a time, 16 features each."""
    gram = importlib.import_module("gradclust_fast.triton_kernels.embedding_gram")
    moments = importlib.import_module("gradclust_fast.triton_kernels.embedding_moments")
    monkeypatch.setattr(gram, "pair_tiles", lambda *_: gram.Tiles(16, 16, 4, 4, 1))
    monkeypatch.setattr(moments, "moment_pieces", lambda *_: moments.Pieces(16, 8, 16))


def check(name, index, grad, *more, **options):
    """Near the reference in float64."""
    op = getattr(gf.ops, name)
    found = op(index, grad, *more, **options)
    with gf.backend("reference"):
        wide = [each if each is None else each.double() for each in more]
        oracle, eager = op(index, grad.double(), *wide, **options), op(index, grad, *more, **options)
    if isinstance(found, torch.Tensor):
        found, oracle, eager = (found,), (oracle,), (eager,)
    for each, exact, rough in zip(found, oracle, eager, strict=True):
        assert_close_to_oracle(each, exact, rough, grad.dtype)


TABLES = [  # B, T, V, D, dtype, why
    pytest.param(2, 50, 2, 5, torch.float32, id="rows-of-many-pieces-and-tiles"),
    pytest.param(3, 35, 9, 20, torch.bfloat16, id="rows-begin-and-end-within-tiles"),
    pytest.param(3, 37, 3000, 3, torch.float32, id="hardly-a-common-row"),
    pytest.param(9, 5, 4, 17, torch.float16, id="several-groups-of-short-examples"),
    pytest.param(21, 1, 6, 3, torch.float32, id="one-position"),
]


@pytest.mark.parametrize("B, T, V, D, half", TABLES)
@pytest.mark.parametrize("name", ["embedding_gram", "embedding_moments"])
def test_sums_of_a_tables_rows(small, name, B, T, V, D, half):
    index, grad = torch.randint(V, (B, T)), torch.randn(B, T, D + 1).to(half)
    check(name, index, grad[..., 1:], num_embeddings=V, padding_idx=V // 2)  # an offset: rows are not aligned
    check(name, index.T.contiguous().T, grad[..., :D].mT.contiguous().mT, num_embeddings=V)


@pytest.mark.parametrize("name", ["embedding_gram", "embedding_moments"])
def test_a_row_that_one_example_repeats_past_its_piece(small, name):
    index, grad = torch.randint(3, (3, 36)), torch.randn(3, 36, 3)
    index[1] = 1  # 36 positions in pieces of 16: some programs have no example of their own
    for padding_idx in (None, 1):
        check(name, index, grad, num_embeddings=3, padding_idx=padding_idx)
    check(name, torch.zeros(1, 40, dtype=torch.long), torch.randn(1, 40, 3), num_embeddings=1)


def test_a_row_whose_parts_lie_many_pieces_apart(monkeypatch):
    moments = importlib.import_module("gradclust_fast.triton_kernels.embedding_moments")
    monkeypatch.setattr(moments, "moment_pieces", lambda *_: moments.Pieces(4, 64, 16))
    index, grad = torch.zeros(3, 75, dtype=torch.long), torch.randn(3, 75, 3)  # an example is 18 pieces long
    check("embedding_moments", index, grad, num_embeddings=2)


def test_many_examples_of_one_row_keep_their_digits():
    grad = 1000 + torch.randn(500, 4, 2)
    first, second = gf.ops.embedding_moments(torch.zeros(500, 4, dtype=torch.long), grad, num_embeddings=2)
    sums = grad.double().sum(1)
    torch.testing.assert_close(first[0].double(), sums.sum(0), rtol=3e-6, atol=0)
    torch.testing.assert_close(second[0].double(), sums.square().sum(0), rtol=3e-6, atol=0)
    assert not first[1].any() and not second[1].any()


@pytest.mark.parametrize("T", [1, 4, 20])
def test_a_row_that_is_not_shared_keeps_its_nan_to_itself(small, T):
    index, grad = torch.randint(1, 5, (5, T)), torch.randn(5, T, 3)
    index[2, 0], grad[2, 0, 1] = 0, float("nan")
    gram = gf.ops.embedding_gram(index, grad, num_embeddings=5)
    others = torch.arange(5) != 2
    assert gram[2, 2].isnan() and gram[2, others].isfinite().all()
    assert torch.equal(gram.nan_to_num(), gram.mT.nan_to_num())
    first, second = gf.ops.embedding_moments(index, grad, num_embeddings=5)
    for out in (first, second):
        assert out[0, 1].isnan() and out.isfinite().sum() == out.numel() - 1


@pytest.mark.parametrize("V", [5_000_000, 2**62])
def test_examples_meet_in_a_table_of_any_size(small, V):
    index, few = torch.randint(9, (2, 40)), V // 9
    grad = torch.randn(2, 40, 3)
    spread = gf.ops.embedding_gram(index * few, grad, num_embeddings=V)
    assert torch.equal(spread, gf.ops.embedding_gram(index, grad, num_embeddings=9))


PRODUCTS = [  # B, T, D, P, Q or K, dtype, why
    pytest.param(2, 1, 1, 1, 1, torch.float32, id="all-ones"),
    pytest.param(70, 1, 5, 3, 4, torch.bfloat16, id="one-position-several-groups"),
    pytest.param(5, 7, 70, 35, 34, torch.float32, id="several-tiles-of-columns"),
    pytest.param(3, 9, 7, 4, 3, torch.float16, id="short"),
    pytest.param(2, 150, 17, 3, 5, torch.bfloat16, id="long-and-split"),
]


@pytest.mark.parametrize("B, T, D, P, Q, half", PRODUCTS)
def test_products_summed_over_positions(B, T, D, P, Q, half):
    V = 11
    index, grad = torch.randint(V, (B, T)), torch.randn(B, T, D).to(half)
    left, right = torch.randn(V, P).to(half), torch.randn(D, Q).to(half)
    check("embedding_sketch", index, grad, left, right, num_embeddings=V, padding_idx=3)
    check("embedding_sketch", index, grad, left.mT.contiguous().mT, None, num_embeddings=V)
    for lead in ((Q,), (Q, 2)):
        centers = torch.randn(*lead, V).to(half), torch.randn(*lead, D).to(half)
        check("embedding_dot", index, grad, *centers, num_embeddings=V, padding_idx=-1)
    columns = torch.randn(V, Q).to(half).mT, torch.randn(D, Q).to(half).mT
    check("embedding_dot", index, grad, *columns, num_embeddings=V)


@pytest.mark.parametrize("T", [1, 6, 70])
def test_what_nobody_looks_up_may_be_nan(T):
    index, grad = torch.randint(1, 6, (4, T)), torch.randn(4, T, 6)
    left, right = torch.randn(6, 3), torch.randn(6, 4)
    centers = torch.randn(5, 6), torch.randn(5, 6)
    index[:, T // 2] = 0
    grad[:, T // 2] = float("inf")
    left[0], centers[0][:, 0] = float("nan"), float("nan")
    for more, name in (((left, right), "embedding_sketch"), (centers, "embedding_dot")):
        clean = getattr(gf.ops, name)(index, grad, *more, num_embeddings=6, padding_idx=0)
        assert clean.isfinite().all()
        if T > 1:
            grad[2, 0, 3] = float("nan")
            out = getattr(gf.ops, name)(index, grad, *more, num_embeddings=6, padding_idx=0)
            grad[2, 0, 3] = 1
            assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]]) and out[2].isnan().any()


def test_what_cannot_run_says_why():
    index, grad = torch.randint(9, (2, 3)), torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="without left the sketch is as large as the table"):
        gf.ops.embedding_sketch(index, grad, None, torch.randn(4, 2), num_embeddings=9)
    more = {"embedding_sketch": (torch.ones(9, 2),), "embedding_dot": (torch.ones(2, 9), torch.ones(2, 4))}
    for name in ("embedding_sqnorm", "embedding_sketch", "embedding_dot", "embedding_gram", "embedding_moments"):
        wide = [each.double() for each in more.get(name, ())]
        with pytest.raises(RuntimeError, match=f"{name}: .*float64 factors need float64; use"):
            getattr(gf.ops, name)(index, grad.double(), *wide, num_embeddings=9)
    many = torch.empty(2**16, 1, dtype=torch.long, device="meta")
    with _support.recording((9, 0), 132), pytest.raises(RuntimeError, match="fewer than 2¹⁶ examples"):
        OPS["embedding_gram"].run(many, torch.empty(2**16, 1, 1, device="meta"), 9, None)


def test_empty_results():
    for B, T, D in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        index, grad = torch.randint(9, (B, T)), torch.randn(B, T, D)
        assert torch.equal(gf.ops.embedding_gram(index, grad, num_embeddings=9), torch.zeros(B, B))
        assert all(not m.any() for m in gf.ops.embedding_moments(index, grad, num_embeddings=9))
        sides, centers = (torch.randn(9, 2), torch.randn(D, 5)), (torch.randn(6, 2, 9), torch.randn(6, 2, D))
        assert torch.equal(gf.ops.embedding_sketch(index, grad, *sides, num_embeddings=9), torch.zeros(B, 2, 5))
        assert torch.equal(gf.ops.embedding_dot(index, grad, *centers, num_embeddings=9), torch.zeros(B, 6))
    no_rank = gf.ops.embedding_dot(index, grad, torch.ones(3, 0, 9), torch.ones(3, 0, 0), num_embeddings=9)
    assert torch.equal(no_rank, torch.zeros(2, 3))


@triton.jit
def triangle_kernel(index_ptr, i_ptr, j_ptr):
    i, j = triangle(tl.load(index_ptr + tl.program_id(0)))
    tl.store(i_ptr + tl.program_id(0), i)
    tl.store(j_ptr + tl.program_id(0), j)


def test_pairs_of_tens_of_thousands_of_examples_are_counted_right():
    rows = torch.tensor([0, 1, 2, 1000, 46340, 46341, 46342, 60000, 65533, 65534])
    i = rows.repeat_interleave(3)
    j = torch.stack([torch.zeros_like(rows), rows // 2, rows], 1).flatten()
    index = (i * (i + 1) // 2 + j).int()
    found = torch.empty_like(index), torch.empty_like(index)
    _support.launch(triangle_kernel, (index.numel(),), index, *found, device=index.device)
    assert found[0].tolist() == i.tolist() and found[1].tolist() == j.tolist()
