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
from .._recorded import recorded_points
from ..layers import Factors
from ..recording import record
from ..sampling import Strata
from ..selection import Parameters, select
from ..sketching import Sketch
from ..watching import Watch
from ._progress import Advance, progress_bar
from .exact import balanced_labels, check_fraction, cluster_points
from .factored import Distances, Rank1Centers, refill_smallest
from .online import RunningClusters, distinct
from .sketches import Sketches, merge_equal_rows

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"max_sweeps": 50, "tol": 1e-3},
    "factored": {"rounds": 10, "min_size": 1},
    "online": {"max_sweeps": 50, "tol": 1e-3, "decay": 0.99, "num_examples": None},
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
            cluster and parameter, size-weighted assignment, and two passes a round. ``"online"``: strata that follow
            training: every :meth:`update` assigns the examples of a recorded step to running centres of sketches.
        sketch: :class:`Sketch`, default ``Sketch(dim=256)``. With ``"factored"`` it only serves the strata's
            statistics.
        parameters: which parameters count: name globs, or a predicate of name and parameter; None: all trainable ones.
        seed: of everything random in the clustering (the sketch has its own). Same seed, model and data: same strata.
        max_sweeps, tol: for ``"exact"``: at most 50 sweeps; stop after two that lower J by less than 0.1 % each.
        rounds, min_size: for ``"factored"``: 10 rounds; at the end of a round's assignment the smallest cluster, if
            it has fewer than ``min_size`` (1) members, takes a random half of the one with the largest distortion.
        decay: for ``"online"``: what a past update counts for in the running centres and variances, 0.99.
        num_examples: for ``"online"``: N, to start from random equal strata without a pass over the data.
        warm_start: later calls of ``fit`` on as many examples start from the strata (or centres) of the call before.

    Attributes:
        strata: what the last ``fit`` or ``update`` returned, or None.
        history: J of the last ``fit``, in the units of gradient squared times N²: for ``"exact"`` at the start and
            after every sweep, estimated from the sketches, never rising; for ``"factored"`` after every round's
            assignment, ``Σ_k N_k Σ_{i∈k} ‖g_i − c_k‖²`` for the rank-1 centres, which bounds J from above; for
            ``"online"`` one more entry per ``update``, from the running statistics.

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
        decay: float | None = None,
        num_examples: int | None = None,
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
        given |= {"decay": decay, "num_examples": num_examples}
        options = dict(OPTIONS[method])
        for name, value in given.items():
            if value is None:
                continue
            if name not in options:
                raise ValueError(f"{name} is not an option of method={method!r}, which has {', '.join(options)}")
            if name == "tol":
                check_fraction(name, value)
            elif name == "decay":
                check_fraction(name, value)
                if value >= 1:
                    raise ValueError(f"decay must be below 1, got {value!r}; 0.99 remembers about 100 updates")
            else:
                value = integer(name, value, 0 if name == "min_size" else 1)
            options[name] = value
        self.model, self.num_clusters, self.method, self.seed = model, num_clusters, method, seed
        self.sketch = Sketch() if sketch is None else sketch
        self.parameters, self.options, self.warm_start = parameters, options, warm_start
        self.strata: Strata | None = None
        self.history: list[float] = []
        self._centers: Rank1Centers | None = None
        self._running: RunningClusters | None = None
        if options.get("num_examples") is not None:
            labels = balanced_labels(options["num_examples"], num_clusters, seed)
            self._running = RunningClusters(labels, num_clusters, options["decay"])
            self.strata = self._running.strata()

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
        method = run.factored if self.method == "factored" else run.exact
        passes = 2 * self.options["rounds"] if self.method == "factored" else 1
        with untouched(self.model, mode), progress_bar(progress, passes * steps) as run.advance:
            # Nothing is kept from a fit that did not come to its end.
            self.strata, self.history, self._centers = method()
        if self.method == "online":
            self._running = RunningClusters.of(self.strata, self.options["decay"])
        return self.strata

    def update(self, rec: record, index: Any, weights: Any | None = None, *, group: Any = None) -> Strata:
        """Follows training: assigns the examples of a recorded step to the running centres, which then move to them.

        Costs no pass over the data. Examples go one after the other to the stratum where J grows least, as in the exact
        moves; strata that lost all of their examples are founded anew by the next one that gains from it. Examples that
        never came keep the stratum they started in.

        Args:
            rec: a ``gf.record`` of this model, opened with ``sketch=clustering.sketch``, after its backward.
            index: [B] data-set indices of the recorded examples, in the order of its rows; none twice.
            weights: [B], by what the losses were multiplied (``sampler.weights(index)``), divided out; None: 1.
            group: a ``torch.distributed`` process group: the examples of all ranks count, and every rank gets the same
                strata. All ranks must call it. None: this process alone.

        Returns:
            The strata as they are now, for ``sampler.set_strata``. Their variances and means are running averages, and
            None until every stratum that has members has met one.

        Raises:
            ValueError, TypeError: a method other than ``"online"``; a record with another sketch or of other
                parameters; an index that does not fit the record, or repeats an example; gradients that are not finite,
                with their indices; weights that are not positive. Nothing has changed then.
            IndexError: an index outside the data set.
            RuntimeError: before ``fit``, where ``num_examples`` was not given.

        Example:
            >>> model = torch.nn.Linear(4, 3)
            >>> clustering = gf.GradientClustering(model, num_clusters=4, method="online", num_examples=40)
            >>> x, index = torch.randn(8, 4), torch.arange(8)
            >>> with gf.record(model, sketch=clustering.sketch) as rec:
            ...     torch.nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).backward()
            >>> clustering.update(rec, index).num_clusters
            4
        """
        if self.method != "online":
            raise ValueError(
                f"update needs method='online', this clustering has {self.method!r}; make it with "
                f"gf.GradientClustering(model, ..., method='online')"
            )
        if self._running is None:
            raise RuntimeError(
                "update does not know the data set yet; call fit(dataset, loss_fn) first, or pass "
                "num_examples=len(dataset) to start from random strata"
            )
        points, index = recorded_points(rec, index, len(self._running.labels), weights, group, self.sketch)
        names = [entry.name for entry in select(self.model, self.parameters)]
        if rec.names != names:
            other = next(iter(set(rec.names) ^ set(names)), "their order")
            raise ValueError(
                f"rec and the clustering are of different parameters ({other}); give both the same parameters="
            )
        if self._running.means is not None and self._running.means.shape[1] != points.shape[1]:
            raise ValueError(
                f"rec has sketches of {points.shape[1]} numbers, the running centres {self._running.means.shape[1]}"
            )
        self._running.update(points, distinct(index))
        self.strata = self._running.strata()
        if self.strata.variance is not None:
            self.history.append(self.strata.distortion)
        return self.strata

    @property
    def unseen(self) -> Tensor:
        """Indices of the examples that neither ``fit`` nor an ``update`` has met (``"online"`` without ``fit``)."""
        if self._running is None:
            return torch.empty(0, dtype=torch.int64)
        return (~self._running.seen).nonzero().flatten()

    def state_dict(self) -> dict[str, Any]:
        """What ``fit`` and ``update`` found, as tensors and numbers for ``torch.save``."""
        centers = (
            None if self._centers is None else {"rows": dict(self._centers.rows), "cols": dict(self._centers.cols)}
        )
        return {
            "method": self.method,
            "num_clusters": self.num_clusters,
            "history": list(self.history),
            "strata": None if self.strata is None else self.strata.state_dict(),
            "centers": centers,
            "running": None if self._running is None else self._running.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues as saved: a warm start, or running centres.

        Raises:
            ValueError: for the state of another method or number of clusters.
        """
        missing = set(self.state_dict()) - set(state)
        if missing:
            raise ValueError(f"state has no {sorted(missing)}; pass what GradientClustering.state_dict() returned")
        for name in ("method", "num_clusters"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved clustering has {name}={state[name]!r}, this one {getattr(self, name)!r}; make this one "
                    f"with the saved value"
                )
        self.history = list(state["history"])
        self.strata = None if state["strata"] is None else Strata.from_state_dict(state["strata"])
        self._centers = self._running = None
        if state["centers"] is not None:
            self._centers = Rank1Centers(self.num_clusters, self.seed)
            self._centers.rows, self._centers.cols = (dict(state["centers"][part]) for part in ("rows", "cols"))
        if state["running"] is not None:
            self._running = RunningClusters.from_state_dict(state["running"], self.num_clusters)

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
        sketches = Sketches(clustering.sketch, self.N)
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
            max_sweeps=clustering.options["max_sweeps"],
            tol=clustering.options["tol"],
        )
        return Strata.from_points(rows, found.labels, K), found.history, None

    def factored(self) -> tuple[Strata, list[float], Rank1Centers]:
        clustering, K, rounds = self.clustering, self.clustering.num_clusters, self.clustering.options["rounds"]
        warm = clustering._centers if clustering._warm(self.N) else None
        centers = Rank1Centers(K, clustering.seed) if warm is None else warm.copy()
        labels = balanced_labels(self.N, K, clustering.seed)
        distances = torch.zeros(self.N, dtype=torch.float64)
        sketches, history = Sketches(clustering.sketch, self.N), []
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


class _Update:
    """Consumes one batch's factors into the centres' sums, and into sketches where asked."""

    def __init__(self, centers: Rank1Centers, labels: Tensor, sketches: Sketches | None) -> None:
        self.centers, self.labels, self.sketches = centers, labels, sketches

    def __call__(self, name: str, factors: Factors) -> None:
        self.centers.add(name, factors, self.labels)
        if self.sketches is not None:
            self.sketches(name, factors)
