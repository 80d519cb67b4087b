"""A table that is the output layer's weight too: every quantity of the sum, and no one-hot vectors."""

from __future__ import annotations

import copy

import pytest
import torch
from recorded import assert_matches, assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf
from gradclust_fast.layers import DenseFactors, EmbeddingFactors, LinearFactors, tied
from gradclust_fast.layers.tied import TiedFactors


def uses(B, T, S, V=11, D=6, padding=None, dtype=torch.float64):
    """Lookups that repeat, and a linear layer with another number of positions."""
    table = EmbeddingFactors(
        torch.randint(V, (B, T)), torch.randn(B, T, D, dtype=dtype), torch.Size((V, D)), padding
    )  # fmt: skip
    return table, LinearFactors(torch.randn(B, S, D, dtype=dtype), torch.randn(B, S, V, dtype=dtype))


def no_onehot(monkeypatch):
    def refuse(self):
        raise AssertionError("one-hot vectors were made")

    monkeypatch.setattr(EmbeddingFactors, "linear", refuse)


def assert_sum_of(found, *parts, rtol=1e-10):
    """Every quantity of factors against the stored gradients of their parts."""
    G = sum(DenseFactors.of(part).grads.double() for part in parts)
    dense = DenseFactors(G)
    V, D = found.shape
    rows, cols = torch.randn(3, V).double(), torch.randn(3, D).double()
    left, right = torch.randn(V, 2).double(), torch.randn(D, 4).double()
    pairs = [
        (found.sqnorm(), dense.sqnorm()),
        (found.gram(), dense.gram()),
        (found.dot(rows.to(found.dtype), cols.to(found.dtype)), dense.dot(rows, cols)),
        (found.sketch(left.to(found.dtype), right.to(found.dtype)), dense.sketch(left, right)),
        *zip(found.moments(), dense.moments()),
    ]
    for got, want in pairs:
        torch.testing.assert_close(
            got.double(), want, rtol=rtol, atol=rtol * float(want.abs().max() if want.numel() else 0)
        )


@pytest.mark.parametrize("chunk", [1, tied.CHUNK])
@pytest.mark.parametrize(
    "B, T, S, padding", [(4, 7, 5, None), (3, 5, 9, 2), (1, 1, 1, None), (2, 0, 3, None), (0, 2, 2, None)]
)
def test_the_sum_of_lookups_and_a_layer(B, T, S, padding, chunk, monkeypatch):
    table, layer = uses(B, T, S, padding=padding)
    parts = [DenseFactors.of(table), DenseFactors.of(layer)]
    no_onehot(monkeypatch)
    monkeypatch.setattr(tied, "CHUNK", chunk)
    for joined in (table.concat(layer), layer.concat(table)):
        assert isinstance(joined, TiedFactors) and joined.B == B
        assert_sum_of(joined, *parts)


def test_more_than_two_uses_and_differences(monkeypatch):
    table, layer = uses(3, 4, 5)
    again, more = uses(3, 6, 2, padding=1)
    parts = [DenseFactors.of(part) for part in (table, layer, again, more)]
    no_onehot(monkeypatch)
    assert_sum_of(table.concat(layer).concat(more), parts[0], parts[1], parts[3])
    assert_sum_of(table.concat(layer).concat(again), *parts[:3])
    assert_sum_of(again.concat(table.concat(layer)), *parts[:3])
    assert_sum_of(table.concat(layer).concat(again.concat(more)), *parts)
    minus = [DenseFactors(-part.grads) for part in parts[2:]]
    assert_sum_of(table.concat(layer).subtract(more.concat(again)), *parts[:2], *minus)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)], ids=str)
def test_autocast_gives_two_dtypes(dtypes):
    (table, _), (_, layer) = uses(4, 9, 7, dtype=dtypes[0]), uses(4, 9, 7, dtype=dtypes[1])
    joined = table.concat(layer)
    assert joined.sqnorm().dtype == torch.float32
    assert_sum_of(joined, table.double(), layer.double(), rtol=2e-5)


def test_rank_one_and_parts_are_those_of_one_layer():
    table, layer = uses(4, 3, 5)
    joined = table.concat(layer)
    want = table.linear().concat(layer)
    for got, expected in zip(joined.rank1(), want.rank1()):
        torch.testing.assert_close(got, expected)
    torch.testing.assert_close(joined.part(1, 3).sqnorm(), joined.sqnorm()[1:3])
    assert joined.double().sqnorm().dtype == torch.float64


class Language(nn.Module):
    def __init__(self, V=13, D=6):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(V, D, padding_idx=0), nn.Linear(D, D), nn.Linear(D, V)
        self.head.weight = self.table.weight

    def forward(self, index):
        return self.head(torch.tanh(self.body(self.table(index))))


@pytest.mark.parametrize("fused", [False, True])
def test_a_recorded_language_model_stores_no_onehot_vectors(fused, monkeypatch):
    model, index, y = Language(), torch.randint(13, (5, 7)), torch.randint(13, (5, 7))
    twin = copy.deepcopy(model)

    def losses(model):
        return (
            nn.functional.cross_entropy(model(index).flatten(0, 1), y.flatten(), reduction="none").reshape(5, 7).sum(1)
        )

    losses(twin).mean().backward()
    no_onehot(monkeypatch)
    with gf.record(model, sketch=gf.Sketch(dim=16, seed=0), gram=True, moments=True, fused=fused) as rec:
        losses(model).mean().backward()
    if not fused:
        assert_same_grads(model, grads(twin))
    assert_matches(rec, one_at_a_time(model, losses))
    assert rec.noise_scale().trace > 0
