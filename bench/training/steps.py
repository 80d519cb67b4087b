"""One training step in every way that gives each example's gradient norm: ours, and the packages people use.

Every step zeroes ``.grad``, runs forward and backward, leaves ``.grad`` of the mean loss and returns ‖∇ℓ_b‖² [B].
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gradclust_fast as gf

from .models import Task

Step = Callable[[], Tensor]
REMEDY = "pip install --no-deps opacus backpack-for-pytorch einops unfoldNd opt_einsum"


def plain(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        task.loss(model, *batch).backward()

    return step


def recorded(
    task: Task, model: nn.Module, batch: tuple[Tensor, ...], sketch: gf.Sketch | None = None, *, fused: bool = False
) -> Step:
    def step() -> Tensor:
        model.zero_grad()
        with gf.record(model, sketch=sketch, fused=fused) as rec:
            task.loss(model, *batch).backward()
        return rec.sq_norms

    return step


def sketched(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> Step:
    return recorded(task, model, batch, gf.Sketch(dim=256))


def fused(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> Step:
    return recorded(task, model, batch, fused=True)


def opacus_ghost(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def step() -> Tensor:
        wrapped.zero_grad()
        task.loss(wrapped, *batch).backward()
        return wrapped.get_norm_sample().square()

    return step


def backpack_norms(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> Step:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(model)
    B = len(batch[0])

    def step() -> Tensor:
        model.zero_grad()
        with backpack(BatchL2Grad()):
            task.loss(model, *batch).backward()
        norms = torch.zeros(B)
        for name, p in model.named_parameters():
            if not hasattr(p, "batch_l2"):
                raise NotImplementedError(f"BatchL2Grad gave nothing for {name}")
            norms = norms + p.batch_l2
            del p.batch_l2
        return norms * B**2  # of the shares of a mean

    return step


def per_example_gradients(task: Task, model: nn.Module, batch: tuple[Tensor, ...]) -> Step:
    """``torch.func``: vmap of grad, then norms and the mean."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
        def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
            return functional_call(model, (parameters, buffers), args, kwargs)

        return task.loss(call, *(tensor.unsqueeze(0) for tensor in example))

    each = vmap(grad(loss), in_dims=(None, *(0 for _ in batch)))

    def step() -> Tensor:
        norms = torch.zeros(len(batch[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = each(parameters, *batch)
        for name, p in model.named_parameters():
            norms = norms + found[name].flatten(1).square().sum(1)
            p.grad = found.pop(name).mean(0)
        return norms

    return step


WAYS: dict[str, Callable[[Task, nn.Module, tuple[Tensor, ...]], Step]] = {
    "gf.record": recorded,
    "gf.record, fused": fused,
    "gf.record with a sketch": sketched,
    "Opacus ghost": opacus_ghost,
    "BackPACK": backpack_norms,
    "torch.func": per_example_gradients,
}
PACKAGES = {"Opacus ghost": "opacus", "BackPACK": "backpack"}
