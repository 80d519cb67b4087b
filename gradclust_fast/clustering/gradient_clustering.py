"""``GradientClustering``: from a model and a data set to strata."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .._arguments import integer
from .._passes import Forward, LossFn, batches, check_finite, losses_of, model_device, num_examples, untouched
from ..layers import Factors
from ..sampling import Strata
from ..selection import Parameters
from ..sketching import Sketch
from ..watching import Watch
from ._progress import Advance, progress_bar
from .exact import balanced_labels, check_fraction, cluster_points
from .factored import Distances, Rank1Centers, refill_smallest

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"max_sweeps": 50, "tol": 1e-3},
    "factored": {"rounds": 10, "min_size": 1},
}
"""The methods, their own options and defaults."""


class GradientClustering:
    """Partitions a data set by its per-example gradients, so that stratified mini-batches have a small variance.

    Minimises ``J = Σ_k N_k Σ_{i∈k} ‖g_i − c_k‖²``: ``J/N²`` is the variance of a mini-batch with one example of every
    cluster, weighted by ``N_k/N``. The gradients themselves are never stored.

    Args:
        model: any module whose parameters have a per-example route (``gf.coverage(model)``).
        num_clusters: K ≥ 1; may exceed the number of examples, the rest stays empty.
        method: ``"exact"``: one pass over the data collects a sketch of every gradient, then sweeps of exact moves
            lower J until a sweep gains nothing worth having. ``"factored"``: the paper's, with one rank-1 centre per
            cluster and parameter, size-weighted assignment, and two passes a round.
        sketch: :class:`Sketch`, default ``Sketch(dim=256)``. With ``"factored"`` it only serves the strata's
            statistics.
        parameters: which parameters count: name globs, or a predicate of name and parameter; None: all trainable ones.
        seed: of everything random in the clustering (the sketch has its own). Same seed, model and data: same strata.
        max_sweeps, tol: for ``"exact"``: at most 50 sweeps; stop after two that lower J by less than 0.1 % each.
        rounds, min_size: for ``"factored"``: 10 rounds; at the end of a round's assignment the smallest cluster, if
            it has fewer than ``min_size`` (1) members, takes a random half of the one with the largest distortion.
        warm_start: later calls of ``fit`` on as many examples start from the strata (or centres) of the call before.

    Attributes:
        strata: what the last ``fit`` returned, or None.
        history: J of the last ``fit``, in the units of gradient squared times N²: for ``"exact"`` at the start and
            after every sweep, estimated from the sketches, never rising; for ``"factored"`` after every round's
            assignment, ``Σ_k N_k Σ_{i∈k} ‖g_i − c_k‖²`` for the rank-1 centres, which bounds J from above.

    Raises:
        ValueError, TypeError: arguments that do not fit; options of another method.

    Source:
        Faghri et al. 2020, arXiv:2007.04532, section 3; exact moves: the guide's "clustering" page.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(4), i % 3) for i in range(60)]
        >>> loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
        >>> strata = gf.GradientClustering(model, num_clusters=8).fit(data, loss_fn)
        >>> int(strata.counts.sum())
        60
    """

    def __init__(
        self,
        model: nn.Module,
        num_clusters: int = 128,
        method: str = "exact",
        sketch: Sketch | None = None,
        parameters: Parameters = None,
        seed: int = 0,
        *,
        max_sweeps: int | None = None,
        tol: float | None = None,
        rounds: int | None = None,
        min_size: int | None = None,
        warm_start: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if method not in OPTIONS:
            raise ValueError(f"method must be one of {', '.join(map(repr, OPTIONS))}, got {method!r}")
        if sketch is not None and not isinstance(sketch, Sketch):
            raise TypeError(f"sketch must be a gf.Sketch, got {type(sketch).__name__}; for example gf.Sketch(dim=256)")
        num_clusters, seed = integer("num_clusters", num_clusters, 1), integer("seed", seed)
        given = {"max_sweeps": max_sweeps, "tol": tol, "rounds": rounds, "min_size": min_size}
        options = dict(OPTIONS[method])
        for name, value in given.items():
            if value is None:
                continue
            if name not in options:
                raise ValueError(f"{name} is not an option of method={method!r}, which has {', '.join(options)}")
            if name == "tol":
                check_fraction(name, value)
            else:
                value = integer(name, value, 0 if name == "min_size" else 1)
            options[name] = value
        self.model, self.num_clusters, self.method, self.seed = model, num_clusters, method, seed
        self.sketch = Sketch() if sketch is None else sketch
        self.parameters, self.options, self.warm_start = parameters, options, warm_start
        self.strata: Strata | None = None
        self.history: list[float] = []
        self._centers: Rank1Centers | None = None

    def fit(
        self,
        dataset: Dataset | DataLoader,
        loss_fn: LossFn | None = None,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        device: torch.device | str | None = None,
        collate_fn: Callable[[list], Any] | None = None,
        forward: Forward | None = None,
        mode: str = "eval",
        progress: bool | None = None,
    ) -> Strata:
        """Clusters a data set under the model as it is now. The model is left as it was, also after an exception.

        Args:
            dataset: map-style data set, or a loader over ``gf.with_indices(dataset)``; every example comes once a pass.
            loss_fn: ``loss_fn(output, target) -> [B]`` per-example losses, for samples ``(input, target)``.
            batch_size, num_workers, collate_fn: how to load a data set; a loader brings its own.
            device: where batches go; default: where the model's first parameter is.
            forward: ``forward(model, batch) -> [B]`` per-example losses, instead of ``loss_fn``, for other samples.
            mode: ``"eval"`` or ``"train"``, the model's mode during the passes.
            progress: show a progress bar (needs rich); None: where rich is installed and stderr is a terminal.

        Returns:
            :class:`Strata` with the clusters' variances and means, estimated from the sketches (slightly optimistic
            for the strata that were fitted to them).

        Raises:
            ValueError: an empty data set, losses that are not one per example, an index repeated or skipped, losses or
                gradients that are not finite (naming the examples).
            NotImplementedError: a parameter without a per-example route.
        """
        batch_size = integer("batch_size", batch_size, 1)
        N = num_examples(dataset)
        loader_size = dataset.batch_size if isinstance(dataset, DataLoader) else None
        steps = math.ceil(N / (loader_size or batch_size))
        if device is None:
            device = model_device(self.model)
        loading = {"batch_size": batch_size, "num_workers": num_workers, "collate_fn": collate_fn, "device": device}
        run = _Fit(self, dataset, N, loss_fn, forward, loading)
        method = run.exact if self.method == "exact" else run.factored
        passes = 1 if self.method == "exact" else 2 * self.options["rounds"]
        with untouched(self.model, mode), progress_bar(progress, passes * steps) as run.advance:
            # Nothing is kept from a fit that did not come to its end.
            self.strata, self.history, self._centers = method()
        return self.strata

    def _warm(self, N: int) -> bool:
        return self.warm_start and self.strata is not None and len(self.strata) == N


class _Fit:
    """One call of ``fit``."""

    advance: Advance

    def __init__(
        self,
        clustering: GradientClustering,
        dataset: Any,
        N: int,
        loss_fn: LossFn | None,
        forward: Forward | None,
        loading: dict[str, Any],
    ) -> None:
        self.clustering, self.dataset, self.N, self.loading = clustering, dataset, N, loading
        self.loss_fn, self.forward = loss_fn, forward
        self.generator = torch.Generator().manual_seed(clustering.seed)

    def exact(self) -> tuple[Strata, list[float], None]:
        clustering = self.clustering
        sketches = _Sketches(clustering.sketch, self.N)
        for index, batch in self._batches("sketching gradients"):
            self._stream(sketches, index, batch)
            sketches.store(index)
        rows = sketches.rows()
        K, strata = clustering.num_clusters, clustering.strata
        found = cluster_points(
            merge_equal_rows(rows),
            K,
            labels=strata.labels if strata is not None and clustering._warm(self.N) else None,
            seed=clustering.seed,
            **clustering.options,
        )
        return Strata.from_points(rows, found.labels, K), found.history, None

    def factored(self) -> tuple[Strata, list[float], Rank1Centers]:
        clustering, K, rounds = self.clustering, self.clustering.num_clusters, self.clustering.options["rounds"]
        warm = clustering._centers if clustering._warm(self.N) else None
        centers = Rank1Centers(K, clustering.seed) if warm is None else warm.copy()
        labels = balanced_labels(self.N, K, clustering.seed)
        distances = torch.zeros(self.N, dtype=torch.float64)
        sketches, history = _Sketches(clustering.sketch, self.N), []
        for number in range(1, rounds + 1):
            counts = torch.zeros(K, dtype=torch.int64)
            for index, batch in self._batches(f"round {number}/{rounds}: assignment", shuffle=True):
                batch_distances = Distances(centers, index)
                self._stream(batch_distances, index, batch)
                labels[index], distances[index] = batch_distances.assign(counts)
                check_finite("the gradient's distance to a centre", distances[index], index)
                counts += torch.bincount(labels[index], minlength=K)
            spread = torch.zeros(K, dtype=torch.float64).index_add_(0, labels, distances)
            history.append(float((counts * spread).sum()))
            labels = refill_smallest(labels, distances, K, clustering.options["min_size"], self.generator)
            for index, batch in self._batches(f"round {number}/{rounds}: centres"):
                self._stream(_Update(centers, labels[index], sketches if number == rounds else None), index, batch)
                if number == rounds:
                    sketches.store(index)
            centers.update(torch.bincount(labels, minlength=K))
        return Strata.from_points(sketches.rows(), labels, K), history, centers

    def _batches(self, text: str, shuffle: bool = False) -> Any:
        groups = None
        if shuffle:
            size = self.dataset.batch_size if isinstance(self.dataset, DataLoader) else self.loading["batch_size"]
            order = torch.randperm(self.N, generator=self.generator)
            groups = [group.tolist() for group in order.split(size or self.loading["batch_size"])]
        for item in batches(self.dataset, groups=groups, **self.loading):
            yield item
            self.advance(text)

    def _stream(self, consume: Callable[[str, Factors], None], index: Tensor, batch: Any) -> None:
        """Hands the factors of one batch's gradients to ``consume``; no weight gradient is computed."""
        model = self.clustering.model
        with Watch(model, consume, parameters=self.clustering.parameters) as watch:
            watch.backward(losses_of(model, batch, index, self.loss_fn, self.forward))


