"""grad_quantities against an expression for each, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu


def norms(act: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    if act.dim() == 2:
        return (torch.linalg.vector_norm(act, dim=1) * torch.linalg.vector_norm(grad, dim=1)).square()
    return ((act @ act.mT) * (grad @ grad.mT)).sum((1, 2))


def each(act: torch.Tensor, grad: torch.Tensor, aux: dict[str, torch.Tensor], sqnorm: bool):
    norm = norms(act, grad) if sqnorm else None
    dot = (act @ aux["center_act"].mT) * (grad @ aux["center_grad"].mT)
    left, right = grad @ aux["left"], act @ aux["right"]
    if act.dim() == 2:
        return norm, left.unsqueeze(2) * right.unsqueeze(1), dot
    return norm, left.mT @ right, dot.sum(1)


def cases() -> Iterator[Case]:
    if on_gpu():
        yield case(512, 128, 4096, 4096, 16, 16, 64, torch.bfloat16, sqnorm=False)
        yield case(512, 128, 4096, 4096, 16, 16, 64, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16) if on_gpu() else (torch.float32,):
        yield case(4096, 1, 1024, 1024, 16, 16, 64, dtype)
        yield case(64, 64, 256, 256, 16, 16, 64, dtype)


def case(
    B: int, T: int, I: int, O: int, P: int, Q: int, K: int, dtype: torch.dtype, *, sqnorm: bool = True
) -> Case:  # fmt: skip
    positions = () if T == 1 else (T,)
    act, grad = torch.randn(B, *positions, I, dtype=dtype), torch.randn(B, *positions, O, dtype=dtype)
    aux = {
        "left": torch.randn(O, P, dtype=dtype),
        "right": torch.randn(I, Q, dtype=dtype),
        "center_grad": torch.randn(K, O, dtype=dtype),
        "center_act": torch.randn(K, I, dtype=dtype),
    }
    norm_flops = 0 if not sqnorm else 2 * (I + O) if T == 1 else T * (T + 1) * (I + O)
    return Case(
        "grad_quantities",
        f"B={B} T={T} {I}→{O} {'norm, ' * sqnorm}sketch {P}×{Q}, dot K={K} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_quantities(act, grad, sqnorm=sqnorm, **aux),
        {f"{'three' if sqnorm else 'two'} expressions": lambda: each(act, grad, aux, sqnorm)},
        flops=B * (norm_flops + 2 * T * (O * P + I * Q + P * Q + K * (I + O))),
        bytes=act.element_size() * B * T * (I + O) + 4 * B * (sqnorm + P * Q + K),
        dtype=dtype,
    )
