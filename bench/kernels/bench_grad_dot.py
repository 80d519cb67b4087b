"""grad_dot against two matrix products and their elementwise product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def products(act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor):
    out = (act @ center_act.mT) * (grad @ center_grad.mT)
    return out.sum(1) if out.dim() == 3 else out


def cases() -> Iterator[Case]:
    for B, T, I, O, K in (
        (4096, 1, 1024, 1024, 64),
        (4096, 1, 256, 256, 256),
        (128, 64, 256, 256, 64),
        (1024, 4, 512, 512, 16),
        (32, 256, 1024, 1024, 512),
    ):
        positions = () if T == 1 else (T,)
        act, grad = torch.randn(B, *positions, I), torch.randn(B, *positions, O)
        pair = torch.randn(K, O), torch.randn(K, I)
        yield Case(
            "grad_dot",
            f"B={B} T={T} {I}→{O} K={K} float32",
            lambda act=act, grad=grad, pair=pair: gf.ops.grad_dot(act, grad, *pair),
            {"(A Cᵀ)∘(G Dᵀ)": lambda act=act, grad=grad, pair=pair: products(act, grad, *pair)},
            flops=2 * B * T * K * (I + O),
            bytes=4 * (B * T * (I + O) + K * (I + O) + B * K),
        )