class _Sketches:
    """Consumes batches' factors into one sketch per example."""

    def __init__(self, sketch: Sketch, N: int) -> None:
        self.sketch, self.N = sketch, N
        self.parts: dict[str, Tensor] = {}  # one batch's, by parameter, or under "" their sum
        self.table: dict[str, Tensor] = {}  # [N, ·], on the CPU

    def __call__(self, name: str, factors: Factors) -> None:
        part = self.sketch.apply(name, factors)
        if not self.sketch.reduce:
            self.parts[name] = part
        elif self.parts:
            self.parts[""] = self.parts[""] + part.to(self.parts[""].device)
        else:
            self.parts[""] = part

    def store(self, index: Tensor) -> None:
        """Keeps the batch's sketches as rows ``index``; raises where one is not finite."""
        for name, part in self.parts.items():
            check_finite("the gradient", part, index)
            if name not in self.table:
                # Zeros: a parameter that a batch does not reach has no gradient there.
                self.table[name] = torch.zeros(self.N, part.shape[1], dtype=part.dtype)
            self.table[name][index] = part.cpu()
        self.parts = {}

    def rows(self) -> Tensor:
        """[N, R]; without a second stage the parameters' vectors side by side."""
        return torch.cat(list(self.table.values()), 1)


class _Update:
    """Consumes one batch's factors into the centres' sums, and into sketches where asked."""

    def __init__(self, centers: Rank1Centers, labels: Tensor, sketches: _Sketches | None) -> None:
        self.centers, self.labels, self.sketches = centers, labels, sketches

    def __call__(self, name: str, factors: Factors) -> None:
        self.centers.add(name, factors, self.labels)
        if self.sketches is not None:
            self.sketches(name, factors)


