"""Parameters without a factored route: their module is recomputed alone, one example at a time."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from recorded import Mean, assert_matches, assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf
from gradclust_fast.watching import Watch

EVERYTHING = {"sq_norms": True, "gram": True, "moments": True}
B, T, D = 5, 4, 6


class First(nn.Module):
    """The first of a recurrent layer's results, or both."""

    def __init__(self, layer, both=False, state=None, batch_first=False):
        super().__init__()
        self.layer, self.both, self.state, self.batch_first = layer, both, state, batch_first

    def forward(self, x):
        states = [] if self.state is None else [self.state(x)]
        out, state = self.layer(x, *states)
        out = out.mean(1 if self.batch_first else 0)
        return out + (state[0] if isinstance(state, tuple) else state)[-1].tanh() if self.both else out


class Cells(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


class Self(nn.Module):
    """Self-attention, with masks."""

    def __init__(self, masks="", **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, **options)
        self.masks, self.batch_first = masks, options.get("batch_first", False)

    def forward(self, x):
        n, t = (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])
        options = {}
        if "padding" in self.masks:
            options["key_padding_mask"] = torch.arange(t)[None] > torch.arange(n)[:, None]
        if "shared" in self.masks:
            options["attn_mask"] = torch.ones(t, t, dtype=torch.bool).triu(1)
        if "each" in self.masks:
            options["attn_mask"] = (torch.arange(2 * n * t * t).reshape(2 * n, t, t) % 7).to(x.dtype)
        if "weights" in self.masks:
            out, weights = self.attention(x, x, x, average_attn_weights=False, **options)
            return out.mean(1 if self.batch_first else 0) + weights.sum((1, 2, 3))[:, None] * weights[:, 0, 0, :1]
        out = self.attention(x, x, value=x, need_weights=False, **options)[0]
        return out.mean(1 if self.batch_first else 0)


class Token(nn.Module):
    """A class token and a position embedding around layers that have routes."""

    def __init__(self):
        super().__init__()
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, T + 1, D))
        self.body = nn.Linear(D, D)

    def forward(self, x):
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return torch.tanh(self.body(x))[:, 0] + x.mean(1)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(D)) for _ in range(2)])
        self.maps = nn.ParameterDict({"a": nn.Parameter(torch.randn(D, D))})

    def forward(self, x):
        return torch.tanh(x * self.scales[0]) @ self.maps["a"] + self.scales[1]


class Loopy(nn.Module):
    """Control flow that depends on the data: torch.func cannot vectorise it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x):
        out = x * self.weight
        if bool(x.isfinite().all()):
            out = out + x.sin() * self.weight.square()
        return out


class Gate(nn.Module):
    """Starts at zero, so the output alone would not tell how its inputs are read. The mask is as long as the batch."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, x, mask):
        return x + self.alpha.tanh() * (mask @ x if x.dim() == 2 else torch.einsum("st,btd->bsd", mask, x))


class Masked(nn.Module):
    def __init__(self, alpha):
        super().__init__()
        self.gate = Gate()
        with torch.no_grad():
            self.gate.alpha.fill_(alpha)

    def forward(self, x):
        return self.gate(x, torch.arange(1.0, 1 + x.shape[1] ** 2).reshape(x.shape[1], -1).to(x.dtype)).mean(1)


class Pair(nn.Module):
    """Hands out what it uses itself."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(D)), nn.Linear(D, D)

    def forward(self, x):
        hidden = torch.tanh(x * self.scale)
        return {"hidden": hidden, "out": self.out(hidden) * self.scale}


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        out = self.pair(x)
        return out["out"] + out["hidden"].square()


class Shared(nn.Module):
    """One weight in a module that answers for itself, in a linear layer and in a function."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Odd(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight

    def forward(self, x):
        return F.linear(self.second(self.first(self.first(x)).tanh()), self.first.weight)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * self.weight.sum().tanh() + self.bias


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Bilinear(D, D, D)

    def forward(self, x):
        return self.map(x, x.sin())


