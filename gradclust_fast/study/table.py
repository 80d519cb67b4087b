"""Records of a row: filtering, averages over seeds, and the CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .._files import write_atomically

Record = dict[str, Any]


class Table:
    """Lines of a row's CSV. Those of diverged trajectories stay in the file and out of every statistic.

    Args:
        records: dicts; ``"status"`` is ``"finished"`` or ``"diverged"``.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.everything = list(records)
        self.records = [r for r in self.everything if r.get("status", "finished") == "finished"]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def where(self, predicate: Callable[[Record], bool] | None = None, **equal: Any) -> Table:
        """Records with these values, and for which the predicate holds."""
        kept = [r for r in self.records if all(r.get(k) == v for k, v in equal.items())]
        return Table(r for r in kept if predicate is None or predicate(r))

    def column(self, name: str) -> list[Any]:
        return [r[name] for r in self.records if r.get(name) is not None]

    def distinct(self, name: str) -> list[Any]:
        """Values of a column, in order of appearance."""
        return list(dict.fromkeys(self.column(name)))

    @property
    def seeds(self) -> list[int]:
        return sorted(self.distinct("seed"))

    def per_seed(self, statistic: Callable[[Table], float]) -> list[float]:
        """One value a seed; seeds without the records it needs are left out."""
        values = []
        for seed in self.seeds:
            try:
                values.append(statistic(self.where(seed=seed)))
            except (ZeroDivisionError, IndexError, KeyError, ValueError):
                continue
        return values

    def curve(self, x: str, y: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """(x, mean, lowest, highest over seeds) at every x that has values, sorted."""
        groups: dict[float, list[float]] = {}
        for r in self.records:
            if r.get(x) is not None and r.get(y) is not None and math.isfinite(r[y]):
                groups.setdefault(r[x], []).append(r[y])
        xs = sorted(groups)
        return xs, [mean(groups[v]) for v in xs], [min(groups[v]) for v in xs], [max(groups[v]) for v in xs]

    def write(self, path: Path) -> None:
        columns = list(dict.fromkeys(key for record in self.everything for key in record))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for record in self.everything:
            writer.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in record.items()})
        write_atomically(path, text.getvalue())

    @classmethod
    def read(cls, path: Path) -> Table:
        with path.open(newline="") as file:
            return cls({key: _parsed(value) for key, value in line.items()} for line in csv.DictReader(file))


def mean(values: Iterable[float]) -> float:
    values = list(values)
    if not values:
        raise ValueError("no values")
    return math.fsum(values) / len(values)


def median(values: Iterable[float]) -> float:
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _parsed(text: str) -> Any:
    if text == "":
        return None
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
