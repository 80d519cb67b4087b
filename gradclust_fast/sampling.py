"""Stratified mini-batches: which examples a batch holds, and the weights that keep its mean unbiased."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ._arguments import check_index, integer
from ._recorded import recorded_points
from .allocation import Plan, check_batch, check_strata
from .guard import Guard, one_stratum
from .indexed import IndexedDataset, with_indices
from .recording import record
from .strata import Strata

__all__ = ["IndexedDataset", "Strata", "StratifiedBatchSampler", "with_indices"]


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
        refresh: ``"auto"``: :meth:`observe` estimates from recorded steps how noisy the sampler's batches are, says by
            ``needs_snapshot`` when the strata are worth renewing, and goes over to uniform batches before they become
            noisier than those. None: strata act as long as they are not replaced.
        refresh_above: variance over a uniform batch's from which a new snapshot is asked for; 0.5 is a batch of twice
            the size.
        uniform_above: from which the next epoch is drawn uniformly, until new strata come.

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
        *,
        refresh: str | None = None,
        refresh_above: float = 0.5,
        uniform_above: float = 0.8,
    ) -> None:
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        check_batch(strata, batch_size, allocation, replacement)
        if refresh not in (None, "auto"):
            raise ValueError(f"refresh must be 'auto' or None, got {refresh!r}")
        for name, value in (("refresh_above", refresh_above), ("uniform_above", uniform_above)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
                raise ValueError(f"{name} must be in (0, 1], a share of a uniform batch's variance, got {value!r}")
        self.refresh, self.refresh_above, self.uniform_above = refresh, refresh_above, uniform_above
        self.batch_size, self.seed = integer("batch_size", batch_size), integer("seed", seed, 0)
        self.allocation, self.replacement = allocation, replacement
        self._plan = self._plan_for(strata)
        self._guard = Guard(strata.num_clusters)
        self._uniform = False  # the plan in force is one stratum, for which the guard left the strata
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

    def observe(self, rec: record, index: Any, *, group: Any = None) -> float:
        """Feeds a recorded training step on one of this sampler's batches to ``refresh="auto"``.

        Costs what recording a sketch costs; not every batch has to be observed. The estimate needs no pass over the
        data: draws of one stratum in different batches tell its variance, weighted norms and the batch's mean the total
        (the guide's "clustering" page). What the model moves between two observed batches counts as variance, so old
        strata are never flattered.

        Args:
            rec: a ``gf.record`` opened with ``sketch=gf.Sketch(...)`` (64 numbers are enough), after the backward of
                ``(sampler.weights(index) * losses).mean()``.
            index: [B] data-set indices of the batch, in the order of the record's rows.
            group: with several replicas, their ``torch.distributed`` process group: all ranks' examples count, and
                every rank decides alike. All ranks must call it.

        Returns:
            ``variance_ratio`` after it.

        Raises:
            ValueError, TypeError, IndexError: a sampler without ``refresh``; a record without sketches; an index that
                does not fit the record or is no batch of this sampler; gradients that are not finite, with their
                indices. Nothing has changed then.

        Example:
            >>> sampler = gf.StratifiedBatchSampler(gf.Strata([0, 0, 1, 1], 2), batch_size=2, refresh="auto")
            >>> model, sketch = torch.nn.Linear(3, 1), gf.Sketch(dim=64)
            >>> x = torch.randn(4, 3)
            >>> for index in sampler:
            ...     with gf.record(model, sketch=sketch) as rec:
            ...         (sampler.weights(index) * model(x[index]).square().squeeze(1)).mean().backward()
            ...     ratio = sampler.observe(rec, index)
            >>> sampler.needs_snapshot
            False
        """
        if self.refresh is None:
            raise ValueError("this sampler was made without refresh='auto', so it does not watch its batches")
        if self.num_replicas > 1 and group is None:
            raise ValueError(
                f"observe needs group= with {self.num_replicas} replicas, for example torch.distributed.group.WORLD: "
                f"every rank must come to the same decision"
            )
        points, indices = recorded_points(rec, index, len(self.strata), self.weights, group)
        if not self._uniform:
            self._guard.observe(self._plan, points, indices, self.replacement)
        return self.variance_ratio

    @property
    def variance_ratio(self) -> float:
        """Estimated variance of this sampler's batches over a uniform batch's, averaged over about ten observed ones.

        NaN before five of them; 1 while batches are uniform.
        """
        return 1.0 if self._uniform else self._guard.ratio

    @property
    def uniform(self) -> bool:
        """Whether the current epoch's batches are uniform, because its strata had become too old to help."""
        return self._uniform

    @property
    def needs_snapshot(self) -> bool:
        """Whether new strata are worth a pass over the data (``refresh="auto"``); False once ``set_strata`` has them.

        True while batches are uniform, and where ``variance_ratio`` is above ``refresh_above`` and a quarter above what
        it was when the strata were new: strata that were no better when fresh are not asked for again.
        """
        if self.refresh is None or self._pending is not None:
            return False
        ratio = self.variance_ratio
        return ratio >= self.uniform_above or (ratio > self.refresh_above and ratio >= 1.25 * self._guard.fresh)

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
        batches_done = integer("batches_done", batches_done)
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
            "refresh": self.refresh,
            "uniform": self._uniform,
            "guard": self._guard.state_dict(),
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
        for name in ("batch_size", "num_replicas", "allocation", "replacement", "refresh"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    f"the saved sampler has {name}={state[name]!r}, this one {getattr(self, name)!r}; the batches "
                    f"would differ: make this sampler with the saved value"
                )
        strata = Strata.from_state_dict(state["strata"])
        if len(strata) != len(self.strata):
            raise ValueError(
                f"the saved sampler is of {len(strata)} examples, this one of {len(self.strata)}; make this sampler "
                f"for the data set of the saved one"
            )
        self.seed, self._uniform = state["seed"], state["uniform"]
        self._plan, self._tables = self._uniform_plan(strata) if self._uniform else self._plan_for(strata), {}
        self._guard = Guard.from_state_dict(state["guard"])
        following = state["next_strata"]
        self._pending = None if following is None else self._plan_for(Strata.from_state_dict(following))
        self._running, self._next_epoch, self._skip = None, state["epoch"], state["batches_done"]
        if self._skip == len(self):
            self._next_epoch, self._skip = self._next_epoch + 1, 0

    def _plan_for(self, strata: Strata) -> Plan:
        plan = Plan(strata, self.batch_size * self.num_replicas, self.allocation, self.replacement)
        if self.refresh is not None and plan.take is None:
            raise ValueError(
                f"refresh='auto' needs every batch to meet every stratum: batch_size={self.batch_size} is below the "
                f"{int((plan.counts > 0).sum())} non-empty strata; cluster into fewer, or enlarge the batch"
            )
        return plan

    def _uniform_plan(self, strata: Strata) -> Plan:
        return Plan(strata, self.batch_size * self.num_replicas, "equal", self.replacement)

    def _adopt(self) -> None:
        # an epoch that was interrupted and reloaded is finished with the strata it began with
        if self._skip:
            return
        if self._pending is not None:
            self._plan, self._pending, self._tables = self._pending, None, {}
            self._uniform, self._guard = False, Guard(self.strata.num_clusters)
        elif self.refresh is not None and not self._uniform and self._guard.ratio >= self.uniform_above:
            self._uniform, self._plan, self._tables = True, self._uniform_plan(one_stratum(self.strata)), {}


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
