"""Small models, their data, and per-example gradients for the tests of the exact statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import gradclust_fast as gf


def loss_fn(output, target):
    return F.cross_entropy(output, target, reduction="none")


def squared(output, target):
    return 0.5 * (output.squeeze(1) - target).square()


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def cnn(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)).to(dtype)


def data_for(model, N=23, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shape = (5,) if isinstance(model[0], nn.Linear) else (2, 5, 5)
    x = torch.randn(N, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(0, 3, (N,), generator=generator))


def gradients(model, data, loss_fn=loss_fn):
    """[N, P] per-example gradients, one example at a time."""
    rows = []
    for i in range(len(data)):
        x, y = data[i]
        loss = loss_fn(model(x.unsqueeze(0)), y.unsqueeze(0)).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)


MODELS = [pytest.param(mlp, id="mlp"), pytest.param(cnn, id="cnn")]


def random_strata(N, K, seed=0):
    labels = torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(seed))
    return gf.Strata(labels, K)
