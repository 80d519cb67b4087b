"""Recording under checkpointing, autocast and the compiler, and with other batch layouts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import (
    EVERYTHING,
    MODELS,
    assert_matches,
    assert_same_grads,
    batch,
    cross_entropy,
    logits,
    mlp,
    one_at_a_time,
    plain_step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradclust_fast as gf

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*torch.jit.script_method"
)


class Checkpointed(nn.Module):
    """A shared layer inside and outside of two checkpointed blocks."""

    def __init__(self, reentrant: bool, shared: bool) -> None:
        super().__init__()
        self.reentrant, self.use_shared = reentrant, shared
        self.first, self.block, self.shared, self.head = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )

    def inside(self, x):
        x = torch.relu_(self.block(x))
        return torch.tanh(self.shared(x)) if self.use_shared else x

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        x = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return self.head(torch.tanh(self.shared(x)) if self.use_shared else x)


class Plain(Checkpointed):
    def forward(self, x):
        x = self.inside(self.inside(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.shared(x)) if self.use_shared else x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backwards", [1, 2])
def test_activation_checkpointing(reentrant, shared, backwards):
    model = Checkpointed(reentrant, shared)
    if not shared:
        del model.shared
    x, y = batch()
    expected = plain_step(model, lambda m: [F.cross_entropy(m(x), y).backward() for _ in range(backwards)])
    with gf.record(model, moments=True) as rec:
        for _ in range(backwards):
            F.cross_entropy(model(x), y).backward()
    assert_same_grads(model, expected)
    plain = copy.deepcopy(model)
    plain.__class__ = Plain
    oracle = one_at_a_time(plain, cross_entropy(x, y))
    assert_matches(rec, {name: torch.cat([g] * backwards) for name, g in oracle.items()})


@pytest.mark.parametrize("name", ["mlp", "linear-one-position-dim", "conv-strided", "tied-reused-functional"])
@pytest.mark.parametrize("leaf", [False, True])
def test_autocast_rows_are_those_of_the_half_precision_factors(name, leaf):
    build, shape = MODELS[name]
    model = build()
    x, y = batch(shape)
    x.requires_grad_(leaf)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(logits(model(x)).float(), y)
        loss.backward()

    expected = plain_step(model, step)
    input_grad, x.grad = x.grad, None
    with gf.record(model, **EVERYTHING) as rec:
        step(model)
    assert_same_grads(model, expected)
    assert not leaf or torch.equal(x.grad, input_grad)
    assert rec.sq_norms.dtype == torch.float32
    x = x.detach()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)), rtol=5e-2)


def test_a_record_opened_inside_autocast_after_another_forward():
    model = mlp()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, 6)).sum()
        with gf.record(model) as rec:
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)), rtol=5e-2)


def test_backward_under_autocast_still_accumulates_in_float32():
    model = mlp()
    x, y = batch()
    with gf.record(model, gram=True) as rec, torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
    assert rec.gram.dtype == torch.float32
    torch.testing.assert_close(rec.gram.diagonal(), rec.sq_norms, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_models(half):
    model = mlp().to(half)
    x, y = batch()
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x.to(half)).float(), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x.to(half), y)), rtol=5e-2)


def test_a_compiled_model_is_recorded_eagerly():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    compiled(x)
    with gf.record(compiled, **EVERYTHING) as rec:
        F.cross_entropy(compiled(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))
    torch.testing.assert_close(compiled(x), model(x))


def test_wrapper_prefixes_are_stripped_from_names():
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    x, y = batch()
    for model in (Parallel(mlp()), torch.compile(Parallel(mlp()), backend="eager"), Parallel(torch.compile(mlp()))):
        with gf.record(model, parameters="0.*") as rec:
            F.cross_entropy(model(x), y).backward()
        assert rec.names == ["0.weight", "0.bias"]


def test_batch_second_layout():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(True), nn.Linear(5, 3))
    x, y = torch.randn(7, 4, 6), torch.randint(0, 3, (4,))
    with gf.record(model, **EVERYTHING, batch_dim=1) as rec:
        F.cross_entropy(model(x).mean(0), y).backward()

    def shares(model):
        return F.cross_entropy(model(x.double()).mean(0), y, reduction="none")

    assert_matches(rec, one_at_a_time(model, shares))


def test_batch_second_with_a_head_on_pooled_features():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(x).tanh().mean(0))

    model, x, y = Model(), torch.randn(7, 4, 6), torch.randint(0, 3, (4,))
    with gf.record(model, **EVERYTHING, batch_dim=1) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_rows_folded_into_the_batch_are_unfolded_with_batch_size(batch_dim, groups):
    """groups 0: a linear layer; else a convolution."""
    feature = (6,) if groups == 0 else (2, 5, 4)
    layer = nn.Linear(6, 4) if groups == 0 else nn.Conv2d(2, 4, 3, groups=groups)
    model = nn.ModuleDict({"frames": layer, "head": nn.Linear(4, 3)})
    shape = (5, 3) if batch_dim == 0 else (3, 5)
    x, y = torch.randn(*shape, *feature), torch.randint(0, 3, (5,))

    def forward(model, x):
        frames = model["frames"](x.flatten(0, 1))
        frames = frames.flatten(2).mean(2) if groups else frames
        return model["head"](frames.tanh().unflatten(0, shape).mean(1 - batch_dim))

    with gf.record(model, **EVERYTHING, batch_size=5, batch_dim=batch_dim) as rec:
        F.cross_entropy(forward(model, x), y).backward()
    oracle = one_at_a_time(model, lambda m: F.cross_entropy(forward(m, x.double()), y, reduction="none"))
    assert_matches(rec, oracle)
