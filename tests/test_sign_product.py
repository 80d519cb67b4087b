from __future__ import annotations

import math

import cuda_on_host
import pytest
import torch
from test_sketching import LinearFactors, model_factors, total
from tolerances import assert_close_to_oracle

import gradclust_fast as gf
from bench.memory import peak_bytes
from gradclust_fast import _native, reference
from gradclust_fast.layers.base import DenseFactors
from gradclust_fast.reference.sign_product import sign_matrix

KEY, CPU = (0x12345678, 0x9ABCDEF0), torch.device("cpu")
GRID = [  # B, D, R, why
    pytest.param(0, 5, 3, id="empty-batch"),
    pytest.param(3, 0, 4, id="empty-vectors"),
    pytest.param(1, 1, 1, id="all-ones"),
    pytest.param(5, 127, 65, id="one-less-than-a-counter"),
    pytest.param(33, 300, 70, id="ragged"),
    pytest.param(4, 1030, 24, id="several-depths"),
    pytest.param(131, 40, 9, id="several-tiles-of-rows"),
    pytest.param(2, 36, 300, id="several-groups-of-outputs"),
]


WAYS = pytest.mark.parametrize("transposed", [False, True], ids=["by-output", "by-entry"])


def signs(R, D, dtype=torch.float64, key=KEY, transposed=False):
    """[R, D]"""
    return sign_matrix(D, R, key, dtype, CPU).T if transposed else sign_matrix(R, D, key, dtype, CPU)


@WAYS
@pytest.mark.parametrize("B, D, R", GRID)
def test_matches_the_stored_matrix(backend, dtype, B, D, R, transposed):
    vectors, scale = torch.randn(B, D).to(dtype), 0.3
    out = gf.ops.sign_product(vectors, R, KEY, scale, transposed)
    assert out.shape == (B, R) and out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.is_contiguous()
    oracle = vectors.double() @ (scale * signs(R, D, transposed=transposed)).T
    eager = vectors.to(out.dtype) @ (scale * signs(R, D, out.dtype, transposed=transposed)).T
    assert_close_to_oracle(out, oracle, eager, dtype)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("key", [KEY, (2**32 - 1, 2**32 - 1)])
def test_its_signs_are_the_definitions_bits(backend, key, dtype, transposed):
    out = gf.ops.sign_product(torch.eye(270, dtype=dtype), 200, key, transposed=transposed)
    assert torch.equal(out, signs(200, 270, dtype, key, transposed).T)


def test_float32_numbers_keep_all_of_their_bits(backend):
    values = torch.cat([torch.randn(60), torch.tensor([3.4e38, -3.4e38, 1 + 2**-23, 1e-30, 16777215.0])])
    out = gf.ops.sign_product(values.diag(), 40, KEY)
    assert torch.equal(out, signs(40, 65, torch.float32).T * values[:, None])


def test_scale_comes_before_the_sum_so_that_no_partial_sum_overflows(backend):
    out = gf.ops.sign_product(torch.full((2, 64), 3e38), 33, KEY, 1e-3)
    torch.testing.assert_close(out.double(), (3e35 * signs(33, 64).sum(1)).expand(2, 33), rtol=1e-5, atol=1e30)


def test_strided_vectors_read_their_own_elements(backend):
    base = torch.randn(300, 310)
    for vectors in (base.T[:20], base[::7, 3:290:2], base[:30, 1:], base[:1].expand(9, 310), base[:30, 4:140]):
        out = gf.ops.sign_product(vectors, 50, KEY)
        torch.testing.assert_close(out.double(), vectors.double() @ signs(50, vectors.shape[1]).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_in_their_own_rows(backend, dtype):
    vectors = torch.randn(70, 140).to(dtype)
    clean = gf.ops.sign_product(vectors, 20, KEY)
    vectors[1, 3], vectors[40, 139] = float("nan"), float("-inf")
    if dtype == torch.float32:  # a NaN that only its lowest bit tells from infinity
        vectors[2, 0] = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    out = gf.ops.sign_product(vectors, 20, KEY)
    assert out[1].isnan().all() and (dtype != torch.float32 or out[2].isnan().all())
    assert torch.equal(out[40], -torch.inf * signs(20, 140, out.dtype)[:, 139])
    others = [b for b in range(70) if b not in (1, 2, 40)]
    assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@WAYS
@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable())))])  # fmt: skip
def test_a_rows_bits_do_not_depend_on_the_batch_nor_on_the_threads(name, dtype, transposed):
    vectors = torch.randn(70, 270, dtype=dtype)

    def product(rows, R=290):
        return gf.ops.sign_product(rows, R, KEY, 0.3, transposed)

    with gf.backend(name):
        whole, few = (product(rows) for rows in (vectors, vectors[:65, :40]))
        assert torch.equal(product(vectors), whole)
        threads = torch.get_num_threads()
        try:
            for count in (1, 3) if name == "cpu" else ():
                torch.set_num_threads(count)
                assert torch.equal(product(vectors), whole)
        finally:
            torch.set_num_threads(threads)
        for part in (vectors[:1], vectors[:5], vectors[:33]):
            assert torch.equal(product(part), whole[: len(part)])
        if name == "cpu" or (dtype == torch.float32 and not transposed):  # more outputs: the CUDA kernel's larger tiles
            assert torch.equal(product(vectors[:65, :40], 8500)[:, :290], few)


@pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable()))
@pytest.mark.parametrize(
    "B, R, order", [(40, 70, 0), (40, 70, 1), (40, 70, 2), (40, 70, 3), (70, 8400, 3), (40, 70, -3)]
)
def test_the_cuda_kernel_in_every_order_of_threads(monkeypatch, dtype, B, R, order):
    transposed = order < 0
    emulator, vectors = cuda_on_host.emulated(monkeypatch), torch.randn(B, 45).to(dtype)
    emulator.set_order(abs(order))
    with gf.backend("cuda"):
        out = gf.ops.sign_product(vectors, R, KEY, transposed=transposed)
    eager = vectors.to(out.dtype) @ signs(R, 45, out.dtype, transposed=transposed).T
    assert_close_to_oracle(out, vectors.double() @ signs(R, 45, transposed=transposed).T, eager, dtype)


@pytest.mark.skipif(cuda_on_host.unavailable() is not None, reason=str(cuda_on_host.unavailable()))
def test_the_cuda_kernel_follows_torchs_precision_of_float32_products(monkeypatch):
    cuda_on_host.emulated(monkeypatch)
    values = 1 + torch.rand(200)
    expected = signs(20, 200, torch.float32).T * values[:, None]
    setting = torch.get_float32_matmul_precision()
    try:
        for name, least, most in (("highest", 0, 0), ("high", 2**-20, 2**-16), ("medium", 2**-11, 2**-8)):
            torch.set_float32_matmul_precision(name)
            with gf.backend("cuda"):
                error = (gf.ops.sign_product(values.diag(), 20, KEY) / expected - 1).abs().max()
                assert least <= error <= most
                half = gf.ops.sign_product(values.half().diag(), 20, KEY)
            assert torch.equal(half, expected.sign() * values.half().float()[:, None])
    finally:
        torch.set_float32_matmul_precision(setting)


@WAYS
def test_the_definition_makes_the_matrix_in_parts(monkeypatch, transposed):
    with gf.backend("reference"):
        expected = signs(50, 300, torch.float32, transposed=transposed).T
        for chunk in (1, 128, 1000):
            monkeypatch.setattr(reference.sign_product, "CHUNK", chunk)
            assert torch.equal(gf.ops.sign_product(torch.eye(300), 50, KEY, transposed=transposed), expected)


@WAYS
def test_no_backend_holds_the_matrix(backend, monkeypatch, transposed):
    monkeypatch.setattr(reference.sign_product, "CHUNK", 1 << 12)
    vectors = torch.randn(2, 1024)
    assert peak_bytes(lambda: gf.ops.sign_product(vectors, 256, KEY, 1.0, transposed)) < 256 * 1024  # of 1 MiB


def test_a_sketch_is_the_same_by_every_way_and_keeps_only_small_matrices(backend):
    sketch, factors = gf.Sketch(dim=40, seed=3, sides=(16, 8)), model_factors(B=5)
    found = total(sketch, factors)
    expected = 0
    for name, f in factors.items():
        left, right, second = sketch.matrices(name, f.matrix_shape, f.dtype, CPU)
        expected = expected + f.sketch(left, right).flatten(1) @ second
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    kept = [key for key in sketch._cache if key[1] == "second"]
    short = [f for f in factors.values() if math.prod(sketch.stages(f.matrix_shape)) < 128]
    assert 0 < len(short) < len(factors)
    assert len(kept) == len(factors if backend == "reference" else short)


