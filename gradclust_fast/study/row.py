"""What a row of the study declares, and the list of all rows."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .table import Table, mean

if TYPE_CHECKING:
    from .unit import Unit

SEEDS_NEEDED = 3


@dataclass(frozen=True)
class Variant:
    """One problem of a row, measured for every seed.

    Attributes:
        family, name: name the unit's file. Rows that name the same family and variant share its units.
        labels: columns that tell the variant's records from others'.
        run: ``run(unit)`` measures and records; a :class:`Trajectory` is one.
        details: everything else that decides the result; a change of it invalidates finished units.
        needs: data sets (names of ``gradclust_fast.data.load``).
    """

    family: str
    name: str
    labels: Mapping[str, Any]
    run: Callable[[Unit], None]
    details: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    def settings(self) -> dict[str, Any]:
        own = getattr(self.run, "settings", None)
        return {
            "family": self.family,
            "name": self.name,
            "labels": dict(self.labels),
            "details": dict(self.details),
            "run": own() if own is not None else getattr(self.run, "__name__", ""),
        }


@dataclass(frozen=True)
class Check:
    """One evaluated pass criterion. ``passed`` None: there is nothing to evaluate it on, or no criterion was set.

    ``seeds``: values it rests on; None where that is not a matter of seeds.
    """

    claim: str
    paper: str
    ours: str
    passed: bool | None
    bar: str = ""
    seeds: int | None = None

    @property
    def verdict(self) -> str:
        word = {True: "pass", False: "FAIL", None: "undecided" if self.bar else "–"}[self.passed]
        few = self.passed is not None and self.seeds is not None and self.seeds < SEEDS_NEEDED
        return f"{word} ({self.seeds} of {SEEDS_NEEDED} seeds)" if few else word


def check(
    claim: str,
    paper: str,
    values: Sequence[float],
    *,
    below: float | None = None,
    above: float | None = None,
    strict: bool = False,
) -> Check:
    """A criterion on the mean over seeds: at most ``below``, at least ``above`` (``strict``: less, greater).

    Args:
        values: one a seed; with none the criterion is undecided, with one that is not finite it fails.
    """
    less, more = ("<", ">") if strict else ("≤", "≥")
    bounds = [f"{more} {above:.4g}"] if above is not None else []
    bounds += [f"{less} {below:.4g}"] if below is not None else []
    bar = " and ".join(bounds)
    if not values:
        return Check(claim, paper, "no finished trajectory", None, bar, 0)
    center = mean(values)
    passed: bool | None = None
    if bounds:
        passed = math.isfinite(center)
        if below is not None:
            passed &= center < below or (not strict and center == below)
        if above is not None:
            passed &= center > above or (not strict and center == above)
    return Check(claim, paper, spread(values), passed, bar, len(values))


def spread(values: Sequence[float]) -> str:
    """``mean (lowest to highest over seeds)``."""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


@dataclass(frozen=True)
class Row:
    """One row of the study.

    Attributes:
        id, title: as ``gradclust study list`` shows them.
        shows: what the row is about, a phrase.
        variants: ``variants(scale)``.
        checks: ``checks(table)``, the pass criteria evaluated.
        draw: ``draw(table)`` → a matplotlib Figure.
        sizes: ``{scale: text}``, steps and sizes.
        paper: what the paper found, a sentence.
        remarks: what a reader has to know to judge the numbers, failed criteria explained.
        model: whether ``--model`` and a data set of one's own replace the row's.
    """

    id: str
    title: str
    shows: str
    variants: Callable[[str], list[Variant]]
    checks: Callable[[Table], list[Check]]
    draw: Callable[[Table], Any]
    sizes: Mapping[str, str]
    paper: str
    remarks: str = ""
    model: bool = False

    @property
    def stem(self) -> str:
        """Name of the row's files."""
        return f"{self.id[0].lower()}{int(self.id[1:]):02d}"

    def needs(self, scale: str) -> list[str]:
        return list(dict.fromkeys(name for variant in self.variants(scale) for name in variant.needs))


def all_rows() -> dict[str, Row]:
    """Every row by its id, in order: the ``ROW`` of each module ``rNN_*`` beside this one."""
    package = importlib.import_module(__package__)
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if re.fullmatch(r"r\d\d_\w+", m.name))
    rows = [importlib.import_module(f"{__package__}.{name}").ROW for name in names]
    return {row.id: row for row in rows}
