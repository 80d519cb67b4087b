"""Stratified mini-batches: which examples a batch holds, and the weights that keep its mean unbiased."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from ._arguments import integer
from .allocation import Plan, check_batch, check_strata
from .strata import Strata

__all__ = ["IndexedDataset", "Strata", "StratifiedBatchSampler", "with_indices"]


class IndexedDataset(Dataset):
    """What :func:`with_indices` returns; ``dataset`` is the one it wraps."""

    def __init__(self, dataset: Any) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset must be map-style (indexing by 0..N−1), got {type(dataset).__name__}; an iterable data set "
                f"has no stable indices: materialise it first, for example as a list"
            )
        if not hasattr(dataset, "__len__"):
            raise TypeError(f"dataset must have a length, got {type(dataset).__name__} without __len__; add one")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        index = self._plain(index)
        return _join(index, self.dataset[index])

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """A whole batch, in one call when the wrapped data set can."""
        indices = [self._plain(index) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch is not None else [self.dataset[i] for i in indices]
        if len(samples) != len(indices):
            raise ValueError(
                f"{type(self.dataset).__name__}.__getitems__ returned {len(samples)} samples for {len(indices)} indices"
            )
        return [_join(i, sample) for i, sample in zip(indices, samples)]

    def _plain(self, index: Any) -> int:
        N, plain = len(self.dataset), int(index)
        if not -N <= plain < N:
            raise IndexError(f"index {plain} is outside the data set of {N} examples")
        return plain % N  # the index that weights() and clustering know


def _join(index: int, sample: Any) -> Any:
    if isinstance(sample, Mapping):
        if "index" in sample:
            raise ValueError(
                f"sample {index} already has a key 'index', which with_indices would overwrite; rename that key"
            )
        return {"index": index, **sample}
    return (index, *sample) if isinstance(sample, tuple) else (index, sample)


def with_indices(dataset: Any) -> IndexedDataset:
    """A map-style data set whose samples also carry their index, which the weights of a stratified batch need.

    Args:
        dataset: anything with ``len()`` and integer indexing. Batched fetching (``__getitems__``) is kept.

    Returns:
        A data set of ``(index, *sample)`` for tuples, ``{"index": index, **sample}`` for dicts, and
        ``(index, sample)`` for anything else.

    Raises:
        TypeError: for an iterable data set, which has no stable indices.

    Example:
        >>> gf.with_indices([("a", 0), ("b", 1)])[1]
        (1, 'b', 1)
    """
    return IndexedDataset(dataset)


class StratifiedBatchSampler(Sampler[list[int]]):
    """Batches drawn from every stratum, for ``DataLoader(gf.with_indices(dataset), batch_sampler=...)``.

    Batch t of epoch e is a pure function of (seed, e, t) and the strata, so prefetching workers change nothing. Every
    batch is a fresh draw (an epoch is not a permutation): stratum k gives m_k examples, and the expectation of
    ``(sampler.weights(index) * losses).mean()`` is the mean loss. When a batch is smaller than the number of non-empty
    strata, it takes one example each of a random choice of strata, larger ones more often.

    An epoch has ``ceil(N / global batch)`` batches, all of them full. Every pass over the sampler (the first batch
    taken from a new ``iter()``) starts the next epoch; ``set_epoch(e)`` names the epoch that comes next.

    Args:
        strata: what ``GradientClustering.fit`` returns, or ``gf.Strata(labels, num_clusters)``.
        batch_size: examples per batch (and per rank).
        allocation: ``"equal"`` shares of the batch for every stratum, ``"proportional"`` to N_k, or ``"neyman"``, to
            N_k√V_k, which needs the strata's variances. The m_k are integers by largest remainder, at least 1 for every
            non-empty stratum and, without replacement, at most N_k.
        replacement: draw within a batch with replacement.
        seed: non-negative.
        num_replicas, rank: of distributed training; by default those of ``torch.distributed`` when it is initialised.
            Ranks split one global batch of ``batch_size * num_replicas``; the weights make the mean of the ranks'
            means unbiased.

    Raises:
        ValueError, TypeError: sizes, ranks or allocations that cannot be; a batch larger than the data set without
            replacement; ``"neyman"`` for strata without variances.

    Source:
        The guide's "stratified mini-batches"; Faghri et al. 2020, arXiv:2007.04532, section 3, for ``"equal"`` with one
        example per stratum; Cochran, *Sampling Techniques* (1977), chapter 5, for the allocations.

    Example:
        >>> sampler = gf.StratifiedBatchSampler(gf.Strata([0, 0, 0, 1], 2), batch_size=2)
        >>> index = torch.tensor(next(iter(sampler)))
        >>> sampler.weights(index)
        tensor([1.5000, 0.5000])
    """

    def __init__(
        self,
        strata: Strata,
        batch_size: int = 128,
        allocation: str = "equal",
        replacement: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        check_batch(strata, batch_size, allocation, replacement)
        self.batch_size, self.seed = integer("batch_size", batch_size), integer("seed", seed, 0)
        self.allocation, self.replacement = allocation, replacement
        self._plan = self._plan_for(strata)
        self._pending: Plan | None = None  # of strata that act from the next epoch on
        self._running: int | None = None  # the epoch of the latest pass, None until its first batch
        self._next_epoch, self._skip = 0, 0
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def strata(self) -> Strata:
        """The strata of the current epoch."""
        return self._plan.strata

    @property
    def epoch(self) -> int:
        """The epoch of the latest pass, or the one the first pass will be."""
        return self._next_epoch if self._running is None else self._running

    def __len__(self) -> int:
        """Batches per epoch: ceil(N / (batch_size · num_replicas))."""
        return -(-len(self.strata) // (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[list[int]]:
        self._adopt()
        return self._batches()

    def _batches(self) -> Iterator[list[int]]:
        # The epoch is taken by the first batch, not by iter(): a DataLoader with workers calls iter() twice a pass.
        self._adopt()
        plan, epoch, start = self._plan, self._next_epoch, self._skip
        self._running, self._next_epoch, self._skip = epoch, epoch + 1, 0
        for t in range(start, len(self)):
            rng = np.random.Generator(np.random.PCG64([self.seed, epoch, t]))
            yield plan.draw(rng)[self.rank :: self.num_replicas].tolist()

    def weights(self, index: Any) -> Tensor:
        """The weight of every drawn example's loss: ``B·N_k/(N·m_k)`` with B the global batch, or ``B·N_k/(N·π_k)``.

        Args:
            index: data-set indices of any shape and on any device, as the loader yields them. They are checked, so a
                call on a GPU's index waits for it: on the loader's own index, before it is moved, it does not.

        Returns:
            A tensor of index's shape on its device, in torch's default dtype; 1 in expectation over a batch.

        Raises:
            IndexError: for an index outside the data set.
            TypeError: for an index that is not of integers.
        """
        index = check_index(index, len(self.strata))
        if index.device not in self._tables:
            weight = torch.from_numpy(self._plan.weight).to(index.device, torch.get_default_dtype())
            self._tables[index.device] = weight, self.strata.labels.to(index.device)
        weight, labels = self._tables[index.device]
        return weight.index_select(0, labels.index_select(0, index.reshape(-1).long())).reshape(index.shape)

    def predicted_variance(self) -> float:
        """Total variance ``E‖ĝ − ḡ‖²`` of the (global) batch's mean gradient, from the statistics in the strata.

        In the units of gradient squared. Optimistic for strata that were fitted to the same sketches, and stale once
        the model has moved on: ``gf.compare_estimators`` measures it.

        Raises:
            ValueError: for strata without variances, or, with a batch smaller than the number of strata, without means.
        """
        return sum(self._plan.variance_terms())

    def predicted_variance_terms(self) -> tuple[float, float]:
        """:meth:`predicted_variance` as (within strata, between strata); the second is 0 unless batches skip strata."""
        return self._plan.variance_terms()

    def set_strata(self, strata: Strata) -> None:
        """New strata of the same examples, used from the next epoch or explicit ``iter()`` on.

        Raises:
            ValueError: for strata of another number of examples, or that allow no batch of this size.
        """
        check_strata(strata)
        if len(strata) != len(self.strata):
            raise ValueError(
                f"strata must be of the same {len(self.strata)} examples, got {len(strata)}; make a new sampler for "
                f"another data set"
            )
        self._pending = self._plan_for(strata)

    def set_epoch(self, epoch: int) -> None:
        """The next pass over the sampler will be this epoch, from its first batch."""
        self._running, self._next_epoch, self._skip = None, integer("epoch", epoch, 0), 0

    def state_dict(self, batches_done: int | None = None) -> dict[str, Any]:
        """Everything needed to go on in another process, strata included.

        Args:
            batches_done: batches of the current epoch that training has consumed. The sampler cannot know: prefetching
                workers take batches ahead. May be left out only before the epoch's first batch.

        Raises:
            ValueError: when it is needed and missing, or not in 0..len(sampler).
        """
        if batches_done is None:
            if self._running is not None:
                raise ValueError(
                    "batches_done is needed once an epoch has begun (a DataLoader may have taken batches that training "
                    "has not seen yet); pass the number of batches that training has consumed in this epoch"
                )
            batches_done = self._skip
        if not 0 <= batches_done <= len(self):
            raise ValueError(f"batches_done must be in 0..{len(self)} (batches per epoch), got {batches_done}")
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "batches_done": batches_done,
            "batch_size": self.batch_size,
            "num_replicas": self.num_replicas,
            "allocation": self.allocation,
            "replacement": self.replacement,
            "strata": self.strata.state_dict(),
            "next_strata": None if self._pending is None else self._pending.strata.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues as saved: the next pass yields the rest of that epoch, then come whole epochs.

        Raises:
            ValueError: when the sampler was made with other arguments than the saved one (the rank may differ).
        """
        missing = set(self.state_dict(0)) - set(state)
        if missing:
            raise ValueError(f"state has no {sorted(missing)}; pass what StratifiedBatchSampler.state_dict() returned")
        for name in ("batch_size", "num_replicas", "allocation", "replacement"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved sampler has {name}={state[name]!r}, this one {getattr(self, name)!r}; the batches "
                    f"would differ: make this sampler with the saved value"
                )
        self.seed = state["seed"]
        self._plan, self._tables = self._plan_for(Strata.from_state_dict(state["strata"])), {}
        following = state["next_strata"]
        self._pending = None if following is None else self._plan_for(Strata.from_state_dict(following))
        self._running, self._next_epoch, self._skip = None, state["epoch"], state["batches_done"]
        if self._skip == len(self):
            self._next_epoch, self._skip = self._next_epoch + 1, 0

    def _plan_for(self, strata: Strata) -> Plan:
        return Plan(strata, self.batch_size * self.num_replicas, self.allocation, self.replacement)

    def _adopt(self) -> None:
        # an epoch that was interrupted and reloaded is finished with the strata it began with
        if self._pending is not None and not self._skip:
            self._plan, self._pending, self._tables = self._pending, None, {}


def check_index(index: Any, N: int) -> Tensor:
    """Data-set indices as a tensor of integers; raises for those outside 0..N−1 where that needs no device to wait."""
    index = torch.as_tensor(index)
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(f"index must be of integers (data-set indices), got {index.dtype}")
    if index.device.type == "cpu" and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= N:
            raise IndexError(
                f"index {low if low < 0 else high} is outside the {N} examples of the strata; pass the indices that "
                f"DataLoader(gf.with_indices(dataset)) yields"
            )
    return index


def _replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    initialised = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_replicas is None:
        num_replicas = torch.distributed.get_world_size() if initialised else 1
    if rank is None:
        rank = torch.distributed.get_rank() if initialised else 0
    num_replicas, rank = integer("num_replicas", num_replicas, 1), integer("rank", rank)
    if not 0 <= rank < num_replicas:
        raise ValueError(f"rank must be in 0..{num_replicas - 1} (num_replicas={num_replicas}), got {rank}")
    return num_replicas, rank