def merge_equal_rows(rows: Tensor) -> Tensor:
    """Rows that differ by no more than float32's rounding become exactly equal: copies of one example.

    Copies in different places of a batch, or in batches of different sizes, get gradients that differ in the last
    bits. Exact moves gather copies by ties, which such differences hide.
    """
    square = rows.double().square().sum(1)  # [N]
    typical = square.mean().sqrt()
    generator = torch.Generator().manual_seed(0)
    order = (rows.double() @ torch.randn(rows.shape[1], dtype=torch.float64, generator=generator)).argsort(stable=True)

    def differ(here: Tensor, there: Tensor) -> Tensor:
        parts = zip(here.split(65536), there.split(65536))  # bounds the float64 copies
        distance = torch.cat([(rows[a].double() - rows[b].double()).norm(dim=1) for a, b in parts])
        return distance > torch.maximum(1e-5 * square[here].sqrt(), 1e-7 * typical)

    first = torch.ones(len(rows), dtype=torch.bool)  # in that order: whether a row differs from the one before it
    if len(rows) > 1:
        first[1:] = differ(order[1:], order[:-1])
    source = order[torch.where(first, torch.arange(len(rows)), 0).cummax(0).values]
    # A long chain of small steps goes far: no row may move by more than rounding.
    source = torch.where(differ(order, source), order, source)
    merged = torch.empty_like(rows)
    merged[order] = rows[source]
    return merged
