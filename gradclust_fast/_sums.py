"""Sums of per-example gradients and of their squares, coordinate by coordinate, streamed over a data set."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ._passes import Forward, LossFn, batches, check_finite, losses_of
from .allocation import Plan
from .layers import Factors
from .layers.conv import ConvFactors
from .layers.linear import LinearFactors
from .selection import Parameters, named_parameters, select
from .strata import Strata
from .watching import Watch

PerParameter = dict[str, Tensor]

MULTIPLIED_OUT = 2**22
"""Numbers of per-example gradients, or of unfolded images, that exist at a time where two backwards are subtracted."""


def patch_product(factors: Any) -> Tensor:
    """[B, O, I] gradients of an ungrouped convolution, from its unfolded image."""
    columns = factors.columns()
    return columns.grad.squeeze(3) @ columns.act.squeeze(3).mT


def difference_moments(factors: Factors, other: Factors) -> tuple[Tensor, Tensor]:
    """Moments of ``G_b − G'_b``, both in float64."""
    if isinstance(factors, LinearFactors) and isinstance(other, LinearFactors):
        a, b, c, d = factors.act, factors.grad, other.act, other.grad
        if a.shape[1:-1].numel() == 1 == c.shape[1:-1].numel():
            # (d⊗a − d'⊗a')² = d²⊗a² − 2 dd'⊗aa' + d'²⊗a'²: three products, no G_b. Equal factors give exactly 0.
            first, second = factors.moments()
            first_other, second_other = other.moments()
            cross = LinearFactors(a * c, b * d, factors.shape).moments()[0]
            return first - first_other, (second - cross) + (second_other - cross)
    if isinstance(factors, ConvFactors) and isinstance(other, ConvFactors) and factors.geometry[4] == 1:
        # Both gradients multiplied out, a few examples at a time: as one sum over both backwards' positions they would
        # cost the same products, and all patches of all examples in memory at once.
        first, second = (torch.zeros(factors.shape, dtype=factors.dtype, device=factors.device) for _ in range(2))
        patches = factors.shape[1:].numel() * factors.grad.shape[2:].numel()
        step = max(1, MULTIPLIED_OUT // max(1, factors.shape.numel(), patches))
        for start in range(0, factors.B, step):
            own, their = (patch_product(each.part(start, min(start + step, each.B))) for each in (factors, other))
            change = own.sub_(their)  # [b, O, I]
            first += change.sum(0).view(factors.shape)
            second += change.square_().sum(0).view(factors.shape)
        return first, second
    return factors.subtract(other).moments()


class Sums:
    """Σ_i g_i and Σ_i g_i∘g_i of every parameter, in float64."""

    def __init__(self, shapes: dict[str, tuple[torch.Size, torch.device]]) -> None:
        self.first = zeros(shapes)
        self.second = zeros(shapes)

    def add(self, name: str, first: Tensor, second: Tensor) -> None:
        self.first[name] += first
        self.second[name] += second

    def consume(self, name: str, factors: Factors, index: Tensor, minus: Factors | None = None) -> None:
        """Adds the gradients of examples ``index``, or their differences to those of ``minus``."""
        self.add(name, *checked_moments(name, factors, index, minus))

    def close(self) -> None:
        """All examples have been seen."""

    def centred(self, N: int) -> tuple[PerParameter, PerParameter]:
        """(mean, variance) of one example's gradient, coordinate by coordinate."""
        mean = {name: first / N for name, first in self.first.items()}
        return mean, {name: second / N - mean[name].square() for name, second in self.second.items()}


def zeros(shapes: dict[str, tuple[torch.Size, torch.device]]) -> PerParameter:
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, (shape, device) in shapes.items()}


def checked_moments(name: str, factors: Factors, index: Tensor, minus: Factors | None = None) -> tuple[Tensor, Tensor]:
    first, second = factors.moments() if minus is None else difference_moments(factors, minus)
    if not torch.isfinite(second.sum()):
        if minus is not None:
            check_finite(f"the snapshot's gradient of {name}", minus.sqnorm(), index)
        check_finite(f"the gradient of {name}", factors.sqnorm(), index)
    return first, second


