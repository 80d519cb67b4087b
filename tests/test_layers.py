"""Every method of every kind of factors against the gradients they stand for, multiplied out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gradclust_fast.layers import BatchLayout, ConvCall, ConvFactors, DenseFactors, LinearFactors

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def linear(B=4, positions=(3,), I=5, O=6, dtype=torch.float32):
    return LinearFactors(torch.randn(B, *positions, I, dtype=dtype), torch.randn(B, *positions, O, dtype=dtype))


def conv(B=4, channels=4, O=6, size=(7, 6), dtype=torch.float32, **options):
    weight = torch.randn(O, channels // options.get("groups", 1), 3, 2, dtype=dtype)
    act = torch.randn(B, channels, *size, dtype=dtype)
    grad = torch.randn_like(F.conv2d(act, weight, **options))
    return ConvCall(act, weight, **options).factors("weight", grad, BatchLayout())


FACTORS = {
    "linear-vector": lambda **o: linear(positions=(), **o),
    "linear-sequence": linear,
    "linear-two-position-dims": lambda **o: linear(positions=(2, 3), **o),
    "conv": lambda **o: conv(padding=1, **o),
    "conv-strided-dilated": lambda **o: conv(stride=(2, 1), dilation=(1, 2), **o),
    "conv-same-uneven": lambda **o: conv(padding="same", **o),
    "conv-grouped": lambda **o: conv(groups=2, **o),
    "dense-bias": lambda B=4, dtype=torch.float32: DenseFactors(torch.randn(B, 6, dtype=dtype)),
    "dense-matrix": lambda B=4, dtype=torch.float32: DenseFactors(torch.randn(B, 6, 5, dtype=dtype)),
}


@pytest.fixture(params=FACTORS)
def factors(request):
    return FACTORS[request.param]()


def explicit(factors) -> torch.Tensor:
    """[B, rows, cols] G_b in float64, one example at a time."""
    if isinstance(factors, DenseFactors):
        return factors.grads.double().reshape(factors.B, *factors.matrix_shape)
    if isinstance(factors, LinearFactors):
        act, grad = (f.double().reshape(factors.B, -1, f.shape[-1]) for f in (factors.act, factors.grad))
        return torch.stack([d.T @ a for a, d in zip(act, grad)])
    _, stride, padding, dilation, groups, _ = factors.geometry
    act = F.pad(factors.act.double(), [*padding[2:], *padding[:2]])
    weight = torch.zeros(factors.shape, dtype=torch.float64, requires_grad=True)
    rows = []
    for a, d in zip(act, factors.grad.double()):
        out = F.conv2d(a[None], weight, None, stride, 0, dilation, groups)
        rows.append(torch.autograd.grad(out, weight, d[None])[0].flatten(1))
    return torch.stack(rows)


def close(got, want):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_shapes_and_kind(factors):
    assert factors.B == 4 and factors.device.type == "cpu" and factors.dtype == torch.float32
    assert explicit(factors).shape[1:] == factors.matrix_shape


def test_norms_gram_and_moments(factors):
    G = explicit(factors)
    close(factors.sqnorm(), G.square().sum((1, 2)))
    close(factors.gram(), G.flatten(1) @ G.flatten(1).T)
    first, second = factors.moments()
    assert first.shape == second.shape == factors.shape
    close(first.reshape(factors.matrix_shape), G.sum(0))
    close(second.reshape(factors.matrix_shape), G.square().sum(0))


def test_sketch_with_either_side_or_none(factors):
    G = explicit(factors)
    rows, cols = factors.matrix_shape
    left, right = torch.randn(rows, 3), torch.randn(cols, 2)
    close(factors.sketch(left, right), left.double().T @ G @ right.double())
    close(factors.sketch(left, None), left.double().T @ G)
    close(factors.sketch(None, right), G @ right.double())
    close(factors.sketch(None, None), G)


@pytest.mark.parametrize("rank", [None, 1, 2])
def test_dot_with_factored_centres(factors, rank):
    middle = () if rank is None else (rank,)
    rows, cols = factors.matrix_shape
    left, right = torch.randn(3, *middle, rows), torch.randn(3, *middle, cols)
    centres = left.double().reshape(3, -1, rows).mT @ right.double().reshape(3, -1, cols)
    close(factors.dot(left, right), torch.einsum("brc,krc->bk", explicit(factors), centres))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_parameters_without_elements_have_zero_inner_products(shape):
    factors = DenseFactors(torch.zeros(4, *shape))
    rows, cols = factors.matrix_shape
    for middle in ((), (2,)):
        dot = factors.dot(torch.ones(3, *middle, rows), torch.ones(3, *middle, cols))
        assert torch.equal(dot, torch.zeros(4, 3))


def test_rank1_is_mean_activation_and_summed_gradient(factors):
    if isinstance(factors, DenseFactors):
        a, d = factors.rank1()
        if factors.matrix_shape[1] != 1:  # a sum of rank-1 terms, exact
            close(d.mT @ a, explicit(factors))
            return
        assert torch.equal(a, torch.ones(4, 1)) and torch.equal(d, factors.grads)
        return
    a, d = factors.rank1()
    plain = factors.linear() if isinstance(factors, ConvFactors) and factors.geometry[4] == 1 else factors
    if isinstance(plain, LinearFactors):
        assert a.shape == (4, factors.matrix_shape[1]) and d.shape == (4, factors.matrix_shape[0])
        positions = plain.act.double().reshape(4, -1, a.shape[1])
        close(a, positions.mean(1))
        close(d, plain.grad.double().reshape(4, -1, d.shape[1]).sum(1))
    else:  # every group has its own pair: what one group's layer alone would give
        groups = factors.geometry[4]
        assert a.shape == (4, groups, factors.matrix_shape[1]) and d.shape == (4, groups, factors.matrix_shape[0])
        O, C = factors.shape[0] // groups, factors.act.shape[1] // groups
        for g in range(groups):
            alone = ConvFactors(
                factors.act[:, g * C : (g + 1) * C],
                factors.grad[:, g * O : (g + 1) * O],
                torch.Size((O, *factors.shape[1:])),
                (*factors.geometry[:4], 1, False),
            )
            mean, total = alone.rank1()
            torch.testing.assert_close(a[:, g], mean)
            torch.testing.assert_close(d[:, g, g * O : (g + 1) * O], total)
            assert d[:, g].count_nonzero() == total.count_nonzero()
    close(
        factors.dot(d, a).diagonal(),
        (d.double().reshape(4, -1, d.shape[-1]).mT @ a.double().reshape(4, -1, a.shape[-1]) * explicit(factors)).sum(
            (1, 2)
        ),
    )


@pytest.mark.parametrize("kind", FACTORS)
def test_concat_adds_and_subtract_subtracts(kind):
    one, two = FACTORS[kind](), FACTORS[kind]()
    G, H = explicit(one), explicit(two)
    for joined, want in ((one.concat(two), G + H), (one.subtract(two), G - H), (one.negated(), -G)):
        assert joined.shape == one.shape
        close(joined.sqnorm(), want.square().sum((1, 2)))
        close(joined.moments()[0].reshape(one.matrix_shape), want.sum(0))


def test_concat_of_different_kinds_or_sizes():
    weight = torch.Size((6, 4, 3, 2))
    image, other = conv(padding=1), conv(stride=2, size=(9, 9))
    for mine, theirs in (
        (image, other),
        (image, image.linear()),
        (image, DenseFactors(torch.randn(4, *weight))),
        (linear(), DenseFactors(torch.randn(4, 6, 5))),
    ):
        want = explicit(mine) + explicit(theirs)
        joined = mine.concat(theirs)
        assert joined.shape == mine.shape
        close(joined.sqnorm(), want.square().sum((1, 2)))
    mixed = linear().concat(linear(dtype=torch.float64))
    assert mixed.dtype == torch.float64
    with pytest.raises(ValueError, match=r"same parameter \[6, 5\] and the same 4 examples, got \[6, 5\] and 3"):
        linear().concat(linear(B=3))


def test_linear_form_is_the_same_gradient(factors):
    plain = factors.linear()
    assert plain.shape == factors.shape
    close(plain.sqnorm(), explicit(factors).square().sum((1, 2)))


def test_results_are_in_the_accumulators_type():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        want = torch.float64 if dtype == torch.float64 else torch.float32
        for kind in ("linear-sequence", "conv", "conv-grouped"):
            factors = FACTORS[kind](dtype=dtype)
            results = [factors.sqnorm(), factors.gram(), factors.sketch(), *factors.moments(), *factors.rank1()]
            assert {result.dtype for result in results} == {want}, kind


@pytest.mark.parametrize("kind", FACTORS)
def test_an_empty_batch_has_empty_rows(kind):
    factors = FACTORS[kind](B=0)
    assert factors.sqnorm().shape == (0,) and factors.gram().shape == (0, 0)
    assert all(moment.shape == factors.shape and not moment.any() for moment in factors.moments())
