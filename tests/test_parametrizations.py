"""Weights that a parametrization makes from other parameters: recomputed with the module that they belong to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import EVERYTHING, assert_matches, assert_same_grads, batch, cross_entropy, grads, one_at_a_time
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import gradclust_fast as gf


class LowRank(nn.Module):
    """What LoRA adds to a weight: parameters of its own, and a call on a weight instead of on examples."""

    def __init__(self, rows, cols):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, cols))

    def forward(self, weight):
        return weight + self.up @ self.down


def low_rank(layer):
    parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
    layer.parametrizations.weight.original.requires_grad_(False)
    return layer


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = parametrizations.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


MODELS = {
    "weight-norm-of-a-convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), parametrizations.weight_norm(nn.Conv1d(2, 4, 2)), nn.Flatten(), nn.Linear(8, 3)
    ),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3)),
    "low-rank": lambda: nn.Sequential(low_rank(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
    "used-twice": Twice,
    "spectral-norm-evaluated": lambda: parametrizations.spectral_norm(nn.Linear(6, 3)).eval(),
}


@pytest.mark.parametrize("B", [5, 6])  # as many examples as the weight has columns
@pytest.mark.parametrize("name", MODELS)
def test_parametrized_weights(name, B):
    model, (x, y) = MODELS[name](), batch(B=B)
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    with gf.record(model, sketch=gf.Sketch(dim=16), **EVERYTHING) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_same_grads(model, grads(twin))
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))
    assert {row.route for row in gf.coverage(model) if "parametrizations" in row.parameter} <= {"recomputed", "frozen"}


def test_buffers_that_a_forward_moves_on_are_moved_on_once():
    model = parametrizations.spectral_norm(nn.Linear(6, 3))
    nn.init.normal_(model.parametrizations.weight.original)  # far from what the power iteration knows
    (x, y), twin = batch(), copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    oracle = one_at_a_time(copy.deepcopy(model), cross_entropy(x, y))
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, oracle)
    assert all(torch.equal(mine, plain) for mine, plain in zip(model.buffers(), twin.buffers()))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_attributes_stay_as_the_forward_left_them():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.calls = nn.Parameter(torch.ones(3)), 0

        def forward(self, x):
            self.calls, self.last = self.calls + 1, x * self.gain
            return self.last

    model, (x, y) = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 3)), Keeps()), batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    assert model[1].calls == 1 and model[1].last.shape == (5, 3) and model[1].last.grad_fn is not None
    assert model[0].weight.numpy(force=True).shape == (3, 6)  # an ordinary tensor
    assert rec.sq_norms.shape == (5,)
