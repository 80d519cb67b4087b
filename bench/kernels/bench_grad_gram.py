"""grad_gram against the two Gram matrices, or the product of stored gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def gram(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    B, T = act.shape[:2]
    act, grad = act.flatten(0, 1), grad.flatten(0, 1)
    return ((act @ act.mT) * (grad @ grad.mT)).reshape(B, T, B, T).sum((1, 3))


def stored(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    G = (grad.mT @ act).flatten(1)
    return G @ G.mT


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(64, 128, 2048, 2048, torch.bfloat16)
    for size in ((2048, 1, 512, 512), (256, 1, 128, 64), (128, 8, 256, 256), (16, 256, 128, 128)):
        yield case(*size, torch.float32)


def case(B: int, T: int, I: int, O: int, dtype: torch.dtype) -> Case:
    act, grad = torch.randn(B, T, I, dtype=dtype), torch.randn(B, T, O, dtype=dtype)
    return Case(
        "grad_gram",
        f"B={B} T={T} {I}→{O} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_gram(act, grad),
        {
            "two Gram matrices": lambda: gram(act, grad),
            **({"stored G": lambda: stored(act, grad)} if T > 1 else {}),
        },
        flops=min(B * T * (B * T + 1) * (I + O), 2 * B * T * I * O + 2 * B * B * I * O),
        bytes=act.element_size() * B * T * (I + O) + 4 * B * B,
        dtype=dtype,
    )
