"""Modules without a route of their own are recomputed alone, against one example at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from claimed import CASES, B, D, Odd, Pair, T, build, losses_of, step
from recorded import EVERYTHING, assert_matches, assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf
from gradclust_fast.watching import Watch


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor", "ignore:LSTM with projections")
@pytest.mark.parametrize("name", CASES)
def test_every_quantity_matches_one_example_at_a_time(name):
    model, x, y = build(name)
    twin = copy.deepcopy(model)
    losses_of(x, y)(twin).mean().backward()
    with gf.record(model, **EVERYTHING) as rec:
        losses_of(x, y)(model).mean().backward()
    assert_same_grads(model, grads(twin))
    oracle = one_at_a_time(model, losses_of(x, y))
    assert_matches(rec, oracle)
    rows = {row.parameter: row for row in gf.coverage(model)}
    assert "recomputed" in {row.route for row in rows.values()} and "once more" in str(gf.coverage(model))
    norms = {}
    with Watch(model, lambda name, factors: norms.update({name: factors.sqnorm()})) as watch:
        watch.backward(losses_of(x, y)(model))
    for parameter, rows in oracle.items():
        want = rows.flatten(1).square().sum(1)
        torch.testing.assert_close(norms[parameter].double(), want, rtol=5e-5, atol=1e-8)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and not module._forward_hooks_always_called


def recorded(model, x, y, losses=None, **options):
    with gf.record(model, **EVERYTHING, **options) as rec:
        step(model, x, y)
    assert_matches(rec, one_at_a_time(model, losses or losses_of(x.double(), y)))
    return rec


@pytest.mark.parametrize("n", [0, 1, 2, 19])
@pytest.mark.parametrize("name", ["lstm-default-layout", "class-token-and-positions", "cannot-be-vectorised"])
def test_any_number_of_examples(name, n):
    model, x, _ = build(name)
    dim = x.shape.index(B)
    x = torch.randn(*x.shape[:dim], n, *x.shape[dim + 1 :])
    y = torch.randint(0, 3, (n,))
    with gf.record(model, **EVERYTHING, loss_reduction="sum") as rec:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert rec.sq_norms.shape == (n,)
    if n:
        assert_matches(rec, one_at_a_time(model, losses_of(x.double(), y)))


def test_chunks_bound_memory_and_change_nothing(monkeypatch):
    model, x, y = build("class-token-and-positions")
    whole = recorded(model, x, y)
    monkeypatch.setattr("gradclust_fast.layers.recompute._CHUNK_BYTES", 300)
    seen = []
    original = torch.func.vjp
    monkeypatch.setattr("gradclust_fast.layers.recompute.vjp", lambda *a: seen.append(1) or original(*a))
    model.zero_grad()
    torch.testing.assert_close(recorded(model, x, y).sq_norms, whole.sq_norms)
    assert len(seen) == 3  # two examples of 4 (D + (T + 1) D) bytes fit


def test_several_forwards_and_backwards():
    model, x, y = build("gru-both-results-given-state")
    other = torch.randn_like(x)
    with gf.record(model, moments=True) as rec:
        for _ in range(2):
            loss = (losses_of(x, y)(model) + losses_of(other, y)(model)).mean()
            loss.backward(retain_graph=True)
            loss.backward()
    oracle = one_at_a_time(model, lambda m: losses_of(x, y)(m) + losses_of(other, y)(m))
    want = sum(g.flatten(1).square().sum(1) for g in oracle.values())
    torch.testing.assert_close(rec.sq_norms.double(), want.repeat(4), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, x, y = build("overridden-tied-reused")
    x.requires_grad_()

    def losses(m):
        inner = torch.utils.checkpoint.checkpoint(m[0], x.to(m[1].weight.dtype), use_reentrant=reentrant)
        return F.cross_entropy(m[1](inner), y, reduction="none")

    with gf.record(model, **EVERYTHING) as rec:
        losses(model).mean().backward()
    assert_matches(rec, one_at_a_time(model, losses_of(x.detach(), y)))


def test_reentrant_and_other_checkpoints_of_a_whole_recurrent_layer():
    model, x, y = build("lstm-default-layout")
    x.requires_grad_()
    with gf.record(model, **EVERYTHING) as rec:
        inner = torch.utils.checkpoint.checkpoint(model[0], x, use_reentrant=False)
        F.cross_entropy(model[1](inner), y).backward()
    assert_matches(rec, one_at_a_time(model, losses_of(x.detach(), y)))


def test_rows_of_an_example_and_batch_second_layouts():
    model = nn.Sequential(Odd(D, 3))
    x, y = torch.randn(B, T, D), torch.randint(0, 3, (B,))
    oracle = one_at_a_time(model, lambda m: F.cross_entropy(m(x.double()).mean(1), y, reduction="none"))
    with gf.record(model, **EVERYTHING, batch_size=B) as rec:
        F.cross_entropy(model(x.reshape(B * T, D)).reshape(B, T, 3).mean(1), y).backward()
    assert_matches(rec, oracle)
    with gf.record(model, **EVERYTHING, batch_dim=1) as rec:
        F.cross_entropy(model(x.transpose(0, 1)).mean(0), y).backward()
    assert_matches(rec, oracle)
    with gf.record(model, **EVERYTHING, batch_dim=1, batch_size=B) as rec:
        F.cross_entropy(model(x.transpose(0, 1).reshape(T * B, D)).reshape(T, B, 3).mean(0), y).backward()
    assert_matches(rec, oracle)


def test_outputs_that_get_no_gradient():
    model = Pair()
    x = torch.randn(B, D)
    with gf.record(model, **EVERYTHING, loss_reduction="sum") as rec:
        model(x)["hidden"].square().sum().backward()
    oracle = one_at_a_time(model, lambda m: m(x.double())["hidden"].square().sum(1))
    assert_matches(rec, oracle)


@pytest.mark.parametrize("name", ["class-token-and-positions", "attention-batch-first-padding", "prelu"])
def test_autocast_is_repeated(name):
    model, x, y = build(name)
    twin = copy.deepcopy(model)
    for m in (twin, model):
        rec = gf.record(m, **EVERYTHING)
        with torch.autocast("cpu", torch.bfloat16):
            if m is twin:
                loss = F.cross_entropy(m(x).float(), y)
            else:
                rec.__enter__()
                loss = F.cross_entropy(m(x).float(), y)
        loss.backward()
    rec.__exit__(None, None, None)
    assert_same_grads(model, grads(twin))
    assert_matches(rec, one_at_a_time(model, losses_of(x.double(), y)), rtol=6e-2)


def test_a_filter_leaves_the_rest_of_the_module_alone():
    model, x, y = build("class-token-and-positions")
    with gf.record(model, parameters=["0.pos", "1.*"]) as rec:
        step(model, x, y)
    oracle = one_at_a_time(model, losses_of(x, y), names=rec.names)
    assert rec.names == ["0.pos", "1.weight", "1.bias"]
    for name, norms in rec.sq_norms_by_parameter.items():
        torch.testing.assert_close(norms.double(), oracle[name].flatten(1).square().sum(1), rtol=2e-5, atol=1e-8)
    with gf.record(model, parameters="0.pos") as one, gf.record(model, parameters="0.cls") as other:
        step(model, x, y)
    assert torch.equal(one.sq_norms, rec.sq_norms_by_parameter["0.pos"]) and other.sq_norms.shape == (B,)


def test_a_compiled_model_and_evaluation_inside_the_record():
    model, x, y = build("class-token-and-positions")
    compiled = torch.compile(model, backend="eager")
    with gf.record(compiled, **EVERYTHING) as rec:
        with torch.no_grad():
            model(x)
        step(compiled, x, y)
    assert_matches(rec, one_at_a_time(model, losses_of(x, y)))


def test_nothing_is_left_behind_after_an_error():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.fail = nn.Parameter(torch.ones(D)), True

        def forward(self, x):
            if self.fail:
                raise ZeroDivisionError
            return x * self.scale

    model = nn.Sequential(Fails(), nn.Linear(D, 3))
    x, y = torch.randn(B, D), torch.randint(0, 3, (B,))
    with gf.record(model) as rec:
        with pytest.raises(ZeroDivisionError):
            model(x)
        model[0].fail = False
        step(model, x, y)
    assert rec.sq_norms.shape == (B,)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
    with pytest.raises(ZeroDivisionError), gf.record(model):
        model[0].fail = True
        model(x)
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks


def test_buffers_and_random_state_stay_as_they_are():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.calls = nn.Parameter(torch.ones(D)), nn.Buffer(torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x * self.scale

    model = nn.Sequential(Counts(), nn.Linear(D, 3))
    state = torch.get_rng_state()
    with gf.record(model) as rec:
        F.cross_entropy(model(torch.ones(B, D)), torch.zeros(B, dtype=torch.long)).backward()
    assert model[0].calls == 1 and torch.equal(torch.get_rng_state(), state) and rec.sq_norms.shape == (B,)
