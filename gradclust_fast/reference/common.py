"""Shared by the reference paths."""

from __future__ import annotations

import torch


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """[B, *, F] → [B, T, F] in the accumulator's dtype: float64 stays, everything else becomes float32."""
    rows = tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def project_act(act: torch.Tensor, right: torch.Tensor | None, bias: bool) -> torch.Tensor:
    """[act, 1 if bias] @ right for act [B, T, I]; None is the identity."""
    if right is None:
        return torch.cat([act, act.new_ones(*act.shape[:-1], 1)], -1) if bias else act
    right = right.to(act.dtype)
    return act @ right[:-1] + right[-1] if bias else act @ right
