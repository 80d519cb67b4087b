"""Recording of layer types other than linear and convolution, alone and inside small models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import Mean, assert_matches, assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf

EVERYTHING = {"sq_norms": True, "gram": True, "moments": True}


def randomised(module: nn.Module) -> nn.Module:
    """Weights of one and biases of zero would hide mistakes."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def check(model, x, y, losses=None, names=None, **options):
    """.grad is untouched and every quantity matches one example at a time."""

    def step(model):
        F.cross_entropy(model(x), y).backward()

    twin = copy.deepcopy(model)
    step(twin)
    with gf.record(model, **EVERYTHING, parameters=names, **options) as rec:
        step(model)
    assert_same_grads(model, grads(twin))

    def per_example(model):
        return F.cross_entropy(model(x.double() if x.is_floating_point() else x), y, reduction="none")

    assert_matches(rec, one_at_a_time(model, losses or per_example))
    return rec


NORMS = {  # name: (layer, shape of one example)
    "layer-norm-vector": (lambda: nn.LayerNorm(6), (6,)),
    "layer-norm-sequence": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "layer-norm-two-dims": (lambda: nn.LayerNorm((4, 6), eps=0.1), (3, 4, 6)),
    "rms-norm": (lambda: nn.RMSNorm(6), (4, 6)),
    "rms-norm-eps": (lambda: nn.RMSNorm((4, 6), eps=0.1), (3, 4, 6)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (6, 5, 4)),
    "group-norm-1d": (lambda: nn.GroupNorm(3, 6, eps=0.1), (6, 5)),
    "instance-norm": (lambda: nn.InstanceNorm2d(6, affine=True), (6, 5, 4)),
    "instance-norm-running": (lambda: nn.InstanceNorm1d(6, affine=True, track_running_stats=True).eval(), (6, 5)),
    "batch-norm-eval": (lambda: nn.BatchNorm2d(6).eval(), (6, 5, 4)),
    "batch-norm-vector-eval": (lambda: nn.BatchNorm1d(6, eps=0.1).eval(), (6,)),
}


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_layers(name):
    build, shape = NORMS[name]
    layer = randomised(build())
    if getattr(layer, "running_mean", None) is not None:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    channels_last = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    mean = Mean(*range(1, len(shape))) if channels_last else Mean(*range(2, len(shape) + 1))
    model = nn.Sequential(layer, nn.ReLU(inplace=True), mean if len(shape) > 1 else nn.Identity(), nn.Linear(6, 3))
    check(model, 2 + torch.randn(5, *shape), torch.randint(0, 3, (5,)))


def test_batchnorm_in_train_mode_gives_rows_that_add_up_to_grad():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), randomised(nn.BatchNorm2d(4)), nn.ReLU(True), Mean(2, 3), nn.Linear(4, 3))
    x, y = torch.randn(6, 2, 5, 5), torch.randint(0, 3, (6,))
    twin = copy.deepcopy(model).double()
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(rec.moments[name][0] / 6, p.grad, rtol=1e-4, atol=1e-7)
    hidden = twin[0](x.double())
    normal = F.batch_norm(hidden, None, None, training=True)
    out = twin[1](hidden)
    (grad,) = torch.autograd.grad(F.cross_entropy(twin[2:](out.clone()), y), out)
    rows = 6 * (grad * normal).sum((2, 3))
    torch.testing.assert_close(
        rec.sq_norms_by_parameter["1.weight"].double(), rows.square().sum(1), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_norms_accumulate_in_float32(half):
    for layer, shape in ((nn.LayerNorm(6), (4, 6)), (nn.RMSNorm(6), (4, 6)), (nn.GroupNorm(2, 6), (6, 5))):
        layer = layer.to(half)
        x = torch.randn(5, *shape).to(half)
        with gf.record(layer, moments=True, loss_reduction="sum") as rec:
            layer(x).float().square().sum().backward()
        assert rec.sq_norms.dtype == torch.float32
        assert_matches(rec, one_at_a_time(layer, lambda m, x=x: m(x.double()).square().flatten(1).sum(1)), rtol=3e-2)


def test_norms_under_autocast_leave_grad_alone():
    model = nn.Sequential(nn.Linear(6, 6), randomised(nn.LayerNorm(6)), nn.Linear(6, 3))
    x, y = torch.randn(5, 6), torch.randint(0, 3, (5,))
    twin = copy.deepcopy(model)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()

    step(twin)
    with gf.record(model) as rec:
        step(model)
    assert_same_grads(model, grads(twin))
    assert_matches(rec, one_at_a_time(model, lambda m: F.cross_entropy(m(x.double()), y, reduction="none")), rtol=8e-2)


class Text(nn.Module):
    """Embedding, optionally tied to the output layer or used by F.linear."""

    def __init__(self, tie=None, **options):
        super().__init__()
        self.table, self.body, self.tie = nn.Embedding(9, 6, **options), nn.Linear(6, 6), tie
        self.head = nn.Linear(6, 9, bias=False)
        if tie == "module":
            self.head.weight = self.table.weight
        elif tie == "function":
            del self.head

    def forward(self, index):
        x = torch.tanh(self.body(self.table(index))).mean(tuple(range(1, index.dim())))
        return F.linear(x, self.table.weight) if self.tie == "function" else self.head(x)


@pytest.mark.parametrize("tie", [None, "module", "function"])
@pytest.mark.parametrize("shape", [(7,), (2, 3), (1,)])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}, {"padding_idx": -1}, {"max_norm": 1.0}])
def test_embeddings(tie, shape, options):
    model = Text(tie, **options)
    with torch.no_grad():
        model.table(torch.arange(9))  # max_norm: every row within it, so that a copy stays the same
    index = torch.randint(0, 9, (5, *shape))
    index[0] = 4
    check(model, index, torch.randint(0, 9, (5,)))


