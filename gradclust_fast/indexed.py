"""Data sets whose samples carry their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset


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
