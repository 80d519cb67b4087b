"""Modules without a route of their own, which are recomputed alone, and the steps that record them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from recorded import Mean
from torch import nn

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


def step(model, x, y):
    F.cross_entropy(model(x), y).backward()
