"""grad_dot against two matrix products and their elementwise product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def products(act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor):
    out = (act @ center_act.mT) * (grad @ center_grad.mT)
    return out.sum(1) if out.dim() == 3 else out


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(512, 128, 4096, 4096, 64, torch.bfloat16)
        yield case(512, 128, 4096, 4096, 1024, torch.bfloat16)
    for size in (
        (4096, 1, 1024, 1024, 64),
        (4096, 1, 256, 256, 256),
        (128, 64, 256, 256, 64),
        (1024, 4, 512, 512, 16),
        (32, 256, 1024, 1024, 512),
    ):
        yield case(*size, torch.float32)


def case(B: int, T: int, I: int, O: int, K: int, dtype: torch.dtype) -> Case:
    positions = () if T == 1 else (T,)
    act, grad = torch.randn(B, *positions, I, dtype=dtype), torch.randn(B, *positions, O, dtype=dtype)
    pair = torch.randn(K, O, dtype=dtype), torch.randn(K, I, dtype=dtype)
    return Case(
        "grad_dot",
        f"B={B} T={T} {I}→{O} K={K} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_dot(act, grad, *pair),
        {"(A Cᵀ)∘(G Dᵀ)": lambda: products(act, grad, *pair)},
        flops=2 * B * T * K * (I + O),
        bytes=act.element_size() * (B * T * (I + O) + K * (I + O)) + 4 * B * K,
        dtype=dtype,
    )
