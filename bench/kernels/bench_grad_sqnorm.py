"""grad_sqnorm against the expressions a user would write."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case


def cases() -> Iterator[Case]:
    B, I, O = 16384, 1024, 1024
    act, grad = torch.randn(B, I), torch.randn(B, O)
    yield Case(
        "grad_sqnorm",
        f"T=1 B={B} {I}→{O} float32",
        lambda: gf.ops.grad_sqnorm(act, grad),
        {"vector_norm product": lambda: torch.linalg.vector_norm(act, dim=1) * torch.linalg.vector_norm(grad, dim=1)},
        flops=2 * B * (I + O),
        bytes=4 * B * (I + O + 1),
    )
