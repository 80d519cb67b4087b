"""Cheapest cluster of every dense row."""

from __future__ import annotations

import torch

CHUNK = 1 << 22
"""Distances held at once."""


def assign_points(
    points: torch.Tensor, centers: torch.Tensor, counts: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """argmin_k w_k‖x − c_k‖² from differences in float64: equal rows are at distance 0, equal centres tie exactly."""
    B, K = points.shape[0], centers.shape[0]
    label = torch.empty(B, dtype=torch.int64, device=points.device)
    cost = points.new_empty(B, dtype=torch.float64 if points.dtype == torch.float64 else torch.float32)
    weight = None if counts is None else counts.double() + 1  # [K]
    centers = centers.double()
    rows = max(1, CHUNK // K)
    for begin in range(0, B, rows):
        chunk = points[begin : begin + rows].double()
        if weight is None:  # equal distances stay equal under the square root that cdist takes
            dist = torch.cdist(chunk, centers, compute_mode="donot_use_mm_for_euclid_dist").square()  # [rows, K]
        else:
            # 2 · 1² and 1 · √2² must tie, so there must be no root to round. One feature at a time bounds the memory.
            dist = chunk.new_zeros(len(chunk), K)  # [rows, K]
            for x, c in zip(chunk.unbind(1), centers.unbind(1)):
                dist += (x.unsqueeze(1) - c).square_()
            dist *= weight
        index = dist.argmin(1)
        label[begin : begin + rows] = index
        cost[begin : begin + rows] = dist.gather(1, index.unsqueeze(1)).squeeze(1)
    return label, cost
