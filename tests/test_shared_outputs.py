"""Outputs that serve all examples and meet the batch by broadcasting: every example still has its own gradient."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import assert_same_grads, grads
from test_layer_routes import check
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradclust_fast as gf

T = 4


class Positions(nn.Module):
    """Token and position embeddings; ``how(x [B, T, D], positions, self)`` brings the two together."""

    def __init__(self, how):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 6), nn.Embedding(T, 6)
        self.norm, self.line, self.bias = nn.LayerNorm(6), nn.Linear(6, 6), nn.Embedding(3, 2)
        self.head, self.how = nn.Linear(6, 3), how

    def forward(self, index):
        x = self.how(torch.tanh(self.tokens(index)), torch.arange(T), self)
        return self.head(torch.tanh(x)).mean(1)


def iadd(x, p):
    x = x.clone()
    x += p
    return x


def relative(x, model):
    """T5's bias: [T, T, heads] → [1, heads, T, T], added to every example's scores."""
    distance = (torch.arange(T)[:, None] - torch.arange(T)).clamp(-1, 1) + 1
    bias = model.bias(distance).permute(2, 0, 1).unsqueeze(0)
    q = x.unflatten(-1, (2, 3)).transpose(1, 2)
    return ((q @ q.mT + bias).softmax(-1) @ q).transpose(1, 2).flatten(2)


WAYS = {
    "batch-of-one": lambda x, p, m: x + m.positions(p[None]),
    "no-batch": lambda x, p, m: x + m.positions(p),
    "first-operand": lambda x, p, m: m.positions(p) - x,
    "in-place": lambda x, p, m: iadd(x, m.positions(p[None])),
    "product": lambda x, p, m: torch.mul(x, m.positions(p[None])),
    "expand": lambda x, p, m: torch.cat([x, m.positions(p[None]).expand(len(x), -1, -1)], 1),
    "expand-as": lambda x, p, m: (x * m.positions(p).expand_as(x)).sin(),
    "one-position": lambda x, p, m: x + m.positions(p[:1][None]),
    "one-vector": lambda x, p, m: x + m.positions(p[2]),
    "sliced": lambda x, p, m: x[:, :2] + m.positions(p[None])[:, 1:3],
    "unsqueezed": lambda x, p, m: x + m.positions(p).unsqueeze(0).contiguous(),
    "twice": lambda x, p, m: torch.tanh(x + m.positions(p[None])) * m.positions(p),
    "twice-the-same": lambda x, p, m: (lambda e: torch.tanh(x + e) * e.view(T, 6))(m.positions(p[None])),
    "also-batched": lambda x, p, m: x + m.positions(p[None]) + m.positions(torch.arange(len(x))[:, None] % T),
    "normalised": lambda x, p, m: x + m.norm(m.line(torch.ones(1, T, 6, dtype=x.dtype)).detach()),
    "linear": lambda x, p, m: x * m.line(torch.ones(1, 1, 6, dtype=x.dtype)),
    "relative-bias": lambda x, p, m: relative(x, m),
}


@pytest.mark.parametrize("B", [1, 2, T])
@pytest.mark.parametrize("way", WAYS)
def test_each_example_has_its_own_gradient_of_a_shared_output(way, B):
    model = Positions(WAYS[way])
    check(model, torch.randint(0, 9, (B, T)), torch.randint(0, 3, (B,)))


def test_the_second_dimension_may_be_the_batch():
    class Second(Positions):
        def forward(self, index):  # [T, B]
            return self.head(torch.tanh(self.tokens(index) + self.positions(torch.arange(T)[:, None]))).mean(0)

    check(Second(None), torch.randint(0, 9, (T, 5)), torch.randint(0, 3, (5,)), batch_dim=1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_shared_outputs_inside_a_checkpoint(reentrant):
    def way(x, p, m):
        return checkpoint(lambda x: torch.tanh(x + m.positions(p[None])), x, use_reentrant=reentrant)

    model = Positions(way)
    index, y = torch.randint(0, 9, (3, T)), torch.randint(0, 3, (3,))
    twin = Positions(lambda x, p, m: torch.tanh(x + m.positions(p[None])))
    twin.load_state_dict(model.state_dict())
    records = []
    for net in (model, twin):
        with gf.record(net) as rec:
            F.cross_entropy(net(index), y).backward()
        records.append(rec.sq_norms)
    torch.testing.assert_close(*records)
    assert_same_grads(model, grads(twin))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_shared_outputs_in_mixed_precision_leave_grad_alone(half):
    for way in (WAYS["batch-of-one"], WAYS["no-batch"], lambda x, p, m: (x.double() * m.positions(p)).float()):
        model = Positions(way)
        model.positions.to(half)
        index, y = torch.randint(0, 9, (7, T)), torch.randint(0, 3, (7,))
        twin = copy.deepcopy(model)

        def step(model, index=index, y=y):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(index).float(), y)
            loss.backward()

        step(twin)
        with gf.record(model) as rec:
            step(model)
        assert_same_grads(model, grads(twin))
        assert rec.sq_norms_by_parameter["positions.weight"].shape == (7,)


def test_one_gradient_of_no_example_is_refused():
    def both(x, p, m):
        e = m.positions(p[None])
        return x + e + e.square().mean()

    model = Positions(both)
    with (
        pytest.raises(NotImplementedError, match=r"positions.weight: .*broadcasting.* used by PowBackward"),
        gf.record(model),
    ):
        F.cross_entropy(model(torch.randint(0, 9, (3, T))), torch.zeros(3, dtype=torch.long)).backward()
    model = Positions(lambda x, p, m: x + torch.tanh(m.positions(p[None])))
    with pytest.raises(ValueError, match=r"positions.weight.*has 1 examples.*expand it to the batch"), gf.record(model):
        F.cross_entropy(model(torch.randint(0, 9, (3, T))), torch.zeros(3, dtype=torch.long)).backward()


def test_a_hidden_use_of_a_shared_output_is_refused():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(1, T, 6)

    def both(x, p, m):
        e = m.positions(p[None])
        return x + e + Hidden.apply(e)

    model = Positions(both)
    with (
        pytest.raises(NotImplementedError, match=r"positions.weight: .* used by HiddenBackward"),
        gf.record(model),
    ):
        F.cross_entropy(model(torch.randint(0, 9, (3, T))), torch.zeros(3, dtype=torch.long)).backward()