def test_sparse_embedding_gradients():
    model = Text(sparse=True)
    index, y = torch.randint(0, 9, (5, 7)), torch.randint(0, 9, (5,))
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(index), y).backward()
    assert model.table.weight.grad.is_sparse and rec.noise_scale().trace > 0
    dense = Text()
    dense.load_state_dict(model.state_dict())
    assert_matches(rec, one_at_a_time(dense, lambda m: F.cross_entropy(m(index), y, reduction="none")))


@pytest.mark.parametrize("padding", [None, 2, "one of two uses"])
def test_embedding_factors_match_their_linear_form(padding):
    from gradclust_fast.layers import EmbeddingFactors

    def use(padding):
        return EmbeddingFactors(torch.randint(0, 9, (5, 7)), torch.randn(5, 7, 4), torch.Size((9, 4)), padding)

    factors = use(2).concat(use(None)) if isinstance(padding, str) else use(padding)
    plain = factors.linear()
    torch.testing.assert_close(factors.sqnorm(), plain.sqnorm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.gram(), plain.gram(), rtol=1e-4, atol=1e-5)
    for moment, expected in zip(factors.moments(), plain.moments()):
        torch.testing.assert_close(moment, expected, rtol=1e-4, atol=1e-5)
    left, right = torch.randn(9, 3), torch.randn(4, 2)
    for sides in ((left, right), (left, None), (None, right), (None, None)):
        torch.testing.assert_close(factors.sketch(*sides), plain.sketch(*sides), rtol=1e-4, atol=1e-5)
    for middle in ((), (1,), (2,)):
        centres = torch.randn(3, *middle, 9), torch.randn(3, *middle, 4)
        torch.testing.assert_close(factors.dot(*centres), plain.dot(*centres), rtol=1e-4, atol=1e-5)
    a, d = factors.rank1()
    torch.testing.assert_close(d.sum(1), torch.ones(5))
    torch.testing.assert_close(a, plain.act.sum(1))


def test_scale_grad_by_freq_is_refused_with_its_name():
    model = Text(scale_grad_by_freq=True)
    with pytest.raises(NotImplementedError, match=r"table.weight \(Embedding\).*gf.register_layer"), gf.record(model):
        pass
    linear = nn.Linear(6, 9, bias=False)
    with pytest.raises(NotImplementedError, match="weight: scale_grad_by_freq=True divides"), gf.record(linear):
        F.embedding(torch.zeros(2, 3, dtype=torch.long), linear.weight, scale_grad_by_freq=True)


class Transformer(nn.Module):
    """Pre-norm block with everything that has a route; batch-second on request."""

    def __init__(self, batch_dim=0):
        super().__init__()
        self.table, self.norm, self.qkv = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.proj, self.mlp_norm, self.head = nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 3)
        self.batch_dim = batch_dim

    def forward(self, index):
        x = self.table(index)
        q, k, v = self.qkv(self.norm(x)).transpose(0, self.batch_dim).chunk(3, -1)
        mixed = ((q @ k.mT).softmax(-1) @ v).transpose(0, self.batch_dim)
        x = self.mlp_norm(x + self.proj(mixed))
        return self.head(x).mean(1 - self.batch_dim)


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_a_transformer_block_in_either_layout(batch_dim):
    model = randomised(Transformer(batch_dim))
    index = torch.randint(0, 9, (5, 4) if batch_dim == 0 else (4, 5))
    rec = check(model, index, torch.randint(0, 3, (5,)), batch_dim=batch_dim)
    assert gf.coverage(model).complete and len(rec.names) == 10


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 6), nn.LayerNorm(6), nn.Embedding(9, 6)])
def test_folded_rows_are_unfolded(layer):
    layer = randomised(layer)
    embeds = isinstance(layer, nn.Embedding)
    x = torch.randint(0, 9, (12,)) if embeds else torch.randn(12, 6)
    with gf.record(layer, **EVERYTHING, batch_size=4, loss_reduction="sum") as rec:
        layer(x).square().sum().backward()

    def losses(model):
        return model(x if embeds else x.double()).square().reshape(4, -1).sum(1)

    assert_matches(rec, one_at_a_time(layer, losses))
