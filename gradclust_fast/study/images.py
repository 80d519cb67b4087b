"""CIFAR-10 as the rows train on it: how many examples, how large, duplicated or with wrong labels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch.utils.data import TensorDataset

from .. import data as datasets
from .problems import Problem, classifier, corrupted, cross_entropy, duplicated, own_model, resnet8, seeded
from .row import Variant
from .trajectory import Trajectory
from .unit import Unit

SIZES: dict[str, dict[str, Any]] = {
    "small": {"limit": 1500, "pool": 2, "width": 8},
    "paper": {"limit": 5000, "pool": 1, "width": 16},
}
"""Examples, how many pixels a side are averaged into one, and channels of the ResNet8's first stage."""


def cifar(
    unit: Unit,
    limit: int,
    pool: int,
    width: int,
    wrong: float = 0.0,
    points: int = 0,
    share: float = 0.0,
    tested: bool = True,
) -> Problem:
    """ResNet8 without norm layers on CIFAR-10, without augmentation.

    Args:
        wrong: share of the labels drawn anew.
        points, share: that share of the examples is copies of the first ``points``.
        tested: whether there is test data, 1000 images of it.
    """
    model = partial(resnet8, width=width)
    if unit.options.own_data:
        return classifier(unit, "cifar10", model)
    train = datasets.load("cifar10", "train", data=unit.options.data, limit=limit)
    train = duplicated(train, points, share) if points else train
    train = corrupted(train, wrong, unit.seed) if wrong else train
    test = datasets.load("cifar10", "test", data=unit.options.data, limit=1000) if tested else None
    with seeded(unit.seed):
        built = model() if unit.options.model is None else own_model(unit.options.model)
    return Problem(built, cross_entropy, pooled(train, pool), None if test is None else pooled(test, pool))


def pooled(data: TensorDataset, pool: int) -> TensorDataset:
    """pool × pool pixels averaged into one."""
    images, labels = data.tensors
    return TensorDataset(F.avg_pool2d(images, pool), labels) if pool > 1 else data


def variant(name: str, scale: str, wrong: float = 0.0) -> Variant:
    """The trajectory that R7 and R9 measure: one learning rate drop, a snapshot every so many steps."""
    small = scale == "small"
    steps, drop, every = (600, 400, 150) if small else (2400, 1600, 500)
    ends = (*range(every, steps, every), steps)
    size: dict[str, Any] = {**SIZES[scale], "wrong": wrong}
    methods: tuple[str, ...] = ("SG-B", "SG-2B", "GC exact", "GC guarded")
    if not wrong:
        methods += ("SVRG",) if small else ("SVRG", "GC+SVRG")
    if not small:
        methods += ("GC factored",)
    plan = Trajectory(
        problem=partial(cifar, **size),
        steps=steps,
        batch_size=128,
        lr=0.02,
        momentum=0.9,
        drops=((drop, 0.002),),
        snapshots=tuple(range(0, steps, every)),
        measure=tuple(range(drop, steps, 100 if small else 50)),
        methods=methods,
        monte_carlo=20 if small else 100,
        monte_carlo_at=(steps,),
        stats_batch=500,
        rare=("SVRG",) if small else (),
        rare_at=ends[1::2],
    )
    return Variant("cifar", name, {"data": name, "drop": drop}, plan, size, needs=("cifar10",))


def clean(scale: str) -> Variant:
    return variant("as it is", scale)


def corrupt(scale: str) -> Variant:
    return variant("20 % of the labels wrong", scale, wrong=0.2)
