"""A unit of work, (row, variant, seed): its records, its checkpoint and its result file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from .._files import write_atomically

if TYPE_CHECKING:
    from .row import Variant

SAVE_EVERY = 10.0
"""Seconds between checkpoints inside a unit."""


class Diverged(Exception):
    """The trajectory's loss is no longer finite: reported, kept out of every average."""


@dataclass(frozen=True)
class Options:
    """What the command line decides about every unit.

    Attributes:
        data: directory with MNIST and CIFAR-10, or ``module:factory`` of a data set of one's own; None: GRADCLUST_DATA.
        model: ``module:factory`` of a model of one's own, instead of the row's.
        device: where models and data are.
        out: directory of the results.
        scale: ``"small"`` or ``"paper"``.
    """

    data: str | None = None
    model: str | None = None
    device: str = "cpu"
    out: Path = Path("study-results")
    scale: str = "small"

    @property
    def own_data(self) -> bool:
        """Whether ``data`` names a factory rather than a directory."""
        return (
            self.data is not None and bool(re.fullmatch(r"[\w.]+:[\w.]+", self.data)) and not Path(self.data).exists()
        )


class Unit:
    """What a variant's ``run`` gets: seed, options, a place for records, and the state of an interrupted attempt.

    Attributes:
        records: dicts, one a line of the row's CSV.
        state: what ``checkpoint`` saved last in an interrupted attempt, or None.
    """

    def __init__(
        self,
        variant: Variant,
        seed: int,
        options: Options,
        progress: Callable[[float, str], None] = lambda fraction, text: None,
    ) -> None:
        self.variant, self.seed, self.options, self._progress = variant, seed, options, progress
        self.records: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None
        self._before = 0.0  # seconds spent in earlier attempts
        self._begin, self._saved = time.process_time(), time.monotonic()

    @property
    def path(self) -> Path:
        """The result's file."""
        name = re.sub(r"[^\w.=+-]+", "_", self.variant.name)
        return self.options.out / "units" / self.variant.family / f"{name}-seed{self.seed}.json"

    @property
    def partial(self) -> Path:
        """The checkpoint's file."""
        return self.path.with_suffix(".partial")

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the result: a unit with another fingerprint is measured anew."""
        settings = {
            **self.variant.settings(),
            "seed": self.seed,
            "data": self.options.data if self.options.own_data else None,
            "model": self.options.model,
            "device": torch.device(self.options.device).type,
            "version": __version__,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """Of processor time for this unit so far, interrupted attempts included as far as their last checkpoint.

        Processor time: what else the machine does at the same time does not count.
        """
        return self._before + time.process_time() - self._begin

    def record(self, **values: Any) -> None:
        self.records.append(values)

    def progress(self, fraction: float, text: str = "") -> None:
        self._progress(fraction, text)

    def checkpoint(self, state: Callable[[], dict[str, Any]], *, now: bool = False) -> None:
        """Saves records and ``state()`` (tensors, numbers, strings in dicts and lists) if some seconds have gone by."""
        if not now and time.monotonic() - self._saved < SAVE_EVERY:
            return
        buffer = io.BytesIO()
        content = {"fingerprint": self.fingerprint, "records": self.records, "seconds": self.seconds, "state": state()}
        torch.save(content, buffer)
        write_atomically(self.partial, buffer.getvalue())
        self._saved = time.monotonic()

    def result(self) -> dict[str, Any] | None:
        """The finished result, or None if there is none or it was measured with other settings."""
        try:
            content = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return content if content.get("fingerprint") == self.fingerprint else None

    def execute(self) -> dict[str, Any]:
        """Runs from the last checkpoint, if there is one, to the end; writes the result's file and returns it."""
        self._resume()
        status, message = "finished", ""
        try:
            self.variant.run(self)
        except Diverged as error:
            status, message = "diverged", str(error)
        content = {
            "family": self.variant.family,
            "variant": self.variant.name,
            "labels": self.variant.labels,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "status": status,
            "message": message,
            "seconds": round(self.seconds, 2),
            "records": self.records,
        }
        write_atomically(self.path, json.dumps(content))
        self.partial.unlink(missing_ok=True)
        return content

    def _resume(self) -> None:
        try:
            saved = torch.load(io.BytesIO(self.partial.read_bytes()), map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return
        except Exception:  # a checkpoint of another version or a damaged one: begin anew rather than fail
            os.replace(self.partial, self.partial.with_suffix(".unreadable"))
            return
        if saved.get("fingerprint") == self.fingerprint:
            self.records, self.state, self._before = saved["records"], saved["state"], saved["seconds"]
