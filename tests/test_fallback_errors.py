"""Recomputed modules: what cannot be right raises, and nothing lingers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from claimed import B, D, Masked, T, build, losses_of, step
from recorded import EVERYTHING, assert_matches, one_at_a_time
from torch import nn

import gradclust_fast as gf
from gradclust_fast.watching import Watch


class Wrapped(nn.Module):
    """A bare parameter next to whatever else."""

    def __init__(self, inner, after=None):
        super().__init__()
        self.gain, self.inner, self.after = nn.Parameter(torch.ones(D)), inner, after

    def forward(self, x):
        out = self.inner(x) * self.gain
        return out if self.after is None else self.after(out)


def refused(model, x, error, message, **options):
    with pytest.raises(error, match=message), gf.record(model, **options):
        out = model(x)
        (out if isinstance(out, torch.Tensor) else out[0]).square().sum().backward()


def test_dropout_inside_is_refused_and_may_be_switched_off():
    x = torch.randn(B, T, D)
    message = r"0.in_proj_weight.*MultiheadAttention drew random numbers.*eval\(\)"
    model = nn.Sequential(nn.MultiheadAttention(D, 2, 0.5, batch_first=True))
    with pytest.raises(NotImplementedError, match=message), gf.record(model):
        model[0](x, x, x)
    refused(nn.LSTM(D, D, 2, dropout=0.5), x, NotImplementedError, "LSTM drew random numbers")
    model = nn.Sequential(Wrapped(nn.Dropout(0.5)), nn.Linear(D, 3))
    refused(model, x, NotImplementedError, "0.gain: Wrapped drew")
    with gf.record(model, parameters="1.*"):
        model(x).sum().backward()
    with gf.record(model.eval()) as rec:
        model(x).sum().backward()
    assert rec.sq_norms.shape == (B,)


class Zeroed(Wrapped):
    """Mixes examples where neither the output nor its shape shows it."""

    def __init__(self):
        super().__init__(nn.Identity())
        nn.init.zeros_(self.gain)

    def forward(self, x):
        return x + self.gain * x.cumsum(0)


@pytest.mark.parametrize(
    "model, error, message",
    [
        (Wrapped(nn.BatchNorm1d(D)), RuntimeError, "gain: Wrapped.* alone"),
        (Wrapped(nn.Softmax(0)), RuntimeError, "gain: Wrapped gives an example another output alone"),
        (Zeroed(), RuntimeError, "gain: its per-example gradients do not add up to its gradient"),
        (Wrapped(nn.Identity(), lambda out: out.mean()), NotImplementedError, r"gain: Wrapped returns \[\]"),
        (Wrapped(nn.Identity(), lambda out: {1, out}), NotImplementedError, "gain: Wrapped returns a set"),
    ],
)
def test_modules_that_mix_examples_are_found_out(model, error, message):
    x = torch.randn(B, D)
    with pytest.raises(error, match=message), gf.record(model, parameters="gain"):
        model(x).square().sum().backward()
    if not isinstance(model.after, type(None)):
        return
    with pytest.raises(error, match=message), Watch(model, lambda name, factors: None, parameters="gain") as watch:
        watch.backward(model(x).square().sum(1))


def test_a_hook_on_the_parameter_does_not_look_like_mixed_examples():
    model, x, y = build("class-token-and-positions")
    model[0].pos.register_hook(lambda grad: grad * 2)
    with gf.record(model) as rec:
        step(model, x, y)
    assert rec.sq_norms.shape == (B,)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(D))

    def forward(self):
        return self.rows * 2


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = Table()

    def forward(self, x):
        return x + self.table()


def test_no_batch_packed_sequences_and_changed_inputs_are_refused():
    x = torch.randn(T, B, D)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 3, 2, 1]))
    with (
        pytest.raises(NotImplementedError, match=r"weight_ih_l0.*PackedSequence.*padded"),
        gf.record(nn.GRU(D, D)) as r,
    ):
        r.model(packed)
    refused(nn.LSTM(D, D), x[:, 0], ValueError, r"weight_ih_l0.*without a batch dimension; unsqueeze\(0\)")
    refused(Positions(), x, NotImplementedError, "table.rows: Table is called without a tensor")
    model = nn.Sequential(nn.Identity(), nn.GRU(D, D))
    with pytest.raises(RuntimeError, match=r"1.weight_ih_l0.*modified in place"), gf.record(model):
        out = model(x)[0]
        x.add_(1)
        out.sum().backward()


def test_a_parameter_used_outside_of_its_module_is_refused():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Wrapped(nn.Identity())

        def forward(self, x):
            return self.child(x) + self.child.gain

    refused(Parent(), torch.randn(B, D), NotImplementedError, "child.gain has no per-example route: .*add")


def test_gradients_of_gradients_are_refused():
    model, x, y = build("lstm-cell")
    with pytest.raises(NotImplementedError, match=r"create_graph=True"), gf.record(model, parameters="0.*"):
        torch.autograd.grad(losses_of(x, y)(model).sum(), list(model.parameters()), create_graph=True)


def test_a_forward_without_backward_keeps_nothing():
    model, x, y = build("class-token-and-positions")
    gc.disable()
    try:
        with gf.record(model) as rec:
            for _ in range(2):
                held = torch.randn_like(x)
                alive = weakref.ref(held.untyped_storage())
                out = model(held)
                del held, out
            assert alive() is None and not list(rec._backwards.module_uses)
            step(model, x, y)
    finally:
        gc.enable()
    assert rec.sq_norms.shape == (B,)


def test_an_input_read_the_wrong_way_is_never_silent():
    model, x, y = Masked(0.0), torch.randn(B, B, D), torch.randint(0, D, (B,))
    with pytest.raises(RuntimeError, match=r"gate.alpha: its per-example gradients do not add up"), gf.record(model):
        step(model, x, y)


def test_modules_inside_modules_each_answer_for_their_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.rnn, self.act = nn.Parameter(torch.randn(D)), nn.LSTM(D, D, batch_first=True), nn.PReLU()

        def forward(self, x, *, factor):
            return self.act(self.rnn(x * self.scale)[0][:, -1] * self.scale) * factor

    model, x, y = Outer(), torch.randn(B, T, D), torch.randint(0, D, (B,))

    def losses(m):
        return F.cross_entropy(m(x.to(m.scale.dtype), factor=torch.tensor(2.0)), y, reduction="none")

    with gf.record(model, **EVERYTHING) as rec:
        losses(model).mean().backward()
    assert_matches(rec, one_at_a_time(model, losses))


def test_many_steps_leave_no_objects():
    model, x, y = build("lstm-default-layout")
    counts = []
    for i in range(20):
        with gf.record(model):
            step(model, x, y)
        if i in (5, 19):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] <= counts[0] + 10


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_weight_made_by_a_hook_of_the_module():
    model, (x, y) = nn.utils.weight_norm(nn.Linear(D, 3)), (torch.randn(B, D), torch.randint(0, 3, (B,)))
    with gf.record(model) as rec:
        step(model, x, y)
    losses = F.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in losses]
    want = [sum(grad.square().sum() for grad in row) for row in rows]
    torch.testing.assert_close(rec.sq_norms, torch.stack(want), rtol=2e-5, atol=1e-8)