def state(layers, features):
    return lambda x: x.sum() * 0 + torch.linspace(-1, 1, layers * B * features).to(x.dtype).reshape(layers, B, features)


CASES = {  # name: (module that gives [B, D], shape of the input)
    "lstm-default-layout": (lambda: First(nn.LSTM(D, D)), (T, B, D)),
    "lstm-stacked-both-directions": (
        lambda: First(nn.LSTM(D, D // 2, 2, bidirectional=True, batch_first=True), batch_first=True),
        (B, T, D),
    ),
    "lstm-projected-no-bias-state": (lambda: First(nn.LSTM(D, 8, proj_size=D, bias=False), both=True), (T, B, D)),
    "gru-both-results-given-state": (lambda: First(nn.GRU(D, D, 2), both=True, state=state(2, D)), (T, B, D)),
    "gru-batch-first-given-state": (
        lambda: First(nn.GRU(D, D, batch_first=True), both=True, state=state(1, D), batch_first=True),
        (B, T, D),
    ),
    "rnn-relu": (lambda: First(nn.RNN(D, D, nonlinearity="relu"), both=True), (T, B, D)),
    "lstm-cell": (lambda: Cells(nn.LSTMCell(D, D)), (B, T, D)),
    "gru-cell": (lambda: Cells(nn.GRUCell(D, D)), (B, T, D)),
    "attention-default-layout": (lambda: Self(bias=True), (T, B, D)),
    "attention-batch-first-padding": (lambda: Self("padding", batch_first=True), (B, T, D)),
    "attention-shared-mask-length-of-batch": (lambda: Self("shared"), (B, B, D)),
    "attention-mask-each-head": (lambda: Self("each"), (T, B, D)),
    "attention-weights-and-output": (lambda: Self("weights", batch_first=True), (B, T, D)),
    "attention-bias-kv": (lambda: Self(add_bias_kv=True, add_zero_attn=True), (T, B, D)),
    "attention-own-kv-sizes": (lambda: Self(kdim=D, vdim=D, bias=False), (T, B, D)),
    "transformer-encoder-layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), Mean(1)),
        (B, T, D),
    ),
    "prelu": (lambda: nn.Sequential(nn.Linear(D, D), nn.PReLU(D)), (B, D)),
    "bilinear": (Two, (B, D)),
    "class-token-and-positions": (Token, (B, T, D)),
    "parameter-list": (Listed, (B, D)),
    "cannot-be-vectorised": (lambda: nn.Sequential(nn.Linear(D, D), Loopy()), (B, D)),
    "shared-mask-length-of-batch": (lambda: Masked(0.7), (B, B, D)),
    "uses-its-own-output": (Both, (B, D)),
    "overridden-tied-reused": (Shared, (B, D)),
    "in-place-after": (lambda: nn.Sequential(Odd(D, D), nn.ReLU(inplace=True), Odd(D, D), nn.ReLU(True)), (B, D)),
}


def build(name):
    make, shape = CASES[name]
    model = nn.Sequential(make(), nn.Linear(D, 3))
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1:
                p.add_(0.2 * torch.randn_like(p))
    return model, torch.randn(shape), torch.randint(0, 3, (B,))


def losses_of(x, y):
    return lambda model: F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y, reduction="none")


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


def step(model, x, y):
    F.cross_entropy(model(x), y).backward()


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


# --- what raises ---------------------------------------------------------------------------------------------------


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


def test_no_batch_packed_sequences_and_changed_inputs_are_refused():
    x = torch.randn(T, B, D)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 4, 3, 2, 1]))
    with (
        pytest.raises(NotImplementedError, match=r"weight_ih_l0.*PackedSequence.*padded"),
        gf.record(nn.GRU(D, D)) as r,
    ):
        r.model(packed)
    refused(nn.LSTM(D, D), x[:, 0], ValueError, r"weight_ih_l0.*without a batch dimension; unsqueeze\(0\)")
    position = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    nn.utils.parametrize.register_parametrization(position[0], "weight", nn.Identity())
    refused(position, x, NotImplementedError, "ParametrizationList is called without a tensor")
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
