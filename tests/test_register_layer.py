"""A user's own layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import assert_matches, assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf
from gradclust_fast.layers import DenseFactors, LinearFactors
from gradclust_fast.watching import Watch

B, T, D = 5, 4, 6


class Mix(nn.Module):
    """``weight @ sin(x) + bias`` at every position, in a way that no route reads."""

    def __init__(self, rows=D):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(rows, D)), nn.Parameter(torch.randn(rows))

    def forward(self, x, power: float = 1.0, *, flag=None):
        return torch.einsum("...i,oi->...o", (power * x).sin(), self.weight) + self.bias


def mix_factors(module, inputs, output_grads):
    x, power = inputs
    (grad,) = output_grads
    return {"weight": ((power * x).sin(), grad), "bias": (grad.new_ones(*grad.shape[:-1], 1), grad)}


@pytest.fixture
def register():
    done = []

    def add(kind, factors):
        gf.register_layer(kind, factors)
        done.append(kind)

    yield add
    for kind in done:
        gf.unregister_layer(kind)


def losses_of(x, y):
    return lambda model: F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y, reduction="none")


def batch(*shape):
    return torch.randn(B, *shape, D), torch.randint(0, 3, (B,))


class Net(nn.Module):
    """Registered, used twice, tied to a linear layer and called functionally."""

    def __init__(self):
        super().__init__()
        self.mix, self.twin, self.head = Mix(), nn.Linear(D, D), nn.Linear(D, 3)
        self.twin.weight = self.mix.weight

    def forward(self, x):
        x = self.mix(self.mix(x, power=0.5))
        x = F.linear(self.twin(x).tanh(), self.mix.weight)
        return self.head(x.flatten(1, -2).mean(1) if x.dim() > 2 else x)


@pytest.mark.parametrize("shape", [(), (T,), (2, 3)])
def test_registered_factors_give_every_quantity(register, shape):
    register(Mix, mix_factors)
    model = Net()
    x, y = batch(*shape)
    assert {row.parameter: row.route for row in gf.coverage(model)}["mix.weight"] == "registered"
    twin = copy.deepcopy(model)
    losses_of(x, y)(twin).mean().backward()
    with gf.record(model, gram=True, moments=True) as rec:
        losses_of(x, y)(model).mean().backward()
    assert_same_grads(model, grads(twin))
    oracle = one_at_a_time(model, losses_of(x, y))
    assert_matches(rec, oracle)
    norms = {}
    with Watch(model, lambda name, factors: norms.update({name: factors.sqnorm()})) as watch:
        watch.backward(losses_of(x, y)(model))
    for name, rows in oracle.items():
        torch.testing.assert_close(norms[name].double(), rows.flatten(1).square().sum(1), rtol=5e-5, atol=1e-8)


def test_a_registered_function_replaces_the_recomputation_and_goes_with_unregister(register):
    model, (x, y) = nn.Sequential(Mix(3)), batch()
    calls = []
    register(Mix, lambda *a: calls.append(1) or mix_factors(*a))
    with gf.record(model, sketch=gf.Sketch(dim=16)) as rec:
        losses_of(x, y)(model).mean().backward()
    assert calls == [1]
    gf.unregister_layer(Mix)
    with gf.record(model, sketch=gf.Sketch(dim=16)) as again:
        losses_of(x, y)(model).mean().backward()
    gf.register_layer(Mix, mix_factors)
    torch.testing.assert_close(again.sq_norms, rec.sq_norms)
    torch.testing.assert_close(again.sketches, rec.sketches)
    assert calls == [1] and gf.coverage(model)[0].route == "registered"


def test_dropout_and_a_known_type_may_be_registered(register):
    class Noisy(nn.Linear):
        def forward(self, x):
            self.mask = (torch.rand_like(x) > 0.5).to(x.dtype)
            return super().forward(x * self.mask)

    register(Noisy, lambda m, inputs, grads: {
        "weight": LinearFactors(inputs[0] * m.mask, grads[0]), "bias": DenseFactors(grads[0]),
    })  # fmt: skip
    model, (x, y) = nn.Sequential(Noisy(D, 3)), batch()

    def losses(m):
        torch.manual_seed(1)
        mask = (torch.rand_like(x) > 0.5).to(x.dtype)
        return F.cross_entropy(F.linear((x * mask).to(m[0].weight.dtype), m[0].weight, m[0].bias), y, reduction="none")

    torch.manual_seed(1)
    with gf.record(model, moments=True) as rec:
        losses_of(x, y)(model).mean().backward()
    assert_matches(rec, one_at_a_time(model, losses))


def test_only_recorded_parameters_must_come_and_subclasses_count_unless_they_override_forward(register):
    class Same(Mix):
        pass

    class Other(Mix):
        def forward(self, x):
            return super().forward(x) * 2

    register(Mix, lambda m, inputs, grads: {"bias": (torch.ones(B, 1), grads[0])})
    model, (x, y) = nn.Sequential(Same(3)), batch()
    with gf.record(model, parameters="*bias") as rec:
        losses_of(x, y)(model).mean().backward()
    oracle = one_at_a_time(model, losses_of(x, y))["0.bias"]
    torch.testing.assert_close(rec.sq_norms.double(), oracle.square().sum(1), rtol=1e-4, atol=1e-8)
    assert gf.coverage(Other(3))[0].route == "recomputed"


@pytest.mark.parametrize(
    "made, error, message",
    [
        (lambda x, g: [x, g], TypeError, "must return {parameter"),
        (lambda x, g: {"weight": (x.sin(), g)}, ValueError, "missing: bias"),
        (
            lambda x, g: {"weight": (x.sin(), g), "bias": DenseFactors(g), "extra": (x, g)},
            ValueError,
            "not a parameter of it: extra",
        ),
        (
            lambda x, g: {"weight": (g, x), "bias": DenseFactors(g)},
            ValueError,
            r"Mix.weight \[3, 6\] must be act \[B, \*, 6\] and grad \[B, \*, 3\].*got \[5, 3\] and \[5, 6\]",
        ),
        (lambda x, g: {"weight": (x[:2], g), "bias": DenseFactors(g)}, ValueError, "the same B and positions"),
        (lambda x, g: {"weight": (x.sin(), g), "bias": DenseFactors(x)}, ValueError, r"parameter \[3\], got \[6\]"),
        (lambda x, g: {"weight": (x.sin(), g), "bias": g}, TypeError, r"Mix.bias must be a pair \(act, grad\)"),
        (lambda x, g: {"weight": (x, g), "bias": DenseFactors(g)}, RuntimeError, "0.weight.*do not add up"),
        (
            lambda x, g: {"weight": (x.sin()[:2], g[:2]), "bias": DenseFactors(g[:2])},
            ValueError,
            "has 2 examples, but 1.weight has 5",
        ),
    ],
)
def test_wrong_factors_are_named(register, made, error, message):
    register(Mix, lambda module, inputs, grads: made(inputs[0], grads[0]))
    model, (x, y) = nn.Sequential(Mix(3), nn.Linear(3, 3)), batch()
    with pytest.raises(error, match=message), gf.record(model):
        losses_of(x, y)(model).mean().backward()


def test_what_cannot_be_registered():
    with pytest.raises(TypeError, match=r"subclass of torch.nn.Module, got Mix"):
        gf.register_layer(Mix(), mix_factors)
    with pytest.raises(TypeError, match="factors must be callable"):
        gf.register_layer(Mix, None)
    with pytest.raises(KeyError, match="Mix is not registered"):
        gf.unregister_layer(Mix)


def test_registering_twice_and_keyword_only_arguments(register):
    register(Mix, mix_factors)
    with pytest.raises(ValueError, match="Mix is registered already"):
        gf.register_layer(Mix, mix_factors)
    model = Mix(3)
    with pytest.raises(NotImplementedError, match="takes flag by keyword only"), gf.record(model):
        model(torch.randn(B, D), flag=1).sum().backward()
