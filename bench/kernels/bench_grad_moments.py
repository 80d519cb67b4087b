"""grad_moments against two matrix products (one position), or stored gradients (sequences)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def rank1(act: torch.Tensor, grad: torch.Tensor):
    act, grad = act[:, 0], grad[:, 0]
    return grad.mT @ act, grad.square().mT @ act.square()


def stored(act: torch.Tensor, grad: torch.Tensor):
    G = grad.mT @ act
    return G.sum(0), G.square().sum(0)


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(32, 256, 2048, 2048, torch.bfloat16)
    for size in ((4096, 1, 1024, 1024), (512, 1, 128, 128), (64, 8, 256, 256), (64, 64, 256, 256)):
        yield case(*size, torch.float32)


def case(B: int, T: int, I: int, O: int, dtype: torch.dtype) -> Case:
    act, grad = torch.randn(B, T, I, dtype=dtype), torch.randn(B, T, O, dtype=dtype)
    expression = rank1 if T == 1 else stored
    return Case(
        "grad_moments",
        f"B={B} T={T} {I}→{O} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_moments(act, grad),
        {"two products" if T == 1 else "stored G": lambda: expression(act, grad)},
        flops=(4 if T == 1 else 2 * T + 3) * B * I * O,
        bytes=act.element_size() * B * T * (I + O) + 8 * I * O,
        dtype=dtype,
    )
