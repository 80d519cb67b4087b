"""grad_quantities against the three expressions one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def norms(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    if act.dim() == 2:
        return (torch.linalg.vector_norm(act, dim=1) * torch.linalg.vector_norm(grad, dim=1)).square()
    return ((act @ act.mT) * (grad @ grad.mT)).sum((1, 2))


def three(act: torch.Tensor, grad: torch.Tensor, aux: dict[str, torch.Tensor]):
    dot = (act @ aux["center_act"].mT) * (grad @ aux["center_grad"].mT)
    left, right = grad @ aux["left"], act @ aux["right"]
    if act.dim() == 2:
        return norms(act, grad), left.unsqueeze(2) * right.unsqueeze(1), dot
    return norms(act, grad), left.mT @ right, dot.sum(1)


def cases() -> Iterator[Case]:
    for B, T, I, O, P, Q, K in ((4096, 1, 1024, 1024, 16, 16, 64), (64, 64, 256, 256, 16, 16, 64)):
        positions = () if T == 1 else (T,)
        act, grad = torch.randn(B, *positions, I), torch.randn(B, *positions, O)
        aux = {
            "left": torch.randn(O, P),
            "right": torch.randn(I, Q),
            "center_grad": torch.randn(K, O),
            "center_act": torch.randn(K, I),
        }
        norm_flops = 2 * (I + O) if T == 1 else T * (T + 1) * (I + O)
        yield Case(
            "grad_quantities",
            f"B={B} T={T} {I}→{O} norm, sketch {P}×{Q}, dot K={K} float32",
            lambda act=act, grad=grad, aux=aux: gf.ops.grad_quantities(act, grad, sqnorm=True, **aux),
            {"three expressions": lambda act=act, grad=grad, aux=aux: three(act, grad, aux)},
            flops=B * (norm_flops + 2 * T * (O * P + I * Q + P * Q + K * (I + O))),
            bytes=4 * (B * T * (I + O) + B * (1 + P * Q + K)),
        )