@pytest.mark.parametrize("shape", [(300, 1), (1, 300)], ids=["column", "row"])
def test_the_first_stage_of_a_long_vector_is_made_on_the_way_too(backend, shape):
    factors, sketch = DenseFactors(torch.randn(4, *shape)), gf.Sketch(sides=(8, 8), reduce=False)
    left, right, _ = sketch.matrices("b", shape, torch.float32, CPU)
    assert (right if left is None else left).shape == (300, 64)
    fresh = gf.Sketch(sides=(8, 8), reduce=False)
    out = fresh.apply("b", factors)
    torch.testing.assert_close(out, factors.sketch(left, right).flatten(1), rtol=1e-5, atol=1e-4)
    assert len(fresh._cache) == (1 if backend == "reference" else 0)
    if shape[0] == 1:
        return
    looked_up = LinearFactors(torch.ones(4, 1, 1), factors.grads.view(4, 1, 300))  # never multiplied out
    torch.testing.assert_close(fresh.apply("b", looked_up), out, rtol=1e-5, atol=1e-4)
    assert len(fresh._cache) == 1


@pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))
def test_autograd_reaches_through_a_sketch():
    factors = model_factors()["a.weight"]
    factors.act.requires_grad_()
    plain = gf.Sketch(dim=40).apply("w", model_factors()["a.weight"]).shape
    out = gf.Sketch(dim=40).apply("w", factors)
    assert out.shape == plain and out.requires_grad
    out.sum().backward()
    assert factors.act.grad.isfinite().all()


def test_other_backends_sketch_with_the_stored_matrix():
    factors = model_factors()["a.weight"]
    expected = gf.Sketch(dim=40).apply("w", factors)
    with gf.backend("triton"):
        torch.testing.assert_close(gf.Sketch(dim=40).apply("w", factors), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.ones(3), 4, KEY), ValueError, r"vectors must be \[B, D\], got \[3\]"),
        ((torch.ones(3, 2).long(), 4, KEY), TypeError, "vectors must be float32, float64, bfloat16 or float16"),
        (([[1.0]], 4, KEY), TypeError, "vectors must be a torch.Tensor, got list"),
        ((torch.ones(3, 2), 0, KEY), ValueError, "dim must be at least 1 and below 2³², got 0"),
        ((torch.ones(3, 2), 2**32, KEY), ValueError, "dim must be at least 1 and below 2³², got 4294967296"),
        ((torch.ones(3, 2), 2.5, KEY), TypeError, "dim must be an integer, got float"),
        ((torch.ones(3, 2), 4, 7), TypeError, "key must be two integers, got 7"),
        ((torch.ones(3, 2), 4, (1, 2, 3)), TypeError, r"key must be two integers, got \(1, 2, 3\)"),
        ((torch.ones(3, 2), 4, (1, 2.5)), TypeError, "key must be an integer, got 2.5"),
        ((torch.ones(3, 2), 4, (-1, 2)), ValueError, r"key must be two integers in \[0, 2³²\), got \(-1, 2\)"),
        ((torch.ones(3, 2), 4, (1, 2**32)), ValueError, r"key must be two integers in \[0, 2³²\), got \(1, 42949"),
        ((torch.ones(3, 2), 4, KEY, float("nan")), ValueError, "scale must be finite, got nan"),
        ((torch.ones(3, 2), 4, KEY, "a"), TypeError, "scale must be a number, got str"),
        ((torch.ones(3, 2), 4, KEY, 1.0, "yes"), TypeError, "transposed must be True or False, got str"),
        ((torch.ones(1).expand(1, 2**32), 4, KEY, 1.0, True), ValueError, "vectors must be shorter than 2³²"),
    ],
)
def test_wrong_arguments_are_named(backend, arguments, error, message):
    with pytest.raises(error, match=message):
        gf.ops.sign_product(*arguments)


def test_backward_raises(backend):
    out = gf.ops.sign_product(torch.ones(3, 2, requires_grad=True), 4, KEY)
    with pytest.raises(RuntimeError, match="not differentiable"):
        out.sum().backward()


@pytest.mark.parametrize("B, D, R", [(3, 6, 5), (0, 3, 2), (2, 200, 70)])
def test_opcheck(B, D, R):
    torch.library.opcheck(torch.ops.gradclust_fast.sign_product.default, (torch.randn(B, D), R, *KEY, 0.5, B == 3))


def test_explain_says_that_signs_are_made_on_the_way(backend):
    text = str(gf.explain("sign_product", torch.ones(3, 4), 5, KEY))
    assert text.startswith(f"sign_product: {backend}")


def test_a_sketch_takes_the_definitions_matrix():
    sketch = gf.Sketch(dim=30, seed=5)
    second = sketch.matrices("w", (7, 9), torch.float64, CPU)[2]
    expected = signs(30, 63, key=sketch._key("w", "second")) * (1 / 30**0.5)
    assert torch.equal(second, expected.T) and second.is_contiguous()
