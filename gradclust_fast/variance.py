"""Exact statistics of per-example gradients, and estimators of the full gradient compared on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ._passes import Forward, LossFn, model_device, num_examples, untouched
from ._sums import Difference, GroupedSums, PerParameter, Sums, shapes_of, snapshot_of, stream
from .estimators import SVRG, Estimator, Stratified, Uniform, uniform_factor
from .monte_carlo import monte_carlo_of
from .report import EstimatorReport, EstimatorRow, ParameterVariance
from .selection import Parameters
from .strata import Strata


@dataclass(frozen=True)
class ParameterStats:
    """One parameter's share of :class:`GradientStats`. Sums over its coordinates; they add up over parameters."""

    num_coordinates: int
    gradient_sqnorm: float
    variance: float

    @property
    def noise_scale(self) -> float:
        return _ratio(self.variance, self.gradient_sqnorm)


@dataclass(frozen=True)
class GradientStats:
    """What :func:`gradient_stats` measured; totals in float64.

    Attributes:
        num_examples, num_coordinates: N and the number of recorded parameters' coordinates.
        gradient_sqnorm: ‖ḡ‖².
        variance: σ² = N⁻¹ Σ‖g_i − ḡ‖², the trace of the covariance of one example's gradient.
        sum_sq_norms: Σ_i ‖g_i‖².
        zero_coordinates: coordinates whose gradient is 0 for every example.
        by_parameter: {name: ParameterStats}.
        mean, coordinate_variance: {name: tensor of the parameter's shape, float64}.
        notes: what the model's mode means for the numbers (dropout, batch norm).
    """

    num_examples: int
    num_coordinates: int
    gradient_sqnorm: float
    variance: float
    sum_sq_norms: float
    zero_coordinates: int
    by_parameter: dict[str, ParameterStats]
    mean: PerParameter = field(repr=False)
    coordinate_variance: PerParameter = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def variance_per_coordinate(self) -> float:
        """σ² over the number of coordinates, as the paper plots it."""
        return self.variance / self.num_coordinates

    @property
    def noise_scale(self) -> float:
        """tr Σ / ‖ḡ‖² (McCandlish et al. 2018, arXiv:1812.06162), in examples."""
        return _ratio(self.variance, self.gradient_sqnorm)

    def normalized_variance(self, batch_size: int = 1, *, replacement: bool = True, aggregate: bool = False) -> float:
        """V[ĝ]/E[ĝ²] of a uniform mini-batch: per coordinate and averaged (the paper's), or of the totals.

        Coordinates with E[ĝ_j²] = 0 are left out of the average.

        Args:
            batch_size: B.
            replacement: whether examples are drawn with replacement.
            aggregate: V[ĝ]/E‖ĝ‖² instead.
        """
        estimator = Uniform(batch_size, replacement)
        estimator.prepare(self.num_examples)
        factor = uniform_factor(batch_size, self.num_examples, replacement)
        if aggregate:
            return _ratio(factor * self.variance, factor * self.variance + self.gradient_sqnorm)
        scaled = {name: factor * variance for name, variance in self.coordinate_variance.items()}
        return normalized(scaled, self.mean)[0]

    def __str__(self) -> str:
        total = ParameterStats(self.num_coordinates, self.gradient_sqnorm, self.variance)
        rows = [["parameter", "coordinates", "‖ḡ‖²", "variance", "noise scale"]]
        for name, own in [*self.by_parameter.items(), ("total", total)]:
            numbers = [f"{x:.4g}" for x in (own.gradient_sqnorm, own.variance, own.noise_scale)]
            rows.append([name, f"{own.num_coordinates:,}", *numbers])
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        return "\n".join([f"{self.num_examples} examples", *lines, *self.notes])


def gradient_stats(
    model: nn.Module,
    dataset: Dataset | DataLoader,
    loss_fn: LossFn | None = None,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    forward: Forward | None = None,
    parameters: Parameters = None,
    mode: str = "eval",
) -> GradientStats:
    """Exact variance, normalized variance and noise scale of a model's per-example gradients, in one pass.

    Leaves no trace: ``.grad``, buffers, mode, random states and hooks are as found, also after an exception. Memory is
    four float64 copies of the parameters.

    Args:
        model: any module whose recorded parameters have a route (``gf.coverage``).
        dataset: map-style, or a loader over ``gf.with_indices(dataset)``.
        loss_fn: ``loss_fn(output, target)`` → per-example losses [B] (``reduction="none"``).
        batch_size, num_workers, collate_fn: how a data set is loaded.
        device: where batches go; None is the model's.
        forward: ``forward(model, batch)`` → per-example losses [B], instead of loss_fn, for any other batch type.
        parameters: name globs, or a predicate of name and parameter; None is every trainable parameter.
        mode: ``"eval"`` or ``"train"``.

    Raises:
        ValueError: losses that are not one per example; losses or gradients that are not finite, with their indices.
        TypeError: a data set without length or indices; neither loss_fn nor forward.
        NotImplementedError: parameters without a route, named.

    Source:
        The guide's "statistics"; Faghri et al. 2020, arXiv:2007.04532, section 2.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randint(0, 2, (64,)))
        >>> loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
        >>> stats = gf.gradient_stats(torch.nn.Linear(3, 2), data, loss_fn)
        >>> bool(stats.variance > 0)
        True
    """
    N = num_examples(dataset)
    shapes = shapes_of(model, parameters)
    sums = Sums(shapes)
    with untouched(model, mode):
        stream(
            model,
            dataset,
            sums,
            loss_fn=loss_fn,
            forward=forward,
            parameters=parameters,
            device=model_device(model) if device is None else torch.device(device),
            loading={"batch_size": batch_size, "num_workers": num_workers, "collate_fn": collate_fn},
        )
    return _stats(sums, N, _mode_notes(model, mode))


