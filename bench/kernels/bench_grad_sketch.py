"""grad_sketch against projecting both factors and multiplying."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def products(act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None):
    if act.dim() == 2:
        act, grad = act.unsqueeze(1), grad.unsqueeze(1)
    return (grad if left is None else grad @ left).mT @ (act if right is None else act @ right)


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(512, 128, 4096, 4096, 16, 16, torch.bfloat16)
    for size in (
        (4096, 1, 1024, 1024, 16, 16),
        (256, 1, 784, 10, None, 32),
        (128, 64, 256, 256, 32, 32),
        (16, 512, 512, 512, 16, 16),
        (1024, 1, 32, 32, None, None),
    ):
        yield case(*size, torch.float32)


def case(B: int, T: int, I: int, O: int, P: int | None, Q: int | None, dtype: torch.dtype) -> Case:
    positions = () if T == 1 else (T,)
    act, grad = torch.randn(B, *positions, I, dtype=dtype), torch.randn(B, *positions, O, dtype=dtype)
    left = None if P is None else torch.randn(O, P, dtype=dtype)
    right = None if Q is None else torch.randn(I, Q, dtype=dtype)
    flops = (0 if P is None else O * P) + (0 if Q is None else I * Q) + (P or O) * (Q or I)
    return Case(
        "grad_sketch",
        f"B={B} T={T} {I}→{O} P={P or 'O'} Q={Q or 'I'} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_sketch(act, grad, left, right),
        {"(G left)ᵀ (A right)": lambda: products(act, grad, left, right)},
        flops=2 * B * T * flops,
        bytes=act.element_size() * B * T * (I + O) + 4 * B * (P or O) * (Q or I),
        dtype=dtype,
    )
