"""The ops of embedding tables against autograd of F.embedding, one example at a time."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conftest import DTYPES
from oracle import embedding_grads
from tolerances import assert_close_to_oracle

import gradclust_fast as gf

OPS = ["embedding_sqnorm", "embedding_sketch", "embedding_dot", "embedding_gram", "embedding_moments"]
GRID = [  # B, positions, V, D, padding_idx, why
    pytest.param(0, (3,), 5, 4, None, id="empty-batch"),
    pytest.param(3, (0,), 5, 4, 1, id="no-positions"),
    pytest.param(1, (), 1, 1, None, id="all-ones"),
    pytest.param(5, (), 9, 3, -1, id="one-position-without-a-dimension"),
    pytest.param(4, (7,), 3, 33, None, id="every-row-repeats"),
    pytest.param(4, (7,), 3, 33, 1, id="padding"),
    pytest.param(3, (2, 5), 40, 17, -40, id="two-position-dims-padding-from-the-end"),
    pytest.param(19, (9,), 6, 23, 0, id="several-blocks-of-examples"),
    pytest.param(37, (4,), 30, 140, None, id="several-blocks-of-features"),
    pytest.param(2, (300,), 50, 8, None, id="several-blocks-of-positions"),
    pytest.param(3, (5,), 7, 0, None, id="no-features"),
    pytest.param(2, (6,), 1, 5, 0, id="everything-is-padding"),
]


def case(B, positions, V, D, dtype=torch.float32, index_dtype=torch.int64):
    return torch.randint(V, (B, *positions), dtype=index_dtype), torch.randn(B, *positions, D).to(dtype)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def extra(what, V, D, dtype=torch.float32, P=4, Q=3, K=6, rank=None):
    """What an op needs beyond index and grad."""
    if what == "embedding_sketch":
        return (
            None if P is None else torch.randn(V, P, dtype=dtype),
            None if Q is None else torch.randn(D, Q, dtype=dtype),
        )
    if what == "embedding_dot":
        lead = (K,) if rank is None else (K, rank)
        return torch.randn(*lead, V, dtype=dtype), torch.randn(*lead, D, dtype=dtype)
    return ()


def from_grads(what, G, *more):
    """The op's results from stored per-example gradients [B, V, D]."""
    more = [None if m is None else m.to(G.dtype) for m in more]
    flat = G.flatten(1)
    if what == "embedding_sqnorm":
        return (flat.square().sum(1),)
    if what == "embedding_gram":
        return (flat @ flat.mT,)
    if what == "embedding_moments":
        return G.sum(0), G.square().sum(0)
    if what == "embedding_sketch":
        left, right = more
        out = G if left is None else left.mT @ G
        return (out if right is None else out @ right,)
    rows, cols = (m if m.dim() == 3 else m.unsqueeze(1) for m in more)
    return (torch.einsum("bvd,krv,krd->bk", G, rows, cols),)


def run(what, index, grad, *more, **options):
    out = getattr(gf.ops, what)(index, grad, *more, **options)
    return out if isinstance(out, tuple) else (out,)


@lru_cache(maxsize=64)
def problem(B, positions, V, D, padding_idx, dtype):
    """index, grad, G_b in float64, and G_b as eager torch computes it in the accumulator's dtype."""
    index, grad = case(B, positions, V, D, dtype)
    return index, grad, *stored(index, grad, V, padding_idx)


def stored(index, grad, V, padding_idx):
    return [embedding_grads(index, grad, V, padding_idx, d) for d in (torch.float64, accumulator(grad.dtype))]


def assert_matches(what, index, grad, more, V, padding_idx=None, grads=None):
    found = run(what, index, grad, *more, num_embeddings=V, padding_idx=padding_idx)
    exact, eager = (from_grads(what, G, *more) for G in grads or stored(index, grad, V, padding_idx))
    for out, oracle, rough in zip(found, exact, eager, strict=True):
        assert out.dtype == accumulator(grad.dtype)
        assert_close_to_oracle(out, oracle, rough, grad.dtype)


