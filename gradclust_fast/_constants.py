"""Tensors that a model has of itself (positions, buffers, parameters), not of the batch: their rows are no examples."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule

FACTORIES = frozenset((torch.arange, torch.linspace, torch.eye))
"""What positions and tables are made by. A batch may be made inside a model too, but by other functions."""
CASTS = frozenset((torch.Tensor.to, torch.Tensor.type_as))
"""They read nothing of a second tensor but dtype and device."""


class Constants:
    """The tensors that are known to be the same for every batch, while the model's forward runs.

    Only what is certain is known: parameters, buffers, ``torch.arange`` and its like, and what a function makes of
    these alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = {
            id(tensor): tensor
            for module in model.modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self._made: dict[int, weakref.ref[torch.Tensor]] = {}
        self._depth = 0  # of calls of the model; outside of them a user may make the batch itself
        # A scripted model takes no hooks, and what runs inside of it is not seen.
        self._hooks = (
            []
            if isinstance(model, ScriptModule)
            else [
                model.register_forward_pre_hook(self._opened, prepend=True),
                model.register_forward_hook(self._closed, always_call=True),
            ]
        )

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._own.clear()
        self._made.clear()

    def _opened(self, module: nn.Module, args: tuple) -> None:
        self._depth += 1

    def _closed(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._depth -= 1

    def __contains__(self, tensor: Any) -> bool:
        if id(tensor) in self._own:
            return True
        made = self._made.get(id(tensor))
        return made is not None and made() is tensor

    def asks(self, func: Any, args: tuple) -> bool:
        """Whether a call may make a constant, or change one."""
        if not self._depth:
            return False
        if func in FACTORIES:
            return True
        first = args[0] if args else None
        if isinstance(first, (list, tuple)):
            first = first[0] if first else None
        return first in self

    def made(self, func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
        """Takes note of what a call made of its arguments; returns it."""
        if func in CASTS:
            args, kwargs = args[:1], {}
        if self._all((*args, *kwargs.values())):
            for tensor in out if isinstance(out, (list, tuple)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor not in self:
                    self._made[id(tensor)] = weakref.ref(tensor, self._gone(id(tensor)))
        else:  # a constant that the batch was written into is none
            for tensor in (out, args[0] if out is None and args else None):
                self._made.pop(id(tensor), None)
        return out

    def _gone(self, key: int) -> Any:
        made = self._made

        def gone(ref: Any) -> None:
            if made.get(key) is ref:
                del made[key]

        return gone

    def _all(self, args: Iterable[Any]) -> bool:
        return all(
            self._all(arg) if isinstance(arg, (list, tuple)) else arg in self
            for arg in args
            if isinstance(arg, (torch.Tensor, list, tuple))
        )


def rows_differ(tensor: torch.Tensor, dim: int) -> bool:
    """Whether a tensor tells the places along a dimension apart. Waits for the device."""
    if tensor.dim() <= dim or tensor.shape[dim] < 2 or tensor.stride(dim) == 0:
        return False
    return not torch.equal(tensor.narrow(dim, 0, 1).expand_as(tensor), tensor)
