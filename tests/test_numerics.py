"""Inputs that cancel and magnitudes that overflow: 1e-4 of the float64 result of the same (rounded) inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import conv_grads
from recorded import one_at_a_time
from torch import nn

import gradclust_fast as gf

HALF = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # T, I, O and the spread of float32 inputs around their common offset
    (2, 8, 8, 1e-4),  # Gram sums
    (16, 64, 48, 1e-4),
    (300, 200, 300, 1e-4),
    (512, 512, 384, 1e-3),
    (70, 24, 20, 1e-4),  # direct products
    (4096, 8, 8, 1e-4),
    (1500, 33, 20, 1e-4),
    (3000, 1, 3, 1e-3),
]


def factors(T, I, O, spread, dtype, which, offset=1.0):
    """Near-constant activations and gradients of mean zero over positions, or the other way round."""
    near = lambda F: offset * (1 + spread * torch.randn(3, T, F))  # noqa: E731
    zero = torch.randn(3, T, O if which == "act" else I)
    zero = zero - zero.mean(1, keepdim=True)
    act, grad = (near(I), zero) if which == "act" else (zero, near(O))
    return act.to(dtype), grad.to(dtype)


def close(got, want, rtol=1e-4):
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=0)


@pytest.mark.parametrize("which", ["act", "grad"])
@pytest.mark.parametrize("T, I, O, spread", SHAPES)
def test_linear_norms_and_products_where_sums_cancel(backend, T, I, O, spread, which):
    for dtype in HALF:
        act, grad = factors(T, I, O, spread if dtype == torch.float32 else 2e-2, dtype, which)
        G = (grad.double().mT @ act.double()).flatten(1)
        close(gf.ops.grad_sqnorm(act, grad), G.square().sum(1))
        close(gf.ops.grad_quantities(act, grad, sqnorm=True).sqnorm, G.square().sum(1))
        close(gf.ops.grad_sqnorm(act, grad, bias=True), G.square().sum(1) + grad.double().sum(1).square().sum(1))
        if T * I * O < 1 << 22:
            size = G.norm(dim=1)
            error = (gf.ops.grad_gram(act, grad).double() - G @ G.mT).abs() / (size * size.unsqueeze(1))
            assert error.max() < 1e-4


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("T, I, O", [(4, 64, 64), (32, 256, 128), (128, 256, 256), (300, 400, 300)])
def test_linear_norms_from_no_offset_to_a_large_one(backend, T, I, O, which):
    """Somewhere on the way plain sums lose too many digits and centred ones take over."""
    sizes, halves = (I, O) if which == 0 else (O, I), torch.ones(T, 1)
    halves[T // 2 :] = -1
    for offset in (0.0, 1.0, 3.0, 10.0, 30.0):
        near, away = torch.randn(2, T, sizes[0]) + offset, 0.7 * halves.expand(2, T, sizes[1])
        act, grad = (near, away) if which == 0 else (away, near)
        close(gf.ops.grad_sqnorm(act, grad), (grad.double().mT @ act.double()).square().sum((1, 2)), rtol=5e-5)


@pytest.mark.parametrize("offset", [300.0, 1e4])
@pytest.mark.parametrize("T, I, O", [(64, 64, 64), (2048, 16, 16)])
def test_linear_norms_with_a_large_common_offset(backend, T, I, O, offset):
    act, grad = factors(T, I, O, 1e-2, torch.float32, "act", offset)
    close(gf.ops.grad_sqnorm(act, grad), (grad.double().mT @ act.double()).square().sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exponent", [15, -15, 20, -20, 30, -30])
@pytest.mark.parametrize("T, I, O", [(1, 20, 30), (1, 0, 3), (8, 64, 64), (300, 20, 10)])
def test_magnitudes_in_opposite_directions(backend, T, I, O, exponent, dtype):
    """‖act‖² or ‖grad‖² leaves the range of the accumulator; ‖G‖² does not. One example is ordinary, one all zero."""
    exponent *= 6 if dtype == torch.float64 else 1
    act, grad = torch.randn(4, T, I, dtype=torch.float64), torch.randn(4, T, O, dtype=torch.float64)
    act[:2] *= 10.0**exponent
    grad[:2] *= 10.0**-exponent
    grad[3] = 0
    act, grad = act.to(dtype), grad.to(dtype)
    want = (grad.double().mT @ act.double()).square().sum((1, 2))
    close(gf.ops.grad_sqnorm(act, grad), want)
    close(gf.ops.grad_quantities(act, grad, sqnorm=True).sqnorm, want)
    if exponent > 0 and I:  # else the bias's gradient itself is out of range
        close(gf.ops.grad_sqnorm(act, grad, bias=True), want + grad.double().sum(1).square().sum(1))


def test_infinite_and_missing_numbers_stay_in_their_rows(backend):
    for T in (1, 5, 300):
        act, grad = torch.randn(4, T, 6) * 1e-20, torch.randn(4, T, 5) * 1e20
        act[1, 0, 0], grad[2, 0, 0] = float("nan"), float("inf")
        finite = gf.ops.grad_sqnorm(act, grad).isfinite()
        assert finite.tolist() == [True, False, False, True]
    huge = torch.full((1, 1, 3), 1e30)
    assert gf.ops.grad_sqnorm(huge, huge).isinf().all()  # too large in truth


@pytest.mark.parametrize("which", ["act", "grad"])
@pytest.mark.parametrize(
    "C, O, size, kernel, options",
    [
        (3, 16, (32, 32), 3, {}),
        (16, 16, (8, 8), 3, {"padding": 1}),
        (8, 8, (24, 24), 3, {"groups": 8}),
        (4, 6, (20, 20), 5, {"stride": 2, "padding": 2}),
        (8, 12, (1000,), 7, {"dilation": 2}),
        (6, 4, (5, 6, 7), 3, {"groups": 2}),
    ],
)
def test_convolution_norms_where_sums_cancel(backend, C, O, size, kernel, options, which):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(size) - 1](C, O, kernel, **options)
    dims = tuple(range(2, 2 + len(size)))
    for dtype in HALF:
        spread = 1e-3 if dtype == torch.float32 else 2e-2
        act = torch.randn(2, C, *size)
        grad = torch.randn_like(conv(act))
        if which == "act":
            act, grad = 1 + spread * act, grad - grad.mean(dims, keepdim=True)
        else:
            act, grad = act - act.mean(dims, keepdim=True), 1 + spread * grad
        act, grad = act.to(dtype), grad.to(dtype)
        want = conv_grads(act, grad, kernel_size=kernel, **options).square().sum((1, 2))
        close(gf.ops.conv_sqnorm(act, grad, kernel_size=[kernel] * len(size), **options), want)


RECORDED = {  # name: (layer, shape of its input, dimensions of positions)
    "linear-gram": (lambda: nn.Linear(64, 48), (3, 32, 64), (1,)),
    "linear-direct": (lambda: nn.Linear(8, 6), (3, 4096, 8), (1,)),
    "linear-4d": (lambda: nn.Linear(24, 24), (3, 8, 16, 24), (1, 2)),
    "conv": (lambda: nn.Conv2d(6, 8, 3), (3, 6, 16, 16), (2, 3)),
    "conv-depthwise": (lambda: nn.Conv1d(6, 6, 5, groups=6), (3, 6, 500), (2,)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (3, 3, 9, 9), (2, 3)),
    "layer-norm": (lambda: nn.LayerNorm(64), (3, 256, 64), (1,)),
    "rms-norm": (lambda: nn.RMSNorm(64), (3, 256, 64), (1,)),
    "group-norm": (lambda: nn.GroupNorm(4, 16), (3, 16, 32, 32), (2, 3)),
    "instance-norm": (lambda: nn.InstanceNorm1d(6, affine=True), (3, 6, 2000), (2,)),
}


@pytest.mark.parametrize("offset", [1.0, 300.0])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_norms_where_sums_cancel(name, offset):
    build, shape, positions = RECORDED[name]
    layer = build()
    x = offset * (1 + 1e-3 * torch.randn(shape))
    target = torch.randn_like(layer(x))
    target -= target.mean(positions, keepdim=True)
    with gf.record(layer, loss_reduction="sum") as rec:
        (layer(x) * target).sum().backward()
    oracle = one_at_a_time(layer, lambda m: (m(x.double()) * target.double()).flatten(1).sum(1))
    close(rec.sq_norms_by_parameter["weight"], oracle["weight"].flatten(1).square().sum(1))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["linear-gram", "linear-direct", "conv", "layer-norm"])
def test_recorded_norms_of_half_precision_models(name, half):
    """The factors are half precision; what is made of them is not."""
    build, shape, positions = RECORDED[name]
    layer = build().to(half)
    x = (1 + 2e-2 * torch.randn(shape)).to(half)
    target = torch.randn(layer(x).shape)
    target = (target - target.mean(positions, keepdim=True)).to(half)
    with gf.record(layer, loss_reduction="sum") as rec:
        layer(x).backward(target)
    wide = copy.deepcopy(layer).double()
    rows = []
    for b in range(3):
        wide.zero_grad()
        wide(x[b : b + 1].double()).backward(target[b : b + 1].double())
        rows.append(wide.weight.grad.square().sum())
    close(rec.sq_norms_by_parameter["weight"], torch.stack(rows), rtol=1e-4)


@pytest.mark.parametrize("positions", [(), (5,)])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_recorded_norms_of_tiny_and_huge_factors(scale, positions):
    layer = nn.Linear(6, 4)
    x, target = torch.randn(3, *positions, 6) / scale, torch.randn(3, *positions, 4) * scale
    with gf.record(layer, loss_reduction="sum", parameters="weight") as rec:
        (layer(x) * target).sum().backward()
    oracle = one_at_a_time(layer, lambda m: (m(x.double()) * target.double()).flatten(1).sum(1), ["weight"])
    close(rec.sq_norms, oracle["weight"].flatten(1).square().sum(1))


class Tied(nn.Module):
    """A table that is the output layer too: large activations with small gradients, and the other way round."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(300, 64)

    def forward(self, index):
        x = self.table(index) * 1e-3
        return nn.functional.linear(nn.functional.layer_norm(x, (64,)) * 30, self.table.weight)