def every_dtype(row):
    """Conversion and accumulation differ by dtype, the walk over positions does not: some rows are enough."""
    own = row.id in ("padding", "two-position-dims-padding-from-the-end", "several-blocks-of-features")
    return [pytest.param(*row.values, dtype, id=f"{row.id}-{dtype}") for dtype in (DTYPES if own else DTYPES[:1])]


@pytest.mark.parametrize("B, positions, V, D, padding_idx, dtype", [row for each in GRID for row in every_dtype(each)])
@pytest.mark.parametrize("what", OPS)
def test_matches_one_example_at_a_time(backend, what, B, positions, V, D, padding_idx, dtype):
    index, grad, *grads = problem(B, positions, V, D, padding_idx, dtype)
    assert_matches(what, index, grad, extra(what, V, D, accumulator(dtype)), V, padding_idx, grads)


@pytest.mark.parametrize("what", OPS)
def test_int32_indices_give_the_same_bits(backend, what):
    index, grad = case(4, (6,), 11, 5)
    more = extra(what, 11, 5)
    for a, b in zip(
        run(what, index, grad, *more, num_embeddings=11), run(what, index.int(), grad, *more, num_embeddings=11)
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("P, Q", [(None, 3), (4, None), (None, None), (67, 35)])
def test_sketch_sides(backend, dtype, P, Q):
    index, grad = case(5, (9,), 8, 70, dtype)
    assert_matches("embedding_sketch", index, grad, extra("embedding_sketch", 8, 70, accumulator(dtype), P, Q), 8, 2)


@pytest.mark.parametrize("K, rank", [(1, 1), (5, 3), (70, 2), (6, 0), (0, None)])
def test_dot_centres_with_a_rank(backend, K, rank):
    index, grad = case(5, (9,), 8, 20)
    assert_matches("embedding_dot", index, grad, extra("embedding_dot", 8, 20, K=K, rank=rank), 8)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_matrices_in_the_gradients_half_type(backend, half):
    index, grad = case(3, (4,), 12, 8, half)
    for what in ("embedding_sketch", "embedding_dot"):
        more = [m.to(half) for m in extra(what, 12, 8)]
        (same,) = run(what, index, grad, *(m.float() for m in more), num_embeddings=12)
        assert torch.equal(run(what, index, grad, *more, num_embeddings=12)[0], same)


@pytest.mark.parametrize("what", OPS)
def test_strided_inputs_read_their_own_elements(backend, what):
    index = torch.randint(7, (4, 6, 2)).transpose(0, 1)[::2, :, 1]  # [3, 4]
    grad = torch.randn(5, 3, 4, 2).permute(1, 2, 0, 3)[..., 1]  # [3, 4, 5] with a feature stride
    more = tuple(m.mT.contiguous().mT if m.dim() == 2 else m for m in extra(what, 7, 5))
    assert_matches(what, index, grad, more, 7, 3)


@pytest.mark.parametrize("what", OPS)
def test_an_output_that_serves_every_example_is_read_with_stride_0(backend, what):
    index, grad = torch.arange(6).expand(3, 6), torch.randn(3, 1, 4).expand(3, 6, 4)
    assert_matches(what, index, grad, extra(what, 6, 4), 6)


@pytest.mark.parametrize("what", OPS)
@pytest.mark.parametrize("T", [1, 5, 70])
def test_nan_stays_in_its_own_example(backend, what, T):
    index, grad = case(9, (T,), 6, 9)
    index[4] = index[1]
    more = extra(what, 6, 9)
    clean = run(what, index, grad, *more, num_embeddings=6)
    grad[1, 0, 3], grad[4, -1, 0] = float("nan"), float("inf")
    found = run(what, index, grad, *more, num_embeddings=6)
    others = [0, 2, 3, 5, 6, 7, 8]
    if what == "embedding_moments":
        touched = torch.zeros(6, 9, dtype=torch.bool)
        touched[index[1, 0], 3] = touched[index[4, -1], 0] = True
        for out, same in zip(found, clean):
            assert not out[touched].isfinite().any() and torch.equal(out[~touched], same[~touched])
        return
    (out,), (same,) = found, clean
    assert not out[1].isfinite().all() and not out[4].isfinite().all()
    if what == "embedding_gram":
        assert out[1, 1].isnan() and not out[4, 4].isfinite()
        out, same = out[:, others], same[:, others]
    assert torch.equal(out[others], same[others])


@pytest.mark.parametrize("what", OPS)
def test_what_the_padding_row_would_get_is_nobodys_gradient(backend, what):
    index, grad = case(5, (8,), 6, 9)
    index[:, 2] = 4
    more = extra(what, 6, 9)
    clean = run(what, index, grad, *more, num_embeddings=6, padding_idx=4)
    grad[:, 2] = float("nan")
    for padding_idx in (4, -2):
        found = run(what, index, grad, *more, num_embeddings=6, padding_idx=padding_idx)
        assert all(torch.equal(a, b) for a, b in zip(found, clean))


def test_gram_is_symmetric_to_the_bit_and_zero_without_a_common_row(backend):
    index, grad = case(23, (11,), 60, 5)
    index[3] = 61 + torch.arange(11)
    gram = gf.ops.embedding_gram(index, grad, num_embeddings=72)
    assert torch.equal(gram, gram.mT)
    assert not gram[3, torch.arange(23) != 3].any()


@pytest.mark.parametrize("what", OPS)
def test_same_bits_every_time_and_on_any_number_of_threads(backend, what):
    index, grad = case(12 if backend == "triton" else 40, (33,), 25, 30)  # its interpreter is slow
    more = extra(what, 25, 30)
    first = run(what, index, grad, *more, num_embeddings=25)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3) if backend == "cpu" else (threads,):
            torch.set_num_threads(n)
            again = run(what, index, grad, *more, num_embeddings=25)
            assert all(torch.equal(a, b) for a, b in zip(again, first))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("what", ["embedding_sqnorm", "embedding_gram"])
