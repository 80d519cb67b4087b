"""What ``compare_estimators`` found, as rows, a table and a CSV file."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from ._files import write_atomically
from .monte_carlo import MonteCarlo

if TYPE_CHECKING:
    from .variance import GradientStats


@dataclass
class ParameterVariance:
    """One parameter's share of an :class:`EstimatorRow`, with the same meanings; variances add up over parameters.

    Attributes:
        num_coordinates, variance, normalized_variance, left_out: of the parameter's coordinates.
        ratio: variance over the first estimator's, for the same parameter.
    """

    num_coordinates: int
    variance: float
    normalized_variance: float
    left_out: int
    ratio: float = 1.0

    @property
    def variance_per_coordinate(self) -> float:
        return self.variance / self.num_coordinates


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
        by_parameter: {name: :class:`ParameterVariance`}.
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
    by_parameter: dict[str, ParameterVariance] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, float | int | str | None]:
        """Flat, for a CSV row; Monte Carlo entries are None when there was none."""
        flat = {key: value for key, value in vars(self).items() if key not in ("monte_carlo", "by_parameter")}
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

    def to_csv(self, path: str | os.PathLike, *, by_parameter: bool = False) -> None:
        """Writes one line per estimator; an existing file is replaced at once, never left half written.

        Args:
            by_parameter: one line per estimator and parameter instead.
        """
        lines: list[dict[str, Any]] = [row.as_dict() for row in self.rows]
        if by_parameter:
            lines = [
                {
                    "name": row.name,
                    "parameter": name,
                    **vars(part),
                    "variance_per_coordinate": part.variance_per_coordinate,
                }
                for row in self.rows
                for name, part in row.by_parameter.items()
            ]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
        write_atomically(path, text.getvalue())

    def breakdown(self) -> str:
        """A table of every parameter's variance: the first estimator's per coordinate, and the others' over it."""
        first = self.rows[0].by_parameter
        head = ["parameter", "coordinates", f"{self.rows[0].name}, per coordinate", "share of its variance"]
        table = [head + [f"{row.name} ÷ first" for row in self.rows[1:]]]
        total = self.rows[0].variance
        for name, part in first.items():
            share = part.variance / total if total else math.nan
            line = [name, f"{part.num_coordinates:,}", f"{part.variance_per_coordinate:.4g}", f"{share:.1%}"]
            table.append(line + [f"{row.by_parameter[name].ratio:.3f}" for row in self.rows[1:]])
        return _aligned(table)

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
        notes = [f"{row.name}: {row.left_out} coordinates left out" for row in self.rows if row.left_out]
        notes += [
            f"{row.name}: {row.between_strata / row.variance:.1%} of the variance comes from drawing strata"
            for row in self.rows
            if row.between_strata
        ]
        return "\n".join([_aligned(table), *notes, *self.stats.notes])

    __repr__ = __str__


def _aligned(table: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in table
    )
