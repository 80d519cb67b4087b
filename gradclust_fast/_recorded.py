"""What clustering and sampler take from a recorded training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import check_finite, check_index
from .recording import record
from .sketching import Sketch


def recorded_points(
    rec: record, index: Any, N: int, weights: Any, group: Any, sketch: Sketch | None = None
) -> tuple[Tensor, Tensor]:
    """(sketches [B, R] of the unweighted losses' gradients, index [B]) of a record, on the CPU; checked.

    With a process group those of all ranks, rank by rank, the same on every rank; where one rank's do not pass, all
    ranks raise, and nobody waits.

    Args:
        weights: [B], or a function of the index that returns them, or None.
    """
    if group is None:
        return _own(rec, index, N, weights, sketch)
    own, failed = None, None
    try:
        own = _own(rec, index, N, weights, sketch)
    except Exception as error:  # the other ranks wait for this one's part
        failed = error
    everyone: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyone, own, group=group)
    if failed is not None:
        raise failed
    missing = [rank for rank, part in enumerate(everyone) if part is None]
    if missing:
        raise RuntimeError(f"rank {missing[0]} of the group could not give its examples; see its error")
    points, indices = (torch.cat([part[i] for part in everyone]) for i in (0, 1))
    return points, indices


def _own(rec: record, index: Any, N: int, weights: Any, sketch: Sketch | None) -> tuple[Tensor, Tensor]:
    if not isinstance(rec, record):
        raise TypeError(f"rec must be a gf.record that has seen the step's backward, got {type(rec).__name__}")
    if sketch is not None and rec.sketch != sketch:
        raise ValueError(
            f"rec was opened with sketch={rec.sketch!r}, the clustering has {sketch!r}; their inner products have "
            f"nothing in common: open it with gf.record(model, sketch=clustering.sketch)"
        )
    if rec.sketch is None:
        raise ValueError("rec has no sketches; open it with gf.record(model, sketch=gf.Sketch(dim=64))")
    points = rec.sketches.detach().cpu()
    index = check_index(torch.as_tensor(index).detach().cpu(), N).long()
    if index.shape != (len(points),):
        raise ValueError(
            f"index must be [{len(points)}], one data-set index per example of the record, got {list(index.shape)}"
        )
    if weights is not None:
        weights = torch.as_tensor(weights(index) if callable(weights) else weights).detach().cpu()
        if weights.shape != index.shape:
            raise ValueError(f"weights must be [{len(index)}] like index, got {list(weights.shape)}")
        if not bool((weights.isfinite() & (weights > 0)).all()):
            raise ValueError("weights must be finite and positive, as sampler.weights(index) gives them")
        points = points / weights.to(points.dtype)[:, None]
    check_finite("the gradient", points, index)
    return points, index
