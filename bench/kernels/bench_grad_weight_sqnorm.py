"""grad_weight_sqnorm against the library's product for the weight gradient alone, and that product with our norms."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu

GPU_SIZES = ((32, 1024, 4096, 4096), (8, 1024, 768, 3072), (64, 197, 768, 768))
SIZES = ((32, 256, 512, 512), (16, 128, 256, 1024))


def cases() -> Iterator[Case]:
    for size in GPU_SIZES if on_gpu() else SIZES:
        # A CPU without bfloat16 products takes minutes for torch's own.
        yield case(*size, torch.bfloat16 if on_gpu() else torch.float32)


def case(B: int, T: int, I: int, O: int, dtype: torch.dtype) -> Case:
    act, grad = torch.randn(B, T, I).to(dtype), torch.randn(B, T, O).to(dtype)

    def product() -> torch.Tensor:
        return grad.flatten(0, 1).mT @ act.flatten(0, 1)

    return Case(
        "grad_weight_sqnorm",
        f"B={B} T={T} {I}→{O} {str(dtype).removeprefix('torch.')}",
        lambda: gf.ops.grad_weight_sqnorm(act, grad, dtype=dtype),
        {
            "product alone (no norms)": product,
            "product, then grad_sqnorm": lambda: (product(), gf.ops.grad_sqnorm(act, grad)),
        },
        flops=2 * B * T * I * O,
        bytes=act.element_size() * (B * T * (I + O) + I * O) + 4 * B,
        dtype=dtype,
    )
