"""``Strata``: a partition of a data set, and what was measured about it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._arguments import integer


class Strata:
    """A partition of N examples into K strata (clusters), some of which may be empty.

    Args:
        labels: [N] integers in ``0..num_clusters - 1``, the stratum of every example.
        num_clusters: K.
        variance: [K], ``V_k = N_k⁻¹ Σ_{i∈k} ‖g_i − c_k‖²`` in the units of gradient squared; what ``"neyman"``
            allocation and ``predicted_variance()`` need. 0 for empty strata.
        means: [K, R], the strata's mean gradients c_k or sketches of them; what ``predicted_variance()`` needs when
            a batch has fewer examples than there are strata.

    Attributes:
        labels: [N] int64 on the CPU. counts: [K] int64, the sizes N_k. variance, means: float64 or None.

    Raises:
        ValueError, TypeError: labels that are not integers or out of range (named with their index), statistics of the
            wrong shape, negative or not finite.

    Source:
        The guide's "stratified mini-batches"; Faghri et al. 2020, arXiv:2007.04532, section 3.

    Example:
        >>> strata = gf.Strata([0, 0, 1, 2], num_clusters=3)
        >>> strata.counts.tolist()
        [2, 1, 1]
    """

    def __init__(
        self, labels: Any, num_clusters: int, *, variance: Any | None = None, means: Any | None = None
    ) -> None:
        num_clusters = integer("num_clusters", num_clusters, 1)
        try:
            labels = torch.as_tensor(labels).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"labels must be [N] integers, got {type(labels).__name__}: {error}") from error
        if labels.dim() != 1:
            raise ValueError(f"labels must be [N], got {list(labels.shape)}; pass one integer per example")
        if not len(labels):
            raise ValueError("labels is empty; a data set needs at least one example to be stratified")
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels must be integers, got {labels.dtype}; convert them with .long()")
        labels = labels.to("cpu", torch.int64, copy=True)
        outside = ((labels < 0) | (labels >= num_clusters)).nonzero()
        if len(outside):
            i = int(outside[0])
            raise ValueError(
                f"labels[{i}] is {int(labels[i])}, outside 0..{num_clusters - 1}; pass num_clusters > every label"
            )
        self.labels = labels
        self.counts = torch.bincount(labels, minlength=num_clusters)  # [K]
        self.variance = _statistic("variance", variance, (num_clusters,))
        if self.variance is not None and bool((self.variance < 0).any()):
            k = int((self.variance < 0).nonzero()[0])
            raise ValueError(f"variance[{k}] is {float(self.variance[k])}; a variance cannot be negative")
        self.means = _statistic("means", means, (num_clusters, None))

    @classmethod
    def from_points(cls, points: Tensor, labels: Any, num_clusters: int) -> Strata:
        """Strata with their statistics, from one row per example.

        Args:
            points: [N, R], gradients or sketches of them; any device and floating dtype, summed in float64.
            labels, num_clusters: as for :class:`Strata`.

        Raises:
            ValueError: for points that are not [N, R] or not finite.

        Example:
            >>> strata = gf.Strata.from_points(torch.tensor([[0.0], [2.0], [5.0]]), [0, 0, 1], 2)
            >>> strata.variance.tolist(), strata.distortion
            ([1.0, 0.0], 4.0)
        """
        strata, points = cls(labels, num_clusters), torch.as_tensor(points).detach()
        N, K = len(strata.labels), num_clusters
        if points.dim() != 2 or len(points) != N:
            raise ValueError(f"points must be [N, R] with N={N} (from labels), got {list(points.shape)}")
        on = strata.labels.to(points.device)
        order = on.argsort(stable=True)
        counts = strata.counts.clamp(min=1).unsqueeze(1).to(points.device)
        means = points.new_zeros(K, points.shape[1], dtype=torch.float64)  # [K, R]
        squares = points.new_zeros(K, dtype=torch.float64)  # [K]
        for rows in order.split(65536):  # bounds the float64 copies
            means.index_add_(0, on[rows], points[rows].double())
        means /= counts
        for rows in order.split(65536):
            # deviations before squares: Q_k − ‖s_k‖²/N_k would cancel for tight clusters
            squares.index_add_(0, on[rows], (points[rows].double() - means[on[rows]]).square().sum(1))
        return cls(strata.labels, K, variance=squares / counts.squeeze(1), means=means)

    def __len__(self) -> int:
        """N, the number of examples."""
        return len(self.labels)

    @property
    def num_clusters(self) -> int:
        """K, empty strata included."""
        return len(self.counts)

    @property
    def distortion(self) -> float:
        """J = Σ_k N_k S_k = Σ_k N_k² V_k; J/N² is the variance of one draw from every stratum."""
        if self.variance is None:
            raise ValueError(NO_VARIANCE)
        return float((self.counts.double().square() * self.variance).sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers for ``torch.save``; :meth:`from_state_dict` is the inverse."""
        return {
            "labels": self.labels.clone(),
            "num_clusters": self.num_clusters,
            "variance": None if self.variance is None else self.variance.clone(),
            "means": None if self.means is None else self.means.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces labels and statistics by a saved state's. A sampler that holds these strata keeps its old ones."""
        self.__dict__.update(Strata.from_state_dict(state).__dict__)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Strata:
        """Strata from :meth:`state_dict`'s result."""
        missing = {"labels", "num_clusters"} - set(state)
        if missing:
            raise ValueError(f"state has no {sorted(missing)}; pass what Strata.state_dict() returned")
        return cls(state["labels"], state["num_clusters"], variance=state.get("variance"), means=state.get("means"))

    def __repr__(self) -> str:
        sizes = self.counts[self.counts > 0]
        return (
            f"Strata({len(self)} examples in {len(sizes)} of {self.num_clusters} clusters of "
            f"{int(sizes.min())} to {int(sizes.max())})"
        )


NO_VARIANCE = (
    "these strata carry no variances; use the strata that GradientClustering.fit returns, build them with "
    "Strata.from_points(sketches, labels, num_clusters), or pass Strata(..., variance=)"
)


def _statistic(name: str, value: Any | None, shape: tuple[int | None, ...]) -> Tensor | None:
    if value is None:
        return None
    value = torch.as_tensor(value).detach().to("cpu", torch.float64, copy=True)
    fits = value.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape))
    if not fits:
        wanted = ", ".join("R" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}] (one row per cluster), got {list(value.shape)}")
    if not value.isfinite().all():
        k = int((~value.isfinite()).nonzero()[0][0])
        raise ValueError(f"{name}[{k}] is not finite; repair the gradients it was computed from")
    return value