def test_uses_of_one_parameter_at_different_scales_keep_their_digits():
    model, index = Tied(), torch.randint(0, 300, (3, 48))
    with torch.no_grad():
        model.table.weight.mul_(0.05)

    def losses(model):
        out = model(index)
        return nn.functional.cross_entropy(out.transpose(1, 2), index.roll(1, 1), reduction="none").mean(1)

    with gf.record(model, gram=True) as rec:
        losses(model).mean().backward()
    want = one_at_a_time(model, losses)["table.weight"].flatten(1)
    close(rec.sq_norms, want.square().sum(1), 1e-5)
    close(rec.gram, want @ want.T, 1e-5)


def test_reused_factors_of_opposite_scales():
    from gradclust_fast.layers import ConvFactors, LinearFactors

    a, d, x, y = (
        torch.randn(3, 64, 20),
        torch.randn(3, 64, 30) * 1e-4,
        torch.randn(3, 64, 20) * 1e-4,
        torch.ones(3, 64, 30),
    )
    want = (d.double().mT @ a.double() + y.double().mT @ x.double()).square().sum((1, 2))
    close(LinearFactors(a, d).concat(LinearFactors(x, y)).sqnorm(), want, 1e-5)
    geometry = ([1, 1], [1, 1], [0] * 4, [1, 1], 1, False)
    one, other = (
        ConvFactors(p.mT.unsqueeze(3), q.mT.unsqueeze(3), torch.Size((30, 20, 1, 1)), geometry)
        for p, q in ((a, d), (x, y))
    )
    close(one.concat(other).sqnorm(), want, 1e-5)
    zero = LinearFactors(torch.zeros_like(a), d)
    close(zero.concat(LinearFactors(x, y)).sqnorm(), (y.double().mT @ x.double()).square().sum((1, 2)), 1e-5)


