"""A record leaves nothing behind, keeps no memory, and ends where it should."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from recorded import (
    EVERYTHING,
    Tied,
    assert_matches,
    assert_same_grads,
    batch,
    cross_entropy,
    grads,
    mlp,
    one_at_a_time,
)
from torch import nn

import gradclust_fast as gf
from gradclust_fast.watching import _watched

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*torch.jit.script_method"
)


def state_of(model):
    return (
        [(p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        torch.get_num_threads(),
        len(torch.overrides._get_current_function_mode_stack()),
        dict(_watched),
    )


@pytest.mark.parametrize("fail", [None, "before forward", "before backward", "in backward"])
def test_nothing_is_left_behind(fail):
    model = Tied()
    x, y = batch()
    before = state_of(model)

    def refuse(grad):
        raise KeyError("in backward")

    def run():
        with gf.record(model, sketch=gf.Sketch(dim=4), **EVERYTHING) as rec:
            if fail == "before forward":
                raise KeyError(fail)
            out = model(x)
            if fail == "before backward":
                raise KeyError(fail)
            if fail == "in backward":
                out.register_hook(refuse)
            F.cross_entropy(out, y).backward()
        return rec

    if fail is None:
        reference = weakref.ref(run())
    else:
        with pytest.raises(KeyError, match=fail):
            run()
        reference = None
    assert state_of(model) == before
    gc.collect()
    assert reference is None or reference() is None
    with gf.record(model) as rec:  # the next record works
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_activations_are_freed_although_the_loss_is_kept():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = batch()
    seen = []
    model[1].register_forward_hook(lambda m, i, out: seen.append(weakref.ref(out)))
    with gf.record(model):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        gc.collect()
        assert seen[0]() is None
    assert loss.grad_fn is not None


def test_a_graph_that_outlives_the_record_works_and_is_not_recorded():
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
        late = F.cross_entropy(model(x), y)
    expected = grads(model)
    late.backward()
    assert rec.sq_norms.shape == (5,)
    assert_same_grads(model, {name: 2 * g for name, g in expected.items()})


def test_two_hundred_steps_do_not_grow():
    model = mlp()
    x, y = batch()

    def steps(n):
        for _ in range(n):
            with gf.record(model, sketch=gf.Sketch(dim=4)) as rec:
                F.cross_entropy(model(x), y).backward()
            rec.sq_norms.sum()

    steps(20)
    gc.collect()
    before = len(gc.get_objects())
    steps(200)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_two_models_can_be_recorded_at_once():
    one, two = mlp(), mlp()
    x, y = batch()
    with gf.record(one) as rec_one, gf.record(two) as rec_two:
        (F.cross_entropy(one(x), y) + F.cross_entropy(two(x), y)).backward()
    assert_matches(rec_one, one_at_a_time(one, cross_entropy(x, y)))
    assert_matches(rec_two, one_at_a_time(two, cross_entropy(x, y)))


def test_the_backend_of_the_record_is_used_in_backward(monkeypatch):
    from gradclust_fast import _dispatch

    seen = set()
    original = _dispatch.Op.choose
    monkeypatch.setattr(
        _dispatch.Op, "choose", lambda op, *a: seen.add(_dispatch.current_backend()) or original(op, *a)
    )
    model = mlp()
    x, y = batch()
    with gf.backend("reference"), gf.record(model):
        loss = F.cross_entropy(model(x), y)
        with gf.backend("auto"):
            loss.backward()
    assert seen == {"reference"}


def test_a_module_that_cannot_be_hooked_leaves_nothing_half_open():
    class Unhookable(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def register_forward_pre_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

        def forward(self, x):
            return x * self.scale

    model = nn.Sequential(nn.Linear(4, 4), Unhookable())
    with pytest.raises(RuntimeError, match="no hooks here"), gf.record(model):
        pass
    assert not _watched and not any(p._backward_hooks for p in model.parameters())
    with gf.record(model, parameters="0.*") as rec:
        model(torch.randn(3, 4)).sum().backward()
    assert rec.sq_norms.shape == (3,)
