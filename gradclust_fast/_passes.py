"""Passes over a data set that leave no trace: what clustering and the statistics share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from ._arguments import check_finite, integer
from .indexed import IndexedDataset

LossFn = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], Tensor]


@contextmanager
def untouched(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Runs its body with the model in ``mode`` and puts everything back, also after an exception.

    Put back: every module's training flag, every ``.grad`` (None inside), every buffer, and the random states of
    torch (CPU and the model's CUDA devices), NumPy and Python. Gradients are enabled inside.
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
    modes = [(module, module.training) for module in model.modules()]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter, _ in grads:
                parameter.grad = None
            model.train(mode == "train")
            yield
        finally:
            for parameter, grad in grads:
                parameter.grad = grad
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    module._buffers[name] = buffer
                    if buffer is not None and saved is not None:
                        buffer.copy_(saved)
            np.random.set_state(numpy_state)
            random.setstate(python_state)


class _Pairs(Dataset):
    """``(i, dataset[i])``: keeps the index apart from whatever the sample is, for any ``collate_fn``."""

    def __init__(self, dataset: Dataset, collate_fn: Callable[[list], Any] | None) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn or default_collate

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.dataset[i]

    def collate(self, pairs: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        return torch.tensor([i for i, _ in pairs]), self.collate_fn([sample for _, sample in pairs])


def num_examples(data: Dataset | DataLoader) -> int:
    """N of a map-style data set, or of a loader over ``with_indices(dataset)``; raises for anything else."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if isinstance(data, DataLoader) and not isinstance(dataset, IndexedDataset):
        raise TypeError(
            "dataset is a DataLoader that does not yield indices; pass the data set itself, or "
            "DataLoader(gf.with_indices(dataset), ...)"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be map-style (len() and indexing), got {type(dataset).__name__}; "
            f"materialise an iterable data set first, for example as a list"
        )
    if isinstance(data, DataLoader) and data.batch_size is None and data.batch_sampler is None:
        raise ValueError(
            "dataset is a DataLoader with batch_size=None, which yields single examples; give it a batch size"
        )
    N = len(dataset)
    if N == 0:
        raise ValueError("dataset is empty; there is nothing to measure")
    return N


def batches(
    data: Dataset | DataLoader,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    collate_fn: Callable[[list], Any] | None = None,
    device: torch.device | str | None = None,
    groups: Sequence[list[int]] | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Yields ``(index [b], batch on device)``; every example exactly once, or an error at the end of the pass.

    Args:
        data: a map-style data set, or a loader over ``with_indices(dataset)`` (its own batches and order).
        groups: visit exactly these index lists as batches instead, with the loader's collation if there is one.
    """
    N = num_examples(data)
    batch_size = integer("batch_size", batch_size, 1)
    loader: Iterable[Any]
    if isinstance(data, DataLoader):
        loader = data
        if groups is not None:
            loader = DataLoader(
                data.dataset, batch_sampler=list(groups), collate_fn=data.collate_fn, num_workers=data.num_workers
            )
        split = _split_index
    elif type(data) is TensorDataset and collate_fn is None and num_workers == 0:
        loader = _rows(data, N, batch_size, groups)
        split = tuple  # type: ignore[assignment]
    else:
        pairs = _Pairs(data, collate_fn)
        order: dict[str, Any] = {"batch_size": batch_size} if groups is None else {"batch_sampler": list(groups)}
        loader = DataLoader(pairs, collate_fn=pairs.collate, num_workers=num_workers, **order)
        split = tuple  # type: ignore[assignment]
    expected = torch.ones(N, dtype=torch.int64)
    if groups is not None:
        expected = torch.bincount(torch.tensor([i for group in groups for i in group], dtype=torch.int64), minlength=N)
    seen = torch.zeros(N, dtype=torch.int64)
    for item in loader:
        index, batch = split(item)
        index = index.cpu().long()
        if index.numel() and (index.min() < 0 or index.max() >= N):
            raise ValueError(f"the loader yielded an index outside 0..{N - 1}: {index[(index < 0) | (index >= N)][0]}")
        seen += torch.bincount(index, minlength=N)
        repeated = (seen > expected).nonzero()
        if len(repeated):
            raise ValueError(
                f"the loader yielded index {int(repeated[0])} more than once; every example must come exactly once "
                f"(use a sampler without replacement)"
            )
        yield index, to_device(batch, device)
    skipped = (seen < expected).nonzero()
    if len(skipped):
        raise ValueError(
            f"the loader skipped {len(skipped)} of {N} examples, the first of them index {int(skipped[0])}; every "
            f"example must come exactly once (drop_last=False, no subset sampler)"
        )


def _rows(
    data: TensorDataset, N: int, batch_size: int, groups: Sequence[list[int]] | None
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """The batches that a DataLoader with its own collation makes, without taking a data set of tensors apart first.

    Stacking samples costs several microseconds for each, more than a small model's forward and backward.
    """
    whole = torch.arange(N).split(batch_size)
    for index in whole if groups is None else (torch.tensor(group, dtype=torch.int64) for group in groups):
        yield index, [tensor[index.to(tensor.device)] for tensor in data.tensors]


def _split_index(item: Any) -> tuple[Tensor, Any]:
    """(index, *sample) or {"index": ..., **sample} → index, sample."""
    if isinstance(item, dict):
        return item["index"], {key: value for key, value in item.items() if key != "index"}
    index, *sample = item
    return index, sample[0] if len(sample) == 1 else tuple(sample)


def to_device(batch: Any, device: torch.device | str | None) -> Any:
    """Every tensor in nested dicts, lists and tuples, and anything with a ``.to``, on ``device``."""
    if device is None:
        return batch
    if isinstance(batch, dict):
        return type(batch)({key: to_device(value, device) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def model_device(model: nn.Module) -> torch.device:
    """The device of the first parameter; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def losses_of(
    model: nn.Module, batch: Any, index: Tensor, loss_fn: LossFn | None, forward: Forward | None
) -> Tensor:  # [b]
    """Per-example losses of one batch; raises when they are not one per example or not finite.

    Args:
        loss_fn: ``loss_fn(output, target) -> [b]`` for batches ``(input, target)``.
        forward: ``forward(model, batch) -> [b]``, instead, for any other batch type.
    """
    if forward is not None:
        losses, source = forward(model, batch), "forward"
    else:
        if not callable(loss_fn):
            got = "None" if loss_fn is None else type(loss_fn).__name__
            raise TypeError(f"loss_fn must be a function of (output, target), got {got}; or pass forward=")
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"loss_fn needs batches (input, target), got {type(batch).__name__}; pass "
                f"forward=lambda model, batch: per-example losses [B] instead"
            )
        losses, source = loss_fn(model(batch[0]), batch[1]), "loss_fn"
    if not isinstance(losses, Tensor):
        raise TypeError(f"{source} must return a tensor of per-example losses [B], got {type(losses).__name__}")
    if losses.shape != index.shape:
        remedy = "reduction='none'" if losses.dim() == 0 else "one loss per example: sum over the other dimensions"
        raise ValueError(
            f"{source} must return per-example losses [{len(index)}], got {list(losses.shape)}; use {remedy}"
        )
    check_finite("the loss", losses, index)
    return losses