@pytest.mark.parametrize("V", [5_000_000, 2**62])
def test_nothing_is_as_large_as_the_table(backend, what, V):
    index = torch.tensor([[0, V - 1, 3], [V - 1, 3, 3], [7, V - 2, V - 3]])
    grad = torch.randn(3, 3, 4)
    few = torch.tensor([[0, 1, 2], [1, 2, 2], [3, 4, 5]])
    found = run(what, index, grad, num_embeddings=V, padding_idx=-3)
    expected = from_grads(what, embedding_grads(few, grad, 6, 5))
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-6)


def test_rows_that_collide_in_the_hash_table_stay_apart(backend):
    index = torch.stack([torch.arange(64) * 2**40, torch.arange(64).flip(0) * 2**40])
    grad = torch.randn(2, 64, 3)
    gram = gf.ops.embedding_gram(index, grad, num_embeddings=2**62)
    cross = (grad[0] * grad[1].flip(0)).sum()
    torch.testing.assert_close(gram, torch.tensor([[grad[0].square().sum(), cross], [cross, grad[1].square().sum()]]))


def test_moments_of_a_row_that_everybody_looks_up(backend):
    grad = 1000 + torch.randn(3000, 4, 2)
    first, second = gf.ops.embedding_moments(torch.zeros(3000, 4, dtype=torch.long), grad, num_embeddings=2)
    sums = grad.double().sum(1)
    torch.testing.assert_close(first[0].double(), sums.sum(0), rtol=3e-6, atol=0)
    torch.testing.assert_close(second[0].double(), sums.square().sum(0), rtol=3e-6, atol=0)
    assert not first[1].any() and not second[1].any()


INDEX, GRAD = torch.tensor([[0, 1], [2, 1]]), torch.ones(2, 2, 3)