def compare_estimators(
    model: nn.Module,
    dataset: Dataset | DataLoader,
    loss_fn: LossFn | None,
    estimators: Sequence[Estimator],
    *,
    monte_carlo: int = 0,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    forward: Forward | None = None,
    parameters: Parameters = None,
    mode: str = "eval",
) -> EstimatorReport:
    """Exact variance of several estimators of the same full gradient, at the model's current parameters.

    One pass for all of ``Uniform`` and ``SVRG`` and the first strata, and one more for each further strata. Memory is
    a few float64 copies of the parameters for every estimator, whatever the number of strata.

    Args:
        model, dataset, loss_fn, batch_size, num_workers, device, collate_fn, forward, parameters, mode: as for
            :func:`gradient_stats`.
        estimators: ``gf.Uniform``, ``gf.Stratified`` (also with ``snapshot=``) and ``gf.SVRG`` objects; ratios are to
            the first one's variance.
        monte_carlo: also draw this many mini-batches (at least 2) of each and measure around the exact mean, with
            standard errors; 0 for none.
        seed: of those draws.

    Returns:
        An :class:`EstimatorReport`: prints as a table, ``to_csv(path)``, indexes and iterates over rows; every row has
        ``by_parameter``, which ``report.breakdown()`` prints and ``to_csv(path, by_parameter=True)`` writes.

    Raises:
        ValueError, TypeError: as :func:`gradient_stats`; strata of another data set; a snapshot that does not fit.

    Source:
        The guide's "statistics"; Faghri et al. 2020, arXiv:2007.04532, sections 2 and 4.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 3), torch.randint(0, 2, (64,)))
        >>> loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
        >>> report = gf.compare_estimators(torch.nn.Linear(3, 2), data, loss_fn, [gf.Uniform(8), gf.Uniform(16)])
        >>> report[1].ratio
        0.5
    """
    N = num_examples(dataset)
    estimators = _checked(estimators, N, monte_carlo)
    shapes = shapes_of(model, parameters)
    loading = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": collate_fn}
    common: dict[str, Any] = {
        "loss_fn": loss_fn,
        "forward": forward,
        "parameters": parameters,
        "device": model_device(model) if device is None else torch.device(device),
        "loading": loading,
    }
    snapshots = {id(e.snapshot): snapshot_of(model, e) for e in estimators if e.snapshot is not None}
    waiting = {id(e.snapshot) for e in estimators if isinstance(e, SVRG)}
    changes: dict[int, Sums] = {}  # by snapshot: of the differences to it
    with ExitStack() as stack:
        for module in [model, *snapshots.values()]:
            stack.enter_context(untouched(module, mode))
        sums: Sums | None = None
        variances: dict[int, tuple[PerParameter, PerParameter | None]] = {}
        for strata in _distinct_strata(estimators):
            own = [e for e in estimators if isinstance(e, Stratified) and e.strata is strata]
            by_snapshot: dict[int | None, list[Stratified]] = {None: []}
            for e in own:
                by_snapshot.setdefault(None if e.snapshot is None else id(e.snapshot), []).append(e)
            grouped = {key: GroupedSums(shapes, strata, [e.plan for e in es]) for key, es in by_snapshot.items()}
            seen: dict[int, Sums] = {key: each for key, each in grouped.items() if key is not None}
            seen |= {key: Sums(shapes) for key in waiting - set(seen)}
            differences = [Difference(snapshots[key], each) for key, each in seen.items()]
            groups = own[0].plan.order.tolist()
            groups = [groups[start : start + batch_size] for start in range(0, N, batch_size)]
            stream(model, dataset, grouped[None], differences, groups=groups, **common)
            for key, es in by_snapshot.items():
                variances.update((id(e), grouped[key].variance_of(i)) for i, e in enumerate(es))
            sums, waiting, changes = sums or grouped[None], set(), {**changes, **seen}
        if sums is None:
            sums, changes = Sums(shapes), {key: Sums(shapes) for key in waiting}
            stream(model, dataset, sums, [Difference(snapshots[key], each) for key, each in changes.items()], **common)
        of_change = {key: each.centred(N) for key, each in changes.items()}
        stats = _stats(sums, N, _mode_notes(model, mode))
        rows = []
        for position, estimator in enumerate(estimators):
            if isinstance(estimator, Stratified):
                variance, between = variances[id(estimator)]
            elif isinstance(estimator, Uniform):
                of_one, between = stats.coordinate_variance, None
                if isinstance(estimator, SVRG):
                    of_one = of_change[id(estimator.snapshot)][1]
                variance = {name: estimator.factor(N) * value for name, value in of_one.items()}
            key = id(estimator.snapshot)
            snapshot = snapshots.get(key)
            offset = (
                None if snapshot is None else {n: stats.mean[n] - change for n, change in of_change[key][0].items()}
            )
            row = _row(estimator, variance, between, stats)
            if monte_carlo:
                row.monte_carlo = monte_carlo_of(
                    estimator,
                    model,
                    dataset,
                    stats.mean,
                    draws=monte_carlo,
                    seed=[seed, position],
                    snapshot=snapshot,
                    snapshot_mean=offset,
                    **common,
                )
            rows.append(row)
    first = rows[0].variance
    for row in rows:
        row.ratio = _ratio(row.variance, first)
        for name, part in row.by_parameter.items():
            part.ratio = _ratio(part.variance, rows[0].by_parameter[name].variance)
    return EstimatorReport(rows, stats)


