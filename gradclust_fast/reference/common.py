"""Shared by the reference paths."""

from __future__ import annotations

import torch


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """[B, *, F] → [B, T, F] in the accumulator's dtype: float64 stays, everything else becomes float32."""
    rows = tensor.reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()
