"""``record(fused=True)`` on convolutions."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded import assert_matches, grads, one_at_a_time
from test_fused import assert_grads, assert_step, mean_of
from torch import nn

import gradclust_fast as gf
from gradclust_fast._dispatch import OPS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding=.same.")


def small(conv: nn.Module, channels: int) -> nn.Module:
    """A convolution between two others, so that it has a gradient to pass on, and in-place functions after it."""
    kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    kind = kinds[conv.weight.dim()]
    return nn.Sequential(kind(2, conv.in_channels, 1), conv, nn.ReLU(inplace=True), kind(channels, 2, 1), Pool())


class Pool(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


LAYERS = [
    pytest.param(nn.Conv2d(4, 6, 3, padding=1), (6, 5), id="3x3"),
    pytest.param(nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), bias=False), (7, 6), id="strided-no-bias"),
    pytest.param(nn.Conv2d(4, 6, (2, 3), dilation=(1, 2), groups=2), (6, 7), id="dilated-groups"),
    pytest.param(nn.Conv2d(4, 8, 3, padding="same", groups=4), (6, 5), id="depthwise-same"),
    pytest.param(nn.Conv2d(4, 6, 3, padding="valid"), (6, 5), id="valid"),
    pytest.param(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (6, 5), id="circular"),
    pytest.param(nn.Conv1d(4, 6, 3, padding=1), (9,), id="1d"),
    pytest.param(nn.Conv3d(4, 6, 3, padding=1), (4, 3, 5), id="3d"),
]


@pytest.mark.parametrize("chosen", ["auto", "reference"])
@pytest.mark.parametrize("conv, size", LAYERS)
def test_norms_and_gradients_are_those_of_a_plain_step(conv, size, chosen):
    model = small(copy.deepcopy(conv), conv.out_channels)
    with gf.backend(chosen):
        assert_step(model, torch.randn(5, 2, *size), torch.randn(5, 2), ["0.weight", "1.weight", "3.weight"])


def test_the_gradient_is_the_one_kernels_own(monkeypatch):
    """Not the product of the layer: a kernel that is off by a factor shows in ``.grad``."""
    op = OPS["conv_weight_sqnorm"]
    name = gf.explain("conv_weight_sqnorm", torch.zeros(2, 3, 6, 6), torch.zeros(2, 4, 6, 6), kernel_size=1).backend
    model, x = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 6, 6)
    kernel = op.kernels[name]

    def scaled(*args):
        weight_grad, sqnorm = kernel.run(*args)
        return 3 * weight_grad, sqnorm

    monkeypatch.setitem(op.kernels, name, type(kernel)(scaled, kernel.refuses, kernel.loses, kernel.route))
    (want,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    with gf.record(model, fused=True):
        model(x).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, 3 * want)


def test_uneven_padding_and_transposed_convolutions_take_the_plain_way():
    model = nn.Sequential(nn.Conv2d(2, 4, 2, padding="same"), nn.ConvTranspose2d(4, 3, 2), Pool())
    assert_step(model, torch.randn(4, 2, 5, 5), torch.randn(4, 3), [])


def test_a_layer_used_twice_takes_the_plain_way_with_its_cross_terms():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.Tanh(), conv, nn.Conv2d(3, 2, 1), Pool())
    assert_step(model, torch.randn(4, 3, 5, 4), torch.randn(4, 2), ["3.weight"])


def test_channels_last_float64_no_example_and_frozen_neighbours():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1), Pool())
    model[0].bias.requires_grad_(False)
    fused = ["0.weight", "1.weight"]
    x, y = torch.randn(4, 3, 6, 6), torch.randn(4, 2)
    assert_step(copy.deepcopy(model).double(), x.double(), y.double(), fused, rtol=1e-12)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert_step(last, x.to(memory_format=torch.channels_last), y, fused)
    assert last[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
    model.zero_grad()
    with gf.record(model, fused=True) as rec:
        model(x[:0]).sum().backward()
    assert rec.sq_norms.shape == (0,) and not model[0].weight.grad.any() and rec.fused_parameters == fused


def test_several_images_an_example():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), torch.randn(6, 3, 5, 5)
    oracle = one_at_a_time(model, lambda model: model(x.double()).square().flatten(1).sum(1).reshape(3, 2).sum(1))
    with gf.record(model, fused=True, batch_size=3, loss_reduction="sum") as rec:
        model(x).square().sum().backward()
    assert rec.fused_parameters == ["0.weight"]
    assert_matches(rec, oracle)
    torch.testing.assert_close(model[0].weight.grad, oracle["0.weight"].sum(0).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 3), Pool())
    x, y = torch.randn(4, 3, 6, 6), torch.randn(4, 2)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype):
        mean_of(twin(x).float(), y).backward()
    with gf.record(model, fused=True) as rec, torch.autocast("cpu", dtype):
        mean_of(model(x).float(), y).backward()
    assert rec.fused_parameters == ["0.weight", "2.weight"]
    assert_grads(model, grads(twin), rtol=3 * torch.finfo(dtype).eps)


def test_forward_mode_derivatives_see_the_plain_layer():
    forward_ad = torch.autograd.forward_ad
    for layer, x in ((nn.Conv2d(3, 4, 3), torch.randn(4, 3, 6, 6)), (nn.Linear(3, 2), torch.randn(4, 3))):
        with gf.record(layer, fused=True) as rec:
            with forward_ad.dual_level():
                tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
            layer(x).sum().backward()
        assert tangent.shape == layer(x).shape and rec.fused_parameters == ["weight"]


def test_coverage_names_the_kernel():
    assert gf.coverage(nn.Conv2d(3, 4, 2, padding="same"), fused=True)[0].route == "factored"
    rows = {row.parameter: row for row in gf.coverage(nn.Conv2d(3, 4, 3), fused=True)}
    assert rows["weight"].route == "fused" and rows["bias"].route == "sum"
    assert "in one pass (C++)" in rows["weight"].note or "which saves nothing: " in rows["weight"].note
