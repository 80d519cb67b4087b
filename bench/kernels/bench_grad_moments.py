"""grad_moments against two matrix products (one position), or stored gradients (sequences)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def rank1(act: torch.Tensor, grad: torch.Tensor):
    act, grad = act[:, 0], grad[:, 0]
    return grad.mT @ act, grad.square().mT @ act.square()


def stored(act: torch.Tensor, grad: torch.Tensor):
    G = grad.mT @ act
    return G.sum(0), G.square().sum(0)


def cases() -> Iterator[Case]:
    for B, T, I, O in ((4096, 1, 1024, 1024), (512, 1, 128, 128), (64, 8, 256, 256), (64, 64, 256, 256)):
        act, grad = torch.randn(B, T, I), torch.randn(B, T, O)
        expression = rank1 if T == 1 else stored
        yield Case(
            "grad_moments",
            f"B={B} T={T} {I}→{O} float32",
            lambda act=act, grad=grad: gf.ops.grad_moments(act, grad),
            {
                "two products" if T == 1 else "stored G": lambda act=act, grad=grad, run=expression: run(act, grad),
            },
            flops=(4 if T == 1 else 2 * T + 3) * B * I * O,
            bytes=4 * (B * T * (I + O) + 2 * I * O),
        )
