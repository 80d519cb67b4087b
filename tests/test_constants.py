"""Layers on what a model has of itself: their rows are positions or a table's, never the batch's, whatever its size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recorded import EVERYTHING, assert_matches, batch, cross_entropy, one_at_a_time
from torch import nn

import gradclust_fast as gf

T, D = 4, 6


class Model(nn.Module):
    def __init__(self, meet):
        super().__init__()
        self.meet, self.positions, self.mix, self.norm = meet, nn.Embedding(T, D), nn.Linear(D, D), nn.LayerNorm(D)
        self.table = nn.Buffer(torch.randn(T, D))
        self.out = nn.Linear(D, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.meet(self, x))).mean(1)


def places():
    return torch.arange(T)


EXACT = {
    "positions": lambda m, x: x + m.positions(places()),
    "linear-of-a-buffer": lambda m, x: m.mix(m.table) + x,
    "linear-of-sinusoids": lambda m, x: x * m.mix(torch.sin(places()[:, None] / torch.arange(1, D + 1)).to(x)),
    "norm-of-a-buffer": lambda m, x: x - m.norm(m.table[:T]),
    "expanded-first": lambda m, x: torch.where(x > 0, x, m.positions(places()).expand(len(x), -1, -1)),
    "expanded-index": lambda m, x: m.norm(m.mix(m.positions(places().expand(len(x), -1))) + x),
    "a-row-for-every-example": lambda m, x: x + m.positions(torch.arange(len(x))[:, None] % T),
    "equal-rows-an-example-each": lambda m, x: x + m.mix(torch.zeros(len(x), D).to(x)).unsqueeze(1),
}
REFUSED = {
    "through-a-norm": (lambda m, x: x + m.norm(m.positions(places())), "positions.weight", "layer_norm"),
    "where": (lambda m, x: torch.where(x > 0, x, m.positions(places())), "positions.weight", "torch.where"),
    "keys": (lambda m, x: (x @ m.positions(places()).mT) @ m.table, "positions.weight", "mT|matmul"),
    "added-to-a-constant": (lambda m, x: x + (m.positions(places()) + m.table), "positions.weight", "add"),
    "through-a-function": (lambda m, x: x + m.mix(m.table).tanh(), "mix.weight", "tanh"),
}


@pytest.mark.parametrize("B", [1, 3, T])  # T: as many examples as positions
@pytest.mark.parametrize("name", EXACT)
def test_outputs_that_meet_the_batch_are_exact(name, B):
    model, (x, y) = Model(EXACT[name]), batch((T, D), B=B)
    with gf.record(model, parameters=used(model, x), **EVERYTHING) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y), rec.names))


def used(model, x):
    """Names of the parameters that the model uses."""
    model(x).sum().backward()
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    model.zero_grad()
    return names


@pytest.mark.parametrize("B", [1, 3, T])
@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_serve_all_examples_otherwise_are_refused(name, B):
    meet, parameter, function = REFUSED[name]
    model, (x, y) = Model(meet), batch((T, D), B=B)
    message = rf"{parameter}.*does not depend on the batch.*({function}).* uses its output .*expand\(B"
    with (
        pytest.raises(NotImplementedError, match=message),
        gf.record(model, parameters=[parameter]),
    ):
        F.cross_entropy(model(x), y).backward()


def test_a_table_whose_rows_are_the_examples_needs_batch_size():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.out = nn.Buffer(torch.randn(5, D)), nn.Linear(D, 3)

        def forward(self):
            return self.out(self.rows)

    model, (_, y) = Whole(), batch()
    with pytest.raises(NotImplementedError, match="rows are the examples, pass batch_size="), gf.record(model):
        F.cross_entropy(model(), y).backward()
    model.zero_grad()
    with gf.record(model, batch_size=5, **EVERYTHING) as rec:
        F.cross_entropy(model(), y).backward()
    assert_matches(rec, one_at_a_time(model, lambda m: F.cross_entropy(m(), y, reduction="none")))


def test_a_batch_made_inside_the_record_is_a_batch():
    model = nn.Linear(3, 2)
    with gf.record(model) as rec:
        model(torch.arange(12.0).reshape(4, 3)).square().mean(1).mean().backward()
    assert rec.sq_norms.shape == (4,)
    assert not model._forward_hooks and not model._forward_pre_hooks and not model._forward_hooks_always_called
