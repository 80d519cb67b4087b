"""What the rows train, and on what: models, synthetic data, image data and their variations."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from .. import data as datasets
from .._passes import to_device
from .unit import Unit


@dataclass
class Problem:
    """A model, its data, and the per-example loss ``loss(output, target)`` → [B]."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    train: Dataset
    test: Dataset | None = None

    @property
    def num_examples(self) -> int:
        return len(self.train)  # type: ignore[arg-type]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")  # [B]


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output.squeeze(1) - target).square()  # [B]


@contextmanager
def seeded(seed: int):
    """Draws of torch's CPU generator inside depend on the seed alone, and leave the generator outside as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


TEST = 2000
"""Test examples that accuracies are taken of."""


# Models


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, size: int, width: int = 8, classes: int = 10) -> nn.Sequential:
    """Two convolutions with pooling and a linear layer, for images [C, size, size]."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, classes),
    )  # fmt: skip


class Block(nn.Module):
    """Two 3×3 convolutions around which the input goes unchanged: subsampled and with zero channels added."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(i, o, 3, stride, 1)
        self.second = nn.Conv2d(o, o, 3, 1, 1)
        self.stride, self.extra = stride, o - i

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(self.second(F.relu(self.first(x))) + around)


def resnet8(classes: int = 10, width: int = 16) -> nn.Sequential:
    """The CIFAR ResNet of one block a stage (He et al. 2016, arXiv:1512.03385) without norm layers."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1), nn.ReLU(),
        Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


# Synthetic data


def linear_regression(unit: Unit, N: int, dim: int, offset: float, scale: float) -> Problem:
    """``X = offset + scale·ε`` [N, dim], ``y = X·θ* + 0.1 ε'``, Gaussian θ* of norm 1; loss ½(x·θ − y)² from θ = 0."""
    with seeded(unit.seed):
        X = offset + scale * torch.randn(N, dim)
        y = X @ F.normalize(torch.randn(dim), dim=0) + 0.1 * torch.randn(N)
    model = nn.Linear(dim, 1, bias=False)
    nn.init.zeros_(model.weight)
    return Problem(model, half_square, TensorDataset(X, y))


def random_features(unit: Unit, N: int, hidden: int, dim: int, teacher: int, copies: float = 0.0) -> Problem:
    """A random-features classifier (Mei & Montanari 2019, arXiv:1908.05355): a fixed ReLU layer, then a trained one.

    Inputs are Gaussian [N, dim]; rows of all first and last layers have norm 1; an example's label says whether the
    output of a teacher of the same kind, with ``teacher`` hidden units, is above its mean. The data set holds what the
    fixed layer makes of the inputs. ``copies``: that share of the examples is 5 of the others, again and again.
    """
    with seeded(unit.seed):
        X = torch.randn(N, dim)
        first = [F.normalize(torch.randn(width, dim), dim=1) for width in (teacher, hidden)]
        output = F.relu(X @ first[0].T) @ F.normalize(torch.randn(teacher), dim=0)
        features = F.relu(X @ first[1].T)  # [N, hidden]
        model = nn.Linear(hidden, 2)
        with torch.no_grad():
            model.weight.copy_(F.normalize(torch.randn(2, hidden), dim=1))
    data = TensorDataset(features, (output > output.mean()).long())
    return Problem(model, cross_entropy, duplicated(data, 5, copies) if copies else data)


# Variations


def duplicated(data: TensorDataset, points: int, share: float) -> TensorDataset:
    """As many examples, of which the last ``share`` are copies of the first ``points``, equally often."""
    N = len(data)
    kept = max(points, N - round(share * N))
    index = torch.cat([torch.arange(kept), torch.arange(N - kept) % points])
    return TensorDataset(*(tensor[index] for tensor in data.tensors))


def corrupted(data: TensorDataset, share: float, seed: int, classes: int = 10) -> TensorDataset:
    """Labels of the first ``share`` of the examples drawn anew, uniformly (some come out right)."""
    inputs, labels = data.tensors
    count = round(share * len(labels))
    new = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, torch.cat([new, labels[count:]]))


