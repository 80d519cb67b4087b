"""Shared by the reference paths."""

from __future__ import annotations

import torch


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """[B, *, F] → [B, T, F] in the accumulator's dtype: float64 stays, everything else becomes float32."""
    rows = tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def sums(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_t rows[b, t] and the mean over t, [B, 1, F] each. Added in float64: where rows nearly cancel, the rounding of a
    float32 sum would be most of what is left."""
    total = rows.sum(1, keepdim=True, dtype=torch.float64)
    return total.to(rows.dtype), (total / max(1, rows.shape[1])).to(rows.dtype)


def project_act(act: torch.Tensor, right: torch.Tensor | None, bias: bool) -> torch.Tensor:
    """[act, 1 if bias] @ right for act [B, T, I]; None is the identity."""
    if right is None:
        return torch.cat([act, act.new_ones(*act.shape[:-1], 1)], -1) if bias else act
    right = right.to(act.dtype)
    return act @ right[:-1] + right[-1] if bias else act @ right
