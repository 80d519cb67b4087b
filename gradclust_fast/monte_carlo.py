"""Variance of an estimator from repeated mini-batches, without the usual biases and with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ._passes import Forward, LossFn, batches, losses_of, num_examples
from .estimators import Estimator
from .selection import Parameters, select

GROUPS = 20
"""Groups of draws that the jackknife leaves out one at a time; memory is so many copies of the parameters."""


@dataclass(frozen=True)
class MonteCarlo:
    """Monte Carlo figures and their standard errors.

    Deviations are taken from the exact full gradient, not from the mean of a few other batches, so the variance has no
    1/T bias; the ratios' bias is removed by the jackknife.
    """

    draws: int
    variance: float
    variance_error: float
    normalized_variance: float
    normalized_variance_error: float
    aggregate_normalized_variance: float
    aggregate_normalized_variance_error: float


def monte_carlo_of(
    estimator: Estimator,
    model: nn.Module,
    data: Dataset | DataLoader,
    mean: dict[str, Tensor],
    *,
    draws: int,
    seed: Sequence[int],
    snapshot: nn.Module | None,
    snapshot_mean: dict[str, Tensor] | None,
    loss_fn: LossFn | None,
    forward: Forward | None,
    parameters: Parameters,
    device: torch.device,
    loading: dict[str, Any],
) -> MonteCarlo:
    """Draws mini-batches of the estimator and measures their mean gradients around ``mean``, the exact one."""
    N = num_examples(data)
    rng = np.random.Generator(np.random.PCG64(list(seed)))
    G = min(GROUPS, draws)
    squares = [{name: torch.zeros_like(value) for name, value in mean.items()} for _ in range(G)]  # Σ (ĝ_j − ḡ_j)²
    sizes = [len(range(g, draws, G)) for g in range(G)]
    errors = [0.0] * draws  # ‖ĝ − ḡ‖²
    drawn = [estimator.draw(rng, N) for _ in range(draws)]
    step = loading["batch_size"]
    pieces = [(t, start) for t, (index, _) in enumerate(drawn) for start in range(0, len(index), step)]
    groups = [drawn[t][0][start : start + step].tolist() for t, start in pieces]
    loader = batches(data, device=device, groups=groups, **loading)
    chosen = select(model, parameters)
    then = {} if snapshot is None else {e.name: e.parameter for e in select(snapshot, parameters)}
    devices = [device] if device.type == "cuda" else []
    estimate: dict[str, Tensor] = {}
    for (t, start), (seen, batch) in zip(pieces, loader):
        if start == 0:
            estimate = {name: torch.zeros_like(value) for name, value in mean.items()}
        index, weight = drawn[t]
        w = torch.from_numpy(weight[start : start + step] / len(index))
        if snapshot is not None:
            with torch.random.fork_rng(devices=devices):  # the same dropout masks for both
                losses = losses_of(snapshot, batch, seen, loss_fn, forward)
            _add_gradient(estimate, then, -w.to(losses) * losses)
        losses = losses_of(model, batch, seen, loss_fn, forward)
        _add_gradient(estimate, {e.name: e.parameter for e in chosen}, w.to(losses) * losses)
        if start + step < len(index):
            continue
        for name, value in estimate.items():
            if snapshot_mean is not None:
                value += snapshot_mean[name]
            square = (value - mean[name]).square_()
            squares[t % G][name] += square
            errors[t] += float(square.sum())
    gradient_sqnorm = sum(float(value.square().sum()) for value in mean.values())
    sums = np.array([sum(errors[g::G]) for g in range(G)])
    total = {name: torch.stack([s[name] for s in squares]).sum(0) for name in mean}

    def paper(left: int | None) -> float:
        n = draws - (0 if left is None else sizes[left])
        value, kept = 0.0, 0
        for name, everything in total.items():
            V = (everything if left is None else everything - squares[left][name]) / n
            second = V + mean[name].square()
            there = everything + mean[name].square() > 0  # the same coordinates for every group left out
            value += float((V[there] / second[there]).nan_to_num(0).sum())
            kept += int(there.sum())
        return value / kept if kept else math.nan

    def aggregate(left: int | None) -> float:
        n = draws - (0 if left is None else sizes[left])
        V = float(sums.sum() - (0 if left is None else sums[left])) / n
        return V / (V + gradient_sqnorm) if V + gradient_sqnorm else math.nan

    variance = float(np.mean(errors))
    return MonteCarlo(
        draws,
        variance,
        float(np.std(errors, ddof=1)) / math.sqrt(draws),
        *_jackknife(paper, sizes),
        *_jackknife(aggregate, sizes),
    )


def _jackknife(statistic: Callable[[int | None], float], sizes: list[int]) -> tuple[float, float]:
    """(estimate with its 1/n bias removed, standard error), leaving out one group of draws at a time.

    Busing, Meijer & van der Leeden 1999 for groups of unequal size.
    """
    n, G = sum(sizes), len(sizes)
    whole = statistic(None)
    without = [statistic(g) for g in range(G)]
    ratio = [n / size for size in sizes]
    estimate = G * whole - sum((1 - 1 / h) * value for h, value in zip(ratio, without))
    pseudo = [h * whole - (h - 1) * value for h, value in zip(ratio, without)]
    return estimate, math.sqrt(sum((p - estimate) ** 2 / (h - 1) for h, p in zip(ratio, pseudo)) / G)


def _add_gradient(total: dict[str, Tensor], parameters: dict[str, nn.Parameter], losses: Tensor) -> None:
    grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    for name, grad in zip(parameters, grads):
        if grad is not None:
            total[name] += grad
