"""grad_sketch against projecting both factors and multiplying."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def products(act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None):
    if act.dim() == 2:
        act, grad = act.unsqueeze(1), grad.unsqueeze(1)
    return (grad if left is None else grad @ left).mT @ (act if right is None else act @ right)


def cases() -> Iterator[Case]:
    for B, T, I, O, P, Q in (
        (4096, 1, 1024, 1024, 16, 16),
        (256, 1, 784, 10, None, 32),
        (128, 64, 256, 256, 32, 32),
        (16, 512, 512, 512, 16, 16),
        (1024, 1, 32, 32, None, None),
    ):
        positions = () if T == 1 else (T,)
        act, grad = torch.randn(B, *positions, I), torch.randn(B, *positions, O)
        left = None if P is None else torch.randn(O, P)
        right = None if Q is None else torch.randn(I, Q)
        flops = (0 if P is None else O * P) + (0 if Q is None else I * Q) + (P or O) * (Q or I)
        yield Case(
            "grad_sketch",
            f"B={B} T={T} {I}→{O} P={P or 'O'} Q={Q or 'I'} float32",
            lambda args=(act, grad, left, right): gf.ops.grad_sketch(*args),
            {"(G left)ᵀ (A right)": lambda args=(act, grad, left, right): products(*args)},
            flops=2 * B * T * flops,
            bytes=4 * (B * T * (I + O) + B * (P or O) * (Q or I)),
        )
