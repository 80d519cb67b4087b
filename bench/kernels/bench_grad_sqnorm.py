"""grad_sqnorm against the expressions a user would write."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def gram(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return ((act @ act.mT) * (grad @ grad.mT)).sum((1, 2))


def direct(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return (grad.mT @ act).square().sum((1, 2))


def cases() -> Iterator[Case]:
    B, I, O = 262144 if on_gpu() else 16384, 1024, 1024
    act, grad = torch.randn(B, I), torch.randn(B, O)
    yield Case(
        "grad_sqnorm",
        f"T=1 B={B} {I}→{O} float32",
        lambda: gf.ops.grad_sqnorm(act, grad),
        {
            "vector_norm product": lambda: (
                torch.linalg.vector_norm(act, dim=1) * torch.linalg.vector_norm(grad, dim=1)
            ).square()
        },
        flops=2 * B * (I + O),
        bytes=4 * B * (I + O + 1),
    )
    if on_gpu():
        yield sequence_case(32, 1024, 4096, 4096, torch.bfloat16)
        yield sequence_case(1, 256, 4096, 4096, torch.bfloat16)  # too few tiles for a GPU: their depth is split
        yield sequence_case(1, 65_536, 64, 64, torch.bfloat16)
    for B, T, I, O in ((32, 256, 512, 512), (256, 8, 512, 512), (64, 32, 1024, 256), (16, 512, 64, 64)):
        for dtype in (torch.float32, torch.bfloat16):
            yield sequence_case(B, T, I, O, dtype)


def sequence_case(B: int, T: int, I: int, O: int, dtype: torch.dtype) -> Case:
    act, grad = torch.randn(B, T, I).to(dtype), torch.randn(B, T, O).to(dtype)
    wide_act, wide_grad = act.float(), grad.float()
    return Case(
        "grad_sqnorm",
        f"B={B} T={T} {I}→{O} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_sqnorm(act, grad),
        {
            "Gram sum in float32": lambda: gram(wide_act, wide_grad),
            "direct in float32": lambda: direct(wide_act, wide_grad),
        },
        flops=B * min(T * (T + 1) * (I + O), 2 * T * I * O),
        bytes=act.element_size() * B * T * (I + O) + 4 * B,
    )
