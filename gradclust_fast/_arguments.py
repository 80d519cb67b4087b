"""Checks of plain arguments that several public names share."""

from __future__ import annotations

import operator
from typing import Any


def integer(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int: NumPy's integers count, bools and floats do not. Without ``least`` it must fit 64 bits."""
    try:
        plain = operator.index(value)
    except TypeError:
        plain = None
    if plain is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if least is not None and plain < least:
        raise ValueError(f"{name} must be at least {least}, got {plain}")
    if least is None and not -(2**63) <= plain < 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {plain}")
    return plain
