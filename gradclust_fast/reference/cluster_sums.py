"""Sums and sizes of clusters."""

from __future__ import annotations

import torch


def cluster_sums(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_{i in k} x_i and N_k. Rows are added in float64 and in ascending order: the same bits on every run."""
    counts = torch.bincount(labels, minlength=num_clusters)  # [K]
    rows = points.double()
    if points.device.type == "cpu":
        sums = rows.new_zeros(num_clusters, points.shape[1]).index_add_(0, labels, rows)  # [K, R]
    else:  # index_add_ is atomic here: its order, and so its last bits, would change from run to run
        rows = rows[labels.argsort(stable=True)]
        sums = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, initial=0)  # [K, R]
    return sums.to(torch.float64 if points.dtype == torch.float64 else torch.float32), counts
