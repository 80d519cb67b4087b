"""A small model, its data, and what a clustering of it should reach."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import gradclust_fast as gf

EXACT_SKETCH = gf.Sketch(sides=(1000, 1000), reduce=False)  # keeps every coordinate


METHODS = ["exact", "factored"]


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def small_model(dtype=torch.float64):
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 3, 3, padding=1, stride=2)
    return nn.Sequential(conv, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(27, 4)).to(dtype)


def small_data(N=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(
        torch.randn(N, 1, 5, 5, generator=generator, dtype=dtype), torch.randint(4, (N,), generator=generator)
    )


def gradients(model, data):
    """[N, parameters] float64, one example at a time."""
    model = model.eval()
    rows = []
    for x, y in data:
        loss = losses(model(x[None]), y[None]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return torch.stack(rows)


def variance(rows, labels, K):
    """Of one draw from every cluster, weighted by N_k/N."""
    total = 0.0
    for k in range(K):
        members = rows[labels == k]
        if len(members):
            total += len(members) * float((members - members.mean(0)).square().sum())
    return total / len(rows) ** 2


def clustering(method="exact", K=6, model=None, **options):
    return gf.GradientClustering(small_model() if model is None else model, K, method, **options)
