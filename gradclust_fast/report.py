"""What ``compare_estimators`` found, as rows, a table and a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, SupportsIndex, overload

from ._files import write_atomically
from .monte_carlo import MonteCarlo

if TYPE_CHECKING:
    from .variance import GradientStats


@dataclass
class EstimatorRow:
    """One estimator.

    Attributes:
        variance: E‖ĝ − ḡ‖², exact, in the units of gradient squared. variance_per_coordinate: over the number of
            coordinates. between_strata: the part of it that comes from drawing strata (batches below their number).
        normalized_variance: V[ĝ_j]/E[ĝ_j²] averaged over coordinates, ``left_out`` of which have E[ĝ_j²] = 0.
        aggregate_normalized_variance: V[ĝ]/E‖ĝ‖².
        ratio: variance over the first row's.
        gradients_per_step: per-example gradients that a step computes.
        monte_carlo: the same from repeated mini-batches, or None.
    """

    name: str
    batch_size: int
    gradients_per_step: int
    variance: float
    variance_per_coordinate: float
    between_strata: float
    normalized_variance: float
    left_out: int
    aggregate_normalized_variance: float
    ratio: float = 1.0
    monte_carlo: MonteCarlo | None = None

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Flat, for a CSV row; Monte Carlo entries are None when there was none."""
        flat = {key: value for key, value in vars(self).items() if key != "monte_carlo"}
        for key in MonteCarlo.__dataclass_fields__:
            flat[f"monte_carlo_{key}"] = None if self.monte_carlo is None else getattr(self.monte_carlo, key)
        return flat


class EstimatorReport:
    """Rows in the order of the estimators, and the exact statistics they were computed from."""

    def __init__(self, rows: list[EstimatorRow], stats: GradientStats) -> None:
        self.rows, self.stats = rows, stats

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[EstimatorRow]:
        return iter(self.rows)

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> EstimatorRow: ...
    @overload
    def __getitem__(self, key: slice) -> list[EstimatorRow]: ...
    def __getitem__(self, key: SupportsIndex | str | slice) -> EstimatorRow | list[EstimatorRow]:
        """The row at a position, the first one of a name, or the rows of a slice."""
        if not isinstance(key, str):
            return self.rows[key]
        for row in self.rows:
            if row.name == key:
                return row
        raise KeyError(f"no estimator {key!r}; there are {', '.join(row.name for row in self.rows)}")

    def to_csv(self, path: str | os.PathLike) -> None:
        """Writes one line per estimator; an existing file is replaced at once, never left half written."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(self.rows[0].as_dict()))
        writer.writeheader()
        writer.writerows(row.as_dict() for row in self.rows)
        write_atomically(path, text.getvalue())

    def __str__(self) -> str:
        head = ["estimator", "gradients/step", "variance", "per coordinate", "ratio", "normalized", "aggregate"]
        sampled = any(row.monte_carlo for row in self.rows)
        table = [head + (["Monte Carlo variance", "normalized"] if sampled else [])]
        for row in self.rows:
            line = [row.name, str(row.gradients_per_step)]
            line += [f"{row.variance:.4g}", f"{row.variance_per_coordinate:.4g}", f"{row.ratio:.3f}"]
            line += [f"{row.normalized_variance:.4f}", f"{row.aggregate_normalized_variance:.4f}"]
            if row.monte_carlo is not None:
                mc = row.monte_carlo
                line.append(f"{mc.variance:.4g} ± {mc.variance_error:.1g}")
                line.append(f"{mc.normalized_variance:.4f} ± {mc.normalized_variance_error:.1g}")
            table.append(line)
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(t, widths))) for t in table]
        notes = [f"{row.name}: {row.left_out} coordinates left out" for row in self.rows if row.left_out]
        notes += [
            f"{row.name}: {row.between_strata / row.variance:.1%} of the variance comes from drawing strata"
            for row in self.rows
            if row.between_strata
        ]
        return "\n".join([*lines, *notes, *self.stats.notes])

    __repr__ = __str__