def normalized(variance: PerParameter, mean: PerParameter) -> tuple[float, int]:
    """(average of V[ĝ_j]/E[ĝ_j²] over coordinates, number of coordinates left out because E[ĝ_j²] = 0)."""
    total, kept, left_out = 0.0, 0, 0
    for name, V in variance.items():
        second = V + mean[name].square()
        there = second > 0
        total += float((V[there] / second[there]).sum())
        kept += int(there.sum())
        left_out += int((~there).sum())
    return _ratio(total, kept), left_out


def _stats(sums: Sums, N: int, notes: tuple[str, ...]) -> GradientStats:
    mean, variance = sums.centred(N)
    by_parameter = {
        name: ParameterStats(mean[name].numel(), float(mean[name].square().sum()), float(variance[name].sum()))
        for name in mean
    }
    return GradientStats(
        num_examples=N,
        num_coordinates=sum(p.num_coordinates for p in by_parameter.values()),
        gradient_sqnorm=math.fsum(p.gradient_sqnorm for p in by_parameter.values()),
        variance=math.fsum(p.variance for p in by_parameter.values()),
        sum_sq_norms=math.fsum(float(second.sum()) for second in sums.second.values()),
        zero_coordinates=sum(int((second == 0).sum()) for second in sums.second.values()),
        by_parameter=by_parameter,
        mean=mean,
        coordinate_variance=variance,
        notes=notes,
    )


def _row(
    estimator: Estimator, within: PerParameter, between: PerParameter | None, stats: GradientStats
) -> EstimatorRow:
    variance = within if between is None else {name: within[name] + between[name] for name in within}
    total = math.fsum(float(v.sum()) for v in variance.values())
    paper, left_out = normalized(variance, stats.mean)
    by_parameter = {
        name: ParameterVariance(v.numel(), float(v.sum()), *normalized({name: v}, stats.mean))
        for name, v in variance.items()
    }
    return EstimatorRow(
        name=estimator.name,
        batch_size=estimator.batch_size,
        gradients_per_step=estimator.gradients_per_step,
        variance=total,
        variance_per_coordinate=total / stats.num_coordinates,
        between_strata=0.0 if between is None else math.fsum(float(b.sum()) for b in between.values()),
        normalized_variance=paper,
        left_out=left_out,
        aggregate_normalized_variance=_ratio(total, total + stats.gradient_sqnorm),
        by_parameter=by_parameter,
    )


def _checked(estimators: Sequence[Estimator], N: int, monte_carlo: int) -> list[Estimator]:
    if isinstance(estimators, Estimator):
        raise TypeError(f"estimators must be a list, got one {type(estimators).__name__}; put it in brackets")
    estimators = list(estimators)
    if not estimators:
        raise ValueError("estimators is empty; pass for example [gf.Uniform(128), gf.Stratified(strata)]")
    for estimator in estimators:
        if not isinstance(estimator, (Uniform, Stratified)):
            raise TypeError(
                f"estimators must be gf.Uniform, gf.Stratified or gf.SVRG objects, got {type(estimator).__name__}"
            )
        estimator.prepare(N)
    if monte_carlo < 0 or monte_carlo == 1:
        raise ValueError(f"monte_carlo must be 0 (none) or at least 2 mini-batches, got {monte_carlo}")
    return estimators


def _distinct_strata(estimators: Sequence[Estimator]) -> list[Strata]:
    return list({id(e.strata): e.strata for e in estimators if isinstance(e, Stratified)}.values())


def _mode_notes(model: nn.Module, mode: str) -> tuple[str, ...]:
    """Layers whose gradients depend on the mode."""
    dropout = sum(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    norm = sum(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())
    notes = []
    if dropout:
        notes.append(f"{mode} mode: {dropout} dropout layer(s) {'on, one draw of masks' if mode == 'train' else 'off'}")
    if norm:
        used = "the batch's own" if mode == "train" else "their running"
        notes.append(f"{mode} mode: {norm} batch-norm layer(s) use {used} statistics")
    return tuple(notes)


def _ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return math.copysign(math.inf, a) if a else math.nan