def imbalanced(data: TensorDataset, shares: Sequence[float]) -> TensorDataset:
    """Keeps the first ``shares[c]`` of the examples of every class c."""
    inputs, labels = data.tensors
    kept = [(labels == c).nonzero().flatten() for c in range(len(shares))]
    index = torch.cat([rows[: round(share * len(rows))] for rows, share in zip(kept, shares)]).sort().values
    return TensorDataset(inputs[index], labels[index])


# Images, and a user's own


def classifier(
    unit: Unit,
    name: str,
    model: Callable[[], nn.Module],
    limit: int | None = None,
    change: Callable[[TensorDataset], TensorDataset] | None = None,
    tested: bool = True,
) -> Problem:
    """An image data set and a model, or the ones that ``--data module:factory`` and ``--model module:factory`` name.

    Args:
        name, limit: of ``gradclust_fast.data.load``.
        model: called after seeding with the unit's seed.
        change: applied to the training data (duplicates, corruption); not to data of one's own.
        tested: whether there is test data; accuracies are of the first 2000 test examples.
    """
    test: Dataset | None
    if unit.options.own_data:
        train, test = own_data(str(unit.options.data))
    else:
        loaded = datasets.load(name, "train", data=unit.options.data, limit=limit)
        train = loaded if change is None else change(loaded)
        test = datasets.load(name, "test", data=unit.options.data, limit=TEST) if tested else None
    with seeded(unit.seed):
        built = model() if unit.options.model is None else own_model(unit.options.model)
    return Problem(built, cross_entropy, train, test)


def own_data(spec: str) -> tuple[Dataset, Dataset | None]:
    """``module:factory`` → (training data, test data or None); the factory returns a data set or two."""
    made = _called(spec, "--data")
    train, test = made if isinstance(made, (tuple, list)) and len(made) == 2 else (made, None)
    if not hasattr(train, "__getitem__") or not hasattr(train, "__len__"):
        raise ValueError(
            f"--data {spec}: expected a map-style data set of (input, label), or two of them (training, test), got "
            f"{type(made).__name__}"
        )
    return train, test


def own_model(spec: str) -> nn.Module:
    made = _called(spec, "--model")
    if not isinstance(made, nn.Module):
        raise ValueError(f"--model {spec}: expected a torch.nn.Module, got {type(made).__name__}")
    return made


def _called(spec: str, option: str) -> Any:
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise ValueError(f"{option}: expected module:factory, as in my_project:build, got {spec!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command installed elsewhere does not see the user's own modules
    target = importlib.import_module(name)
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ValueError(f"{option} {spec}: {name} has no {attribute!r}")
        target = getattr(target, part)
    return target() if callable(target) and not isinstance(target, nn.Module) else target


def fetch(data: Dataset, index: Tensor, device: torch.device) -> tuple[Any, Any]:
    """(inputs, targets) of these examples."""
    if isinstance(data, TensorDataset):
        inputs, targets = (tensor[index] for tensor in data.tensors)
    else:
        inputs, targets = default_collate([data[i] for i in index.tolist()])
    return to_device((inputs, targets), device)


@torch.no_grad()
def evaluate(model: nn.Module, problem: Problem, data: Dataset, device: torch.device) -> tuple[float, float]:
    """(mean loss, accuracy; NaN where outputs are no classes) of the model in eval mode."""
    training, total, right, classes = model.training, 0.0, 0, True
    model.eval()
    N = len(data)  # type: ignore[arg-type]
    for index in torch.arange(N).split(1000):
        inputs, targets = fetch(data, index, device)
        output = model(inputs)
        total += float(problem.loss(output, targets).double().sum())
        classes = classes and targets.dtype == torch.int64 and output.dim() == 2
        right += int((output.argmax(1) == targets).sum()) if classes else 0
    model.train(training)
    return total / N, right / N if classes else float("nan")
