"""norm_grads against normalising again, multiplying and adding up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import gradclust_fast as gf
from bench.harness import Case


def rows(input: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (grad * F.layer_norm(input, input.shape[2:])).sum(1), grad.sum(1)


def channels(input: torch.Tensor, grad: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (grad * F.group_norm(input, groups)).sum((2, 3)), grad.sum((2, 3))


def cases() -> Iterator[Case]:
    for B, T, D in ((16, 128, 256), (8, 512, 768)):
        input, grad = torch.randn(B, T, D), torch.randn(B, T, D)
        yield Case(
            "norm_grads",
            f"B={B} T={T} D={D} float32",
            lambda input=input, grad=grad: gf.ops.norm_grads(input, grad),
            {"layer_norm, product, sums": lambda input=input, grad=grad: rows(input, grad)},
            bytes=2 * input.nbytes,
        )
    for B, C, side in ((128, 16, 32), (128, 64, 8)):
        input, grad = torch.randn(B, C, side, side), torch.randn(B, C, side, side)
        yield Case(
            "norm_grads",
            f"B={B} C={C} {side}×{side} groups 8 float32",
            lambda input=input, grad=grad: gf.ops.norm_grads(input, grad, groups=8),
            {"group_norm, product, sums": lambda input=input, grad=grad: channels(input, grad, 8)},
            bytes=2 * input.nbytes,
        )