@pytest.mark.parametrize(
    "index, grad, options, error, message",
    [
        (INDEX.float(), GRAD, {}, TypeError, r"index must be int64 or int32, got torch.float32; use index.long\(\)"),
        (INDEX, GRAD.int(), {}, TypeError, "grad must be float32, float64, bfloat16 or float16, got torch.int32"),
        (torch.tensor(1), GRAD[0, 0], {}, ValueError, r"index must be \[B, \*\], got \[\]"),
        (
            INDEX,
            GRAD[:1],
            {},
            ValueError,
            r"grad must be \[B, \*, D\] with \[B, \*\] = \[2, 2\] \(from index\), got \[1, 2, 3\]",
        ),
        (INDEX, GRAD[..., 0], {}, ValueError, r"grad must be \[B, \*, D\].* got \[2, 2\]"),
        (INDEX, GRAD.to("meta"), {}, ValueError, "grad must be on cpu like index, got meta"),
        (INDEX, GRAD, {"num_embeddings": 2}, ValueError, r"index must lie in \[0, 2\), got index\[1, 0\] = 2"),
        (INDEX - 1, GRAD, {}, ValueError, r"index must lie in \[0, 3\), got index\[0, 0\] = -1"),
        (INDEX, GRAD, {"num_embeddings": -1}, ValueError, "num_embeddings must be at least 0, got -1"),
        (INDEX, GRAD, {"padding_idx": 3}, ValueError, r"padding_idx must lie in \[-3, 3\), got 3"),
        (INDEX, GRAD, {"padding_idx": -4}, ValueError, r"padding_idx must lie in \[-3, 3\), got -4"),
    ],
)
@pytest.mark.parametrize("what", OPS)
def test_wrong_arguments_are_named(backend, what, index, grad, options, error, message):
    options = {"num_embeddings": 3, **options}
    with pytest.raises(error, match=message):
        run(what, index, grad, *extra(what, max(0, options["num_embeddings"]), 3), **options)


@pytest.mark.parametrize(
    "what, more, error, message",
    [
        (
            "embedding_sketch",
            (torch.ones(3, 2), None),
            ValueError,
            r"left must be \[4, P\] \(num_embeddings\), got \[3, 2\]",
        ),
        (
            "embedding_sketch",
            (None, torch.ones(4, 2)),
            ValueError,
            r"right must be \[3, Q\] \(grad's features\), got \[4, 2\]",
        ),
        (
            "embedding_sketch",
            (torch.ones(4, 2).double(), None),
            TypeError,
            "left must be torch.float32 for torch.float32 factors",
        ),
        (
            "embedding_sketch",
            (None, torch.ones(3, 2, device="meta")),
            ValueError,
            "right must be on cpu like grad, got meta",
        ),
        (
            "embedding_dot",
            (torch.ones(5, 3), torch.ones(5, 3)),
            ValueError,
            r"center_index must be \[K, 4\] or \[K, r, 4\]",
        ),
        (
            "embedding_dot",
            (torch.ones(5, 4), torch.ones(6, 3)),
            ValueError,
            r"center_grad must be \[5, 3\].*got \[6, 3\]",
        ),
        ("embedding_dot", (torch.ones(5, 2, 4), torch.ones(5, 3)), ValueError, r"center_grad must be \[5, 2, 3\]"),
        ("embedding_dot", (torch.ones(5, 4), torch.ones(5, 3).half()), TypeError, "center_grad must be torch.float32"),
    ],
)
def test_wrong_matrices_are_named(backend, what, more, error, message):
    with pytest.raises(error, match=message):
        run(what, INDEX, GRAD, *more, num_embeddings=4)


@pytest.mark.parametrize("what", OPS)
def test_backward_raises(backend, what):
    out = run(what, INDEX, GRAD.clone().requires_grad_(), *extra(what, 3, 3), num_embeddings=3)
    with pytest.raises(RuntimeError, match="not differentiable"):
        out[0].sum().backward()


@pytest.mark.parametrize("what", OPS)
def test_opcheck(what):
    op = getattr(torch.ops.gradclust_fast, what).default
    torch.library.opcheck(op, (INDEX, GRAD, *extra(what, 4, 3), 4, -1))


def test_opcheck_of_identity_sides():
    torch.library.opcheck(torch.ops.gradclust_fast.embedding_sketch.default, (INDEX, GRAD, None, None, 4, None))


@pytest.mark.parametrize("what", OPS)
def test_explain_names_the_route(what):
    chosen = gf.explain(what, INDEX, GRAD, *extra(what, 3, 3), num_embeddings=3, padding_idx=0)
    with gf.backend("reference"):
        forced = gf.explain(getattr(gf.ops, what), INDEX, GRAD, *extra(what, 3, 3), num_embeddings=3)
    assert forced.backend == "reference"
    assert chosen.backend == ("cpu" if "cpu" not in chosen.others else "reference") and chosen.route
