"""Cheapest cluster of every example."""

from __future__ import annotations

import torch


def assign(
    dot: torch.Tensor, center_sqnorm: torch.Tensor, grad_sqnorm: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin_k w_k(‖C_k‖² − 2⟨C_k, G_b⟩ + ‖G_b‖²); ``argmin`` takes the first NaN, else the first smallest."""
    acc = torch.float64 if dot.dtype == torch.float64 else torch.float32
    cost = center_sqnorm.to(acc) - 2 * dot.to(acc) + grad_sqnorm.to(acc).unsqueeze(1)  # [B, K]
    if counts is not None:
        cost = cost * (counts.to(acc) + 1)
    label = cost.argmin(1)  # [B]
    return label, cost.gather(1, label.unsqueeze(1)).squeeze(1)
