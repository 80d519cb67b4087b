"""Generated layers and small compositions of them, with every option crossed: each example run alone, in float64.

What is generated is the same in every run. ``GRADCLUST_SEARCH=1000 pytest tests/test_layer_search.py`` looks at that
many other configurations a test instead.
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st
from recorded import assert_matches, assert_same_grads, grads
from torch import nn

import gradclust_fast as gf

pytestmark = pytest.mark.filterwarnings("ignore")  # even kernels with padding="same", projections
SEARCH = int(os.environ.get("GRADCLUST_SEARCH", 0))


def search(examples):
    return settings(
        max_examples=SEARCH or examples,
        derandomize=not SEARCH,
        phases=[Phase.generate],  # the configurations are small already, and shrinking takes minutes
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Stages(nn.Module):
    """Layers one after the other, each with the function that calls it. Input and output have the batch first."""

    def __init__(self):
        super().__init__()
        self.layers, self.calls, self.log = nn.ModuleList(), [], []

    def add(self, layer, call=lambda layer, x: layer(x)):
        self.layers.append(layer)
        self.calls.append((len(self.layers) - 1, call))
        self.log.append(repr(layer))

    def again(self, index, call, name):
        self.calls.append((index, call))
        self.log.append(f"{name} of {self.log[index]}")

    def then(self, function, name):
        self.calls.append((None, function))
        self.log.append(name)

    def forward(self, x):
        for index, call in self.calls:
            x = call(x) if index is None else call(self.layers[index], x)
        return x


def shares(model, x):
    """[B] losses that depend on every output in a way that is not linear."""
    out = model(x)
    out = out.reshape(len(out), out.shape[1:].numel())
    return (torch.sin(out) * torch.linspace(-1, 1.3, out.shape[1], dtype=out.dtype)).sum(1)


def verify(draw, model, x):
    """Every quantity of every parameter against the examples run alone; ``.grad`` as without the record."""
    B, mean = len(x), draw(st.booleans())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # away from zero biases and scales of one
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    single = draw(st.integers(0, 3)) == 0
    model = model.float() if single else model.double()
    x = x.to(torch.float32 if single else torch.float64) if x.is_floating_point() else x
    note(f"B={B} input={list(x.shape)} {x.dtype} mean={mean}\n" + "\n".join(model.log))
    twin, loss = copy.deepcopy(model), torch.mean if mean and B else torch.sum
    try:
        loss(shares(twin, x)).backward()
    except (RuntimeError, IndexError):
        assume(B)  # some of torch's layers refuse an empty batch
        raise
    wide = copy.deepcopy(model).double()
    oracle = {name: p.new_zeros(B, *p.shape) for name, p in wide.named_parameters()}
    for b in range(B):
        wide.zero_grad()
        one = x[b : b + 1]
        shares(wide, one.double() if one.is_floating_point() else one).sum().backward()
        for name, p in wide.named_parameters():
            if p.grad is not None:
                oracle[name][b] = p.grad
    # A gradient that vanishes next to the others is nothing but their rounding: it cannot be compared.
    largest = {name: float(rows.abs().max()) if B else 1.0 for name, rows in oracle.items()}
    least = (1e-2 if single else 1e-5) * max(largest.values())
    oracle = {name: rows for name, rows in oracle.items() if largest[name] > least}
    assume(max(largest.values()) > 1e-6)
    sketch = gf.Sketch(dim=5, sides=(2, 3), reduce=draw(st.booleans()))
    fused = draw(st.booleans())
    options = {"sketch": sketch, "gram": True, "moments": True, "parameters": list(oracle), "fused": fused}
    with (
        gf.backend(draw(st.sampled_from(["auto", "auto", "reference"]))),
        gf.record(model, **options, loss_reduction="mean" if mean and B else "sum") as rec,
    ):
        loss(shares(model, x)).backward()
    if fused:  # sums in another order
        for name, want in grads(twin).items():
            found, rtol = dict(model.named_parameters())[name].grad, 1e-4 if single else 1e-9
            if want is None:
                assert found is None, name
            else:
                torch.testing.assert_close(found, want, rtol=rtol, atol=rtol * max(largest.values()), msg=name)
    else:
        assert_same_grads(model, grads(twin))
    assert rec.sq_norms.shape == (B,) and rec.gram.shape == (B, B) and len(rec.sketches) == B
    if B:
        assert_matches(rec, oracle, rtol=1e-3 if single else 1e-8)


def sizes(draw, n, low=1, high=5):
    return [draw(st.integers(low, high)) for _ in range(n)]


def batch_size(draw):
    return draw(st.sampled_from([3, 2, 1, 4, 5, 0]))  # small sizes: other dimensions are often as long as the batch


def seeded(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))


# --- convolutions ------------------------------------------------------------------------------------------------


def conv_of(draw, C, spatial):
    """A convolution for [C, *spatial] inputs whose kernel fits."""
    n = len(spatial)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if C % g == 0]))
    O = groups * draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 4)) for _ in range(n)]
    dilation = [draw(st.integers(1, 3)) for _ in range(n)]
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect", "replicate"]))
    if mode == "reflect" and n == 3:
        mode = "zeros"  # reflection_pad3d has no deterministic double backward in eager float64
    reach = [d * (k - 1) for k, d in zip(kernel, dilation)]
    # Padding beyond the kernel is allowed; circular and reflected padding must fit into the image.
    padding = draw(st.sampled_from(["same", "valid", "numbers", "numbers"]))
    pads = [0] * n
    if padding == "numbers":
        limit = [min(3, s - 1 if mode == "reflect" else s) if mode != "zeros" else 3 for s in spatial]
        pads = padding = [draw(st.integers(0, limit[i])) for i in range(n)]
    elif padding == "same":
        pads = [(r + 1) // 2 for r in reach]
        if mode != "zeros":
            assume(all(p < s or (mode != "reflect" and p <= s) for p, s in zip(pads, spatial)))
    total = reach if padding == "same" else [2 * p for p in pads]
    assume(all(s + t > r for s, t, r in zip(spatial, total, reach)))
    stride = [1] * n if padding == "same" else [draw(st.integers(1, 3)) for _ in range(n)]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    return kind(C, O, kernel, bias=draw(st.booleans()), **options)


def transposed_of(draw, C, spatial):
    n = len(spatial)
    groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if C % g == 0]))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(n)] for _ in range(3))
    padding = [draw(st.integers(0, 3)) for _ in range(n)]
    extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation)]
    out = [
        (s - 1) * st_ - 2 * p + d * (k - 1) + e + 1
        for s, st_, p, d, k, e in zip(spatial, stride, padding, dilation, kernel, extra)
    ]
    assume(all(o > 0 for o in out))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[n - 1]
    return kind(
        C, groups * draw(st.integers(1, 3)), kernel, stride, padding, extra, groups, draw(st.booleans()), dilation
    )


@pytest.mark.parametrize("kind", [conv_of, transposed_of], ids=["conv", "transposed"])
@search(70)
@given(data=st.data())
def test_convolutions(kind, data):
    draw = data.draw
    seeded(draw)
    C, n = draw(st.integers(1, 4)), draw(st.sampled_from([2, 1, 3]))
    spatial, model = sizes(draw, n, 1, 6 if n < 3 else 4), Stages()
    model.add(kind(draw, C, spatial))
    x = torch.randn(batch_size(draw), C, *spatial)
    if draw(st.booleans()) and n == 2:
        x = x.to(memory_format=torch.channels_last)
    assume(model(x[:1] if len(x) else torch.zeros(1, C, *spatial)).numel() > 0)
    verify(draw, model, x)


# --- layers on feature vectors -----------------------------------------------------------------------------------


class Two(nn.Bilinear):
    """An input with itself."""


class Attend(nn.Module):
    def __init__(self, draw, F_):
        super().__init__()
        heads = draw(st.sampled_from([h for h in (1, 2, 3) if F_ % h == 0]))
        self.first, own = draw(st.booleans()), draw(st.booleans())
        self.attention = nn.MultiheadAttention(
            F_,
            heads,
            bias=draw(st.booleans()),
            add_bias_kv=draw(st.booleans()),
            add_zero_attn=draw(st.booleans()),
            kdim=F_ if own else None,
            vdim=F_ if own and draw(st.booleans()) else None,
            batch_first=self.first,
        )
        self.causal, self.weights = draw(st.booleans()), draw(st.booleans())

    def forward(self, x):
        query = x if self.first else x.transpose(0, 1)
        T = x.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1) if self.causal else None
        out, weights = self.attention(query, query.sin(), query, attn_mask=mask, need_weights=self.weights)
        out = out if self.first else out.transpose(0, 1)
        return out if weights is None else out + weights.sum(2, keepdim=True) * weights[:, :, :1]


class Recur(nn.Module):
    def __init__(self, draw, F_):
        super().__init__()
        kind = draw(st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]))
        hidden, self.first = draw(st.integers(2, 4)), draw(st.booleans())
        options = {"proj_size": 1} if kind is nn.LSTM and draw(st.integers(0, 2)) == 0 else {}
        if kind is nn.RNN:
            options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
        self.layer = kind(
            F_,
            hidden,
            draw(st.integers(1, 2)),
            bias=draw(st.booleans()),
            batch_first=self.first,
            bidirectional=draw(st.booleans()),
            **options,
        )
        self.state = draw(st.booleans())

    def forward(self, x):
        out, state = self.layer(x if self.first else x.transpose(0, 1))
        out = out if self.first else out.transpose(0, 1)
        state = state[0] if isinstance(state, tuple) else state
        return out + state.sum(0)[:, None, :1] if self.state else out


class Cell(nn.Module):
    def __init__(self, draw, F_):
        super().__init__()
        kind = draw(st.sampled_from([nn.LSTMCell, nn.GRUCell, nn.RNNCell]))
        self.cell = kind(F_, draw(st.integers(1, 4)), bias=draw(st.booleans()))

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state


def trailing(draw, shape):
    """The last dimensions of one example, one or two of them."""
    return shape[-draw(st.integers(1, min(2, len(shape)))) :]


def feature_layer(draw, model, shape):
    """Adds a layer for [B, *shape] with the features last."""
    F_, first = shape[-1], len(shape) == 2
    kinds = ["linear", "linear", "layer-norm", "rms-norm", "bilinear", "prelu"]
    kind = draw(st.sampled_from(kinds + ["attention", "recurrent", "cell"] * first))
    if kind == "linear":
        model.add(nn.Linear(F_, draw(st.integers(1, 5)), bias=draw(st.booleans())))
    elif kind == "layer-norm":
        affine = draw(st.integers(0, 4)) > 0
        options = {"bias": draw(st.booleans())} if affine else {"elementwise_affine": False}
        model.add(nn.LayerNorm(trailing(draw, shape), eps=draw(st.sampled_from([1e-5, 0.1])), **options))
    elif kind == "rms-norm":
        model.add(nn.RMSNorm(trailing(draw, shape), eps=draw(st.sampled_from([1e-6, 0.1]))))
    elif kind == "bilinear":
        layer = Two(F_, F_, draw(st.integers(1, 3)), bias=draw(st.booleans()))
        model.add(layer, lambda layer, x: layer(x, x.cos()))
    elif kind == "prelu":
        model.add(nn.PReLU(draw(st.sampled_from([1, shape[0]]))))
    else:
        made = {"attention": Attend, "recurrent": Recur, "cell": Cell}[kind]
        model.add(made(draw, F_))
        model.log[-1] += f" {[(k, v) for k, v in vars(model.layers[-1]).items() if isinstance(v, bool)]}"


@search(110)
@given(data=st.data())
def test_layers_on_features(data):
    draw = data.draw
    seeded(draw)
    shape, model = sizes(draw, draw(st.sampled_from([2, 1, 3, 4])), 1, 4), Stages()
    feature_layer(draw, model, shape)
    assume(list(model.parameters()))
    verify(draw, model, torch.randn(batch_size(draw), *shape))


# --- layers on channels ------------------------------------------------------------------------------------------


def channel_norm(draw, model, C, spatial):
    kind = draw(st.sampled_from(["group", "instance", "batch", "prelu"]))
    n = len(spatial)
    eps = draw(st.sampled_from([1e-5, 0.1]))
    if kind == "group":
        groups = draw(st.sampled_from([g for g in (1, 2, 3, 4) if C % g == 0]))
        assume(C * torch.Size(spatial).numel() > groups)  # torch refuses a single value
        model.add(nn.GroupNorm(groups, C, eps))
    elif kind == "prelu":
        model.add(nn.PReLU(draw(st.sampled_from([1, C]))))
    elif kind == "instance" and torch.Size(spatial).numel() > 1:
        running = draw(st.booleans())
        layer = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[n - 1]
        model.add(layer(C, eps, affine=True, track_running_stats=running).eval())
    else:
        layer = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[n - 1]
        model.add(layer(C, eps).eval())


@search(40)
@given(data=st.data())
def test_layers_on_channels(data):
    draw = data.draw
    seeded(draw)
    C, spatial, model = draw(st.integers(1, 4)), sizes(draw, draw(st.integers(1, 3)), 1, 4), Stages()
    channel_norm(draw, model, C, spatial)
    verify(draw, model, 1 + torch.randn(batch_size(draw), C, *spatial))


# --- embeddings --------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """[B, T] indices as rows, or as one list with offsets where the first bags are shorter."""

    def __init__(self, draw, V, D, padding):
        super().__init__()
        mode = draw(st.sampled_from(["sum", "mean"]))
        self.last = draw(st.booleans())
        self.bag = nn.EmbeddingBag(V, D, mode=mode, include_last_offset=self.last, padding_idx=padding)
        self.weighted = mode == "sum" and draw(st.booleans())
        self.ragged = self.last or draw(st.booleans())

    def forward(self, index):
        weights = torch.sin(index.to(self.bag.weight.dtype) + 1) if self.weighted else None
        if not self.ragged:
            return self.bag(index, per_sample_weights=weights)
        # A bag ends where its own first index says, so that an example alone is cut in the same way.
        lengths = index[:, 0] % (index.shape[1] + 1)
        keep = torch.arange(index.shape[1]) < lengths[:, None]
        offsets = lengths.cumsum(0) - lengths
        offsets = torch.cat([offsets, lengths.sum()[None]]) if self.last else offsets
        return self.bag(index[keep], offsets, per_sample_weights=None if weights is None else weights[keep])


@search(50)
@given(data=st.data())
def test_embeddings_and_bags(data):
    draw = data.draw
    seeded(draw)
    V, D, model = draw(st.integers(1, 7)), draw(st.integers(1, 4)), Stages()
    padding = draw(st.one_of(st.none(), st.integers(-V, V - 1)))
    shape = sizes(draw, draw(st.integers(0, 3)), 1, 4)
    if len(shape) == 1 and draw(st.booleans()):
        model.add(Bag(draw, V, D, padding))
    else:
        scale = draw(st.sampled_from([None, 100.0]))
        model.add(nn.Embedding(V, D, padding_idx=padding, max_norm=scale))
    verify(draw, model, torch.randint(0, V, (batch_size(draw), *shape)))


# --- compositions ------------------------------------------------------------------------------------------------


def compose(draw, model, shape):
    """Two to four layers; some parameters are used again, tied, or used through a function."""
    image = False  # whether the channels are first
    probe = torch.zeros(1, *shape)
    for _ in range(draw(st.integers(2, 4))):
        shape = list(model(probe).shape[1:])
        if len(shape) > 1 and draw(st.integers(0, 2)) == 0:
            image = not image
            if image:
                model.then(lambda x: x.movedim(-1, 1), "features to channels")
            else:
                model.then(lambda x: x.movedim(1, -1), "channels to features")
            shape = list(model(probe).shape[1:])
        if image and 2 <= len(shape) <= 4:
            made = draw(st.sampled_from(["conv", "transposed", "norm"]))
            if made == "norm":
                channel_norm(draw, model, shape[0], shape[1:])
            else:
                model.add((conv_of if made == "conv" else transposed_of)(draw, shape[0], shape[1:]))
        else:
            image = False
            feature_layer(draw, model, shape)
        out = list(model(probe).shape[1:])
        assume(0 < torch.Size(out).numel() < 300)
        last = model.layers[-1]
        model.then(*draw(st.sampled_from([(torch.tanh, "tanh"), (lambda x: F.relu(x, inplace=True), "relu_")])))
        own = len(model.layers) - 1
        if out == shape and draw(st.booleans()):
            model.again(own, model.calls[-2][1], "second use")
        if type(last) is nn.Linear and draw(st.booleans()):
            if last.in_features == last.out_features:
                way = draw(st.sampled_from(["functional", "transposed", "product"]))
                call = {
                    "functional": lambda layer, x: x + F.linear(x.sin(), layer.weight),
                    "transposed": lambda layer, x: torch.matmul(x, layer.weight.t()),
                    "product": lambda layer, x: x @ layer.weight,
                }[way]
                model.again(own, call, way)
            else:
                model.again(own, lambda layer, x: torch.matmul(x, layer.weight), "product back")
        if type(last) is nn.Linear and draw(st.integers(0, 2)) == 0:
            other = next((m for m in model.layers if type(m) is nn.Linear and m is not last), None)
            if other is not None and other.weight.shape == last.weight.shape:
                last.weight = other.weight
                model.log.append("tied to the one before")


@search(120)
@given(data=st.data())
def test_compositions(data):
    draw = data.draw
    seeded(draw)
    model = Stages()
    B = batch_size(draw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if draw(st.booleans()):
            V = draw(st.integers(2, 6))
            table = nn.Embedding(V, draw(st.integers(2, 4)), padding_idx=draw(st.sampled_from([None, 0])))
            model.add(table)
            x = torch.randint(0, V, (B, *sizes(draw, draw(st.integers(1, 2)), 1, 4)))
            model.then(torch.tanh, "tanh")
            probe_shape = x.shape[1:]
            compose_from_index(draw, model, probe_shape)
        else:
            shape = sizes(draw, draw(st.integers(1, 3)), 1, 4)
            x = torch.randn(B, *shape)
            compose(draw, model, shape)
    assume(list(model.parameters()))
    verify(draw, model, x)


def compose_from_index(draw, model, shape):
    """Layers over an embedding, whose table may be the last layer's weight too."""
    table = model.layers[0]
    F_ = table.embedding_dim
    model.add(nn.Linear(F_, F_))
    model.then(torch.tanh, "tanh")
    if draw(st.booleans()):
        model.again(1, lambda layer, x: layer(x).tanh(), "second use")
    way = draw(st.sampled_from(["tied head", "functional", "transposed", "none"]))
    if way == "tied head":
        head = nn.Linear(F_, table.num_embeddings, bias=draw(st.booleans()))
        head.weight = table.weight
        model.add(head)
    elif way == "functional":
        model.again(0, lambda layer, x: F.linear(x, layer.weight), way)
    elif way == "transposed":
        model.again(0, lambda layer, x: x @ layer.weight.T, way)
    if draw(st.booleans()):
        model.then(lambda x: x.flatten(1, -2).mean(1) if x.dim() > 2 else x, "mean over positions")
