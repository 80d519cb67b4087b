"""Argument checks shared by the ops. Every message names the argument, what was expected, what came, the remedy."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def check_factors(act: torch.Tensor, grad: torch.Tensor) -> None:
    """act [B, *, I] and grad [B, *, O]: same B, same position dimensions, dtype and device."""
    for name, tensor in (("act", act), ("grad", grad)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; cast it first")
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must be [B, *, features], got {shape(tensor)}; add the batch dimension with unsqueeze(0)"
            )
    if act.shape[:-1] != grad.shape[:-1]:
        raise ValueError(
            f"act must be [B, *, I] with [B, *] = {list(grad.shape[:-1])} (from grad), got {shape(act)}; "
            f"pass the same batch and positions to both"
        )
    check_like("grad", grad, act)


def check_like(name: str, tensor: torch.Tensor, act: torch.Tensor) -> None:
    """Same dtype and device as act."""
    if tensor.dtype != act.dtype:
        raise TypeError(f"{name} must be {act.dtype} like act, got {tensor.dtype}; cast one of them")
    if tensor.device != act.device:
        raise ValueError(f"{name} must be on {act.device} like act, got {tensor.device}; move one of them")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[B, *, F] → [B, T, F] with feature stride 1: a view where the strides allow it, else a copy."""
    B, F = tensor.shape[0], tensor.shape[-1]
    T = tensor.shape[1:-1].numel()
    rows = tensor.reshape(B, T, F)
    return rows if rows.stride(2) == 1 or F <= 1 else rows.contiguous()