class GroupedSums(Sums):
    """The same for examples that come stratum by stratum, with the variance of every plan's estimator on top.

    One stratum's sums are open at a time, so memory is a few times the parameters, whatever the number of strata.
    """

    def __init__(
        self, shapes: dict[str, tuple[torch.Size, torch.device]], strata: Strata, plans: Sequence[Plan]
    ) -> None:
        super().__init__(shapes)
        self.plans = plans
        self.labels, self.counts = strata.labels, strata.counts
        self.within = [zeros(shapes) for _ in plans]
        self.between = [_Between(plan, shapes) if plan.take is None else None for plan in plans]
        self._open: dict[str, tuple[int, Tensor, Tensor]] = {}

    def consume(self, name: str, factors: Factors, index: Tensor, minus: Factors | None = None) -> None:
        labels = self.labels[index]
        edges = [0, *((labels[1:] != labels[:-1]).nonzero().flatten() + 1).tolist(), len(labels)]
        for start, end in pairwise(edges):
            stratum = int(labels[start])
            others = None if minus is None else minus.part(start, end)
            first, second = checked_moments(name, factors.part(start, end), index[start:end], others)
            running = self._open.get(name)
            if running is not None and running[0] == stratum:
                first, second = running[1].add_(first), running[2].add_(second)
            elif running is not None:
                self._fold(name, *running)
            self._open[name] = (stratum, first, second)

    def close(self) -> None:
        for name, running in self._open.items():
            self._fold(name, *running)
        self._open.clear()

    def _fold(self, name: str, stratum: int, first: Tensor, second: Tensor) -> None:
        self.add(name, first, second)
        N_k = int(self.counts[stratum])
        for plan, within, between in zip(self.plans, self.within, self.between):
            factor = float(plan.within_factor[stratum]) / N_k  # of S_k = Σ g∘g − (Σ g)²/N_k
            within[name].add_(second, alpha=factor).addcmul_(first, first, value=-factor / N_k)
            if between is not None:
                between.add(name, stratum, first, N_k)

    def variance_of(self, plan_index: int) -> tuple[PerParameter, PerParameter | None]:
        """(within, between) of one plan's estimator, coordinate by coordinate."""
        between = self.between[plan_index]
        return self.within[plan_index], None if between is None else between.total()


class _Between:
    """Variance from drawing strata: ``Σ_k own_k y_k² + Σ_r weight_r (Σ_k basis_kr y_k)²``."""

    def __init__(self, plan: Plan, shapes: dict[str, tuple[torch.Size, torch.device]]) -> None:
        own, self.weight, basis = plan.design.covariance()
        scale = plan.weight[plan.chance] / plan.batch_size  # y_k = scale_k c_k
        self.own = dict(zip(plan.chance.tolist(), (own * scale**2).tolist()))
        self.basis = dict(zip(plan.chance.tolist(), (basis * scale[:, None]).tolist()))
        self.square = zeros(shapes)
        self.linear = [zeros(shapes) for _ in self.weight]

    def add(self, name: str, stratum: int, first: Tensor, N_k: int) -> None:
        if stratum in self.own:
            self.square[name].addcmul_(first, first, value=self.own[stratum] / N_k**2)
            for linear, factor in zip(self.linear, self.basis[stratum]):
                linear[name].add_(first, alpha=factor / N_k)

    def total(self) -> PerParameter:
        out = {name: square.clone() for name, square in self.square.items()}
        for linear, weight in zip(self.linear, self.weight):
            for name, sums in linear.items():
                out[name].addcmul_(sums, sums, value=float(weight))
        return out


