"""Compiled models run eagerly while a watch is open: a compiled graph hides its calls.

The compiler's stance belongs to the whole process, so watches in several threads count, and the last one restores it.
"""

from __future__ import annotations

import importlib.abc
import sys
import threading
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

_DYNAMO = "torch._dynamo"
_INSIDE = (
    "a record cannot be opened inside a compiled function; compile the model or the loss instead, and open the record "
    "around their calls"
)
_lock = threading.Lock()
_watches = 0
_stance: Any = None


def run_eagerly() -> None:
    """Compiled functions run their Python from here on; what they compiled is kept."""
    global _watches
    with _lock:
        if _watches == 0:
            if _DYNAMO in sys.modules:
                _set()
            else:  # importing it only to turn it off would cost seconds
                sys.meta_path.insert(0, _finder)
        _watches += 1


def run_compiled() -> None:
    """Undoes one ``run_eagerly``."""
    global _watches, _stance
    with _lock:
        _watches -= 1
        if _watches == 0:
            if _finder in sys.meta_path:
                sys.meta_path.remove(_finder)
            if _stance is not None:
                _stance.__exit__(None, None, None)
                _stance = None


def _set() -> None:
    global _stance
    if torch.compiler.is_compiling():  # the compiler's trace of this function; then it runs, and torch refuses
        raise RuntimeError(_INSIDE)
    try:
        _stance = torch.compiler.set_stance("force_eager")
    except RuntimeError as error:  # torch's own refusal
        raise RuntimeError(_INSIDE) from error


class _Finder(importlib.abc.MetaPathFinder):
    """Notices that the compiler is imported while a watch is open."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != _DYNAMO:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        with _lock:
            if _watches:
                _set()


_finder = _Finder()
