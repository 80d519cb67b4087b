"""Models and the oracle for recording: per-example gradients by one autograd call per example, in float64."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from gradclust_fast.layers import DenseFactors


def one_at_a_time(model: nn.Module, losses, names=None) -> dict[str, torch.Tensor]:
    """{name: [B, *shape]} gradients of ``losses(model)[b]`` in float64, one autograd call per example.

    ``losses`` runs the whole batch through a float64 copy and returns [B] shares of the loss; it must seed its own
    randomness. Parameters that an example does not reach get zeros.
    """
    model = copy.deepcopy(model).double()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)}
    shares = losses(model)
    rows = [torch.autograd.grad(s, list(parameters.values()), retain_graph=True, allow_unused=True) for s in shares]
    return {
        name: torch.stack([row[i] if row[i] is not None else torch.zeros_like(p) for row in rows])
        for i, (name, p) in enumerate(parameters.items())
    }


def assert_matches(rec, oracle: dict[str, torch.Tensor], scale: float = 1.0, rtol: float = 2e-5) -> None:
    """Every quantity the record collected against per-example gradients times ``scale``."""
    assert list(rec.names) == list(oracle)
    flat = {name: scale * g.flatten(1) for name, g in oracle.items()}
    everything = torch.cat(list(flat.values()), 1)
    asked = rec._asked

    def close(got, want, what):
        size = want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol * size, msg=lambda m: f"{what}: {m}")

    if asked["sq_norms"]:
        for name, norms in rec.sq_norms_by_parameter.items():
            close(norms, flat[name].square().sum(1), name)
        close(rec.sq_norms, everything.square().sum(1), "sq_norms")
    if asked["gram"]:
        close(rec.gram, everything @ everything.T, "gram")
    if asked["sketch"]:
        made = [rec._sketch.apply(name, DenseFactors(scale * g)) for name, g in oracle.items()]
        close(rec.sketches, sum(made) if rec._sketch.reduce else torch.cat(made, 1), "sketches")
    if asked["moments"]:
        for name, (first, second) in rec.moments.items():
            assert first.shape == oracle[name].shape[1:]
            close(first.flatten(), flat[name].sum(0), f"{name} sum")
            close(second.flatten(), flat[name].square().sum(0), f"{name} sum of squares")


def grads(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_grads(model: nn.Module, expected: dict[str, torch.Tensor | None]) -> None:
    for name, p in model.named_parameters():
        same = p.grad is None if expected[name] is None else torch.equal(p.grad, expected[name])
        assert same, f"{name}.grad changed"


class Tied(nn.Module):
    """One weight as the first layer, applied twice in a row, and transposed-free through F.linear at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)
        self.twin = nn.Linear(6, 3)
        self.twin.weight = self.head.weight

    def forward(self, x):
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        out = self.head(x) + self.twin(x * x)
        return out + nn.functional.linear(torch.sin(x), self.head.weight)


class ReusedConv(nn.Module):
    """One convolution (grouped or not) on two resolutions of the same image."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=groups)

    def forward(self, x):
        once = torch.tanh(self.conv(x))
        return (self.conv(once).mean((2, 3)) + once.mean((2, 3)))[:, :3]


class Recurrent(nn.Module):
    """A hand-written recurrent loop: one weight used at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rec, self.out = nn.Linear(4, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inp(x[:, t]) + self.rec(h))
        return self.out(h)


class Attention(nn.Module):
    """One attention block over a sequence, keyword arguments, output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        q, k, v = self.qkv(input=x).chunk(3, -1)
        x = x + self.proj((q @ k.mT / 8**0.5).softmax(-1) @ v)
        return {"logits": self.head(x).mean(1), "hidden": x}


def conv_net(**options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, **options),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (3, 1), stride=(1, 2), padding=(1, 0), groups=2, bias=False),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


MODELS = {  # name: (build, shape of one example)
    "mlp": (mlp, (6,)),
    "linear-one-position-dim": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(True), nn.Linear(5, 3), Mean(1)),
        (4, 6),
    ),
    "linear-three-position-dims": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(True), nn.Linear(5, 3), Mean(1, 2, 3)),
        (2, 3, 2, 6),
    ),
    "linear-strided-input": (lambda: nn.Sequential(Transpose(), nn.Linear(4, 3), nn.ReLU(True), Mean(1)), (4, 6)),
    "conv-strided": (lambda: conv_net(stride=2), (2, 9, 8)),
    "conv-padded-dilated": (lambda: conv_net(padding=2, dilation=(2, 1)), (2, 7, 8)),
    "conv-same-uneven": (lambda: nn.Sequential(nn.Conv2d(2, 3, (2, 4), padding="same"), Mean(2, 3)), (2, 5, 6)),
    "conv-circular": (lambda: conv_net(padding=1, padding_mode="circular"), (2, 7, 8)),
    "conv-reflect-same": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), nn.ReLU(True), Mean(2, 3)),
        (2, 5, 6),
    ),
    "conv-depthwise": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 3, 1), Mean(2, 3)), (3, 6, 5)),
    "conv-1d": (lambda: nn.Sequential(nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.Conv1d(4, 3, 1), Mean(2)), (2, 7)),
    "conv-3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1)), Mean(2, 3, 4)), (2, 3, 4, 5)),
    "tied-reused-functional": (Tied, (6,)),
    "recurrent": (Recurrent, (7, 4)),
    "conv-reused": (lambda: ReusedConv(1), (4, 8, 9)),
    "conv-reused-grouped": (lambda: ReusedConv(2), (4, 8, 9)),
    "attention-dict-output": (Attention, (5, 8)),
}


class Mean(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.mean(self.dims)


class Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def logits(out):
    return out["logits"] if isinstance(out, dict) else out


EVERYTHING = {"sq_norms": True, "gram": True, "moments": True}


def batch(shape=(6,), B=5, classes=3):
    return torch.randn(B, *shape), torch.randint(0, classes, (B,))


def cross_entropy(x, y, **options):
    """losses(model) for the oracle."""
    return lambda model: F.cross_entropy(logits(model(x.double())), y, reduction="none", **options)


def plain_step(model, step):
    """What an unrecorded step leaves in .grad."""
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    step(twin)
    torch.set_rng_state(state)
    return grads(twin)