class Difference:
    """Sums of ``g_i(θ) − g_i(θ̃)`` for a snapshot θ̃ of the model."""

    def __init__(self, snapshot: nn.Module, sums: Sums) -> None:
        self.snapshot, self.sums = snapshot, sums
        self.kept: dict[str, Factors] = {}
        self.index = torch.zeros(0, dtype=torch.int64)

    def consume(self, name: str, factors: Factors) -> None:
        factors = factors.double()
        own = self.kept.pop(name, None)
        if own is None:  # the current model's loss did not reach this parameter
            own = factors.subtract(factors)
        self.sums.consume(name, own, self.index, factors)

    def rest(self) -> None:
        """Parameters that the snapshot's loss did not reach."""
        for name, own in self.kept.items():
            self.sums.consume(name, own, self.index)
        self.kept = {}


def stream(
    model: nn.Module,
    data: Dataset | DataLoader,
    sums: Sums,
    differences: Sequence[Difference] = (),
    *,
    loss_fn: LossFn | None,
    forward: Forward | None,
    parameters: Parameters,
    device: torch.device,
    loading: dict[str, Any],
    groups: Sequence[list[int]] | None = None,
) -> None:
    """One pass over the data: every example's gradient into ``sums``, and its change since each snapshot."""
    index = torch.zeros(0, dtype=torch.int64)
    kept: dict[str, Factors] = {}

    def consume(name: str, factors: Factors) -> None:
        factors = factors.double()  # Σ g∘g − (Σ g)²/N cancels, and float32 products would decide the difference
        sums.consume(name, factors, index)
        if differences:
            kept[name] = factors

    devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        watch = stack.enter_context(Watch(model, consume, parameters=parameters))
        others = [stack.enter_context(Watch(d.snapshot, d.consume, parameters=parameters)) for d in differences]
        for index, batch in batches(data, device=device, groups=groups, **loading):
            kept.clear()
            for position, active in enumerate([watch, *others]):
                if position:
                    difference = differences[position - 1]
                    difference.kept, difference.index = dict(kept), index
                # in train mode the snapshot must see the same dropout masks: the last evaluation moves the state on
                last = position == len(others)
                with torch.random.fork_rng(devices=devices, enabled=not last):
                    active.backward(losses_of(active.model, batch, index, loss_fn, forward))
                if position:
                    differences[position - 1].rest()
    for each in (sums, *(d.sums for d in differences)):
        each.close()


def shapes_of(model: nn.Module, parameters: Parameters) -> dict[str, tuple[torch.Size, torch.device]]:
    """Shape and device of every recorded parameter, by name."""
    return {entry.name: (entry.parameter.shape, entry.parameter.device) for entry in select(model, parameters)}


def snapshot_of(model: nn.Module, estimator: Any) -> nn.Module:
    """An estimator's snapshot as a module; raises where it is none of this model."""
    snapshot = estimator.snapshot
    if isinstance(snapshot, Mapping):
        mine = {name: p.data_ptr() for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        alias = [n for n, t in snapshot.items() if isinstance(t, Tensor) and n in mine and t.data_ptr() == mine[n]]
        if alias:
            raise ValueError(
                f"{estimator.name}: snapshot shares the memory of {len(alias)} parameters with the model ({alias[0]}), "
                f"so nothing would differ; take it with copy.deepcopy(model.state_dict())"
            )
        copied = copy.deepcopy(model)
        try:
            copied.load_state_dict(snapshot)
        except RuntimeError as error:
            raise ValueError(f"{estimator.name}: snapshot is not a state_dict of this model: {error}") from error
        return copied
    shared = {id(p) for p in model.parameters()} & {id(p) for p in snapshot.parameters()}
    if shared:
        raise ValueError(
            f"{estimator.name}: snapshot shares {len(shared)} parameters with the model, so nothing would differ; take "
            f"it with copy.deepcopy(model)"
        )
    shapes = [{e.name: e.parameter.shape for e in named_parameters(module)} for module in (model, snapshot)]
    if shapes[0] != shapes[1]:
        name = next(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"{estimator.name}: snapshot is not a copy of this model: {name} is {_size(shapes[1], name)} there and "
            f"{_size(shapes[0], name)} here; take it with copy.deepcopy(model)"
        )
    return snapshot


def _size(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
