"""grad_gram against the two Gram matrices, or the product of stored gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def gram(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    B, T = act.shape[:2]
    act, grad = act.flatten(0, 1), grad.flatten(0, 1)
    return ((act @ act.mT) * (grad @ grad.mT)).reshape(B, T, B, T).sum((1, 3))


def stored(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    G = (grad.mT @ act).flatten(1)
    return G @ G.mT


def cases() -> Iterator[Case]:
    for B, T, I, O in ((2048, 1, 512, 512), (256, 1, 128, 64), (128, 8, 256, 256), (16, 256, 128, 128)):
        act, grad = torch.randn(B, T, I), torch.randn(B, T, O)
        yield Case(
            "grad_gram",
            f"B={B} T={T} {I}→{O} float32",
            lambda act=act, grad=grad: gf.ops.grad_gram(act, grad),
            {
                "two Gram matrices": lambda act=act, grad=grad: gram(act, grad),
                **({"stored G": lambda act=act, grad=grad: stored(act, grad)} if T > 1 else {}),
            },
            flops=min(B * T * (B * T + 1) * (I + O), 2 * B * T * I * O + 2 * B * B * I * O),
            bytes=4 * (B * T * (I + O) + B * B),
        )