@pytest.mark.parametrize("positions", [(), (2,)], ids=["vectors", "sequences"])
def test_the_rounding_of_long_sums_of_equal_numbers_does_not_add_up(backend, positions):
    """A million features (a flattened image): a float32 sum of so many equal squares is off by 1e-4."""
    act, grad = torch.full((2, *positions, 1 << 20), 1.1), torch.full((2, *positions, 3), 0.7)
    G = (grad.double()[..., :, None] * act.double()[..., None, :]).reshape(2, -1, 3, 1 << 20).sum(1)
    expected = G.square().sum((1, 2))
    for found in (
        gf.ops.grad_sqnorm(act, grad),
        gf.ops.grad_quantities(act, grad, sqnorm=True).sqnorm,
        gf.ops.grad_weight_sqnorm(act, grad)[1],
    ):
        torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["conv_sqnorm", "conv_weight_sqnorm"])
@pytest.mark.parametrize(
    "C, O, size, groups", [(256, 256, 12, 1), (2048, 2048, 8, 2048), (1500, 1500, 3, 1), (512, 1, 12, 1)]
)
def test_the_rounding_of_many_equal_entries_does_not_add_up(name, C, O, size, groups):
    act, grad = torch.full((1, C, size, size), 1.1), torch.full((1, O, size - 2, size - 2), 0.7)
    entry = act[0, 0, 0, 0].double() * grad[0, 0, 0, 0].double() * (size - 2) ** 2
    found = getattr(gf.ops, name)(act, grad, kernel_size=3, groups=groups)
    sqnorm, rtol = (found[1], 6e-6) if name == "conv_weight_sqnorm" else (found, 2e-5)
    torch.testing.assert_close(sqnorm.double(), (O * C // groups * 9 * entry**2)[None], rtol=rtol, atol=0)
