"""Uses of watched parameters: finding them among a torch call's arguments, and what waits for their gradient."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from .layers import Call
from .selection import Named


class Entry:
    """A watched parameter."""

    __slots__ = ("hidden", "live", "name", "parameter", "spans")

    def __init__(self, named: Named) -> None:
        self.name, self.parameter = named.name, named.parameter
        self.live = 0  # uses whose gradient may still come
        self.hidden = 0  # uses without grad mode: a reentrant checkpoint repeats them in backward
        self.spans: list[range] = []  # sequence numbers of the nodes made by calls of modules that answer for it


Entries = dict[int, Entry]
"""By id of the parameter."""


class Use:
    """One routed call. The hook on the graph's node owns it, so it lives as long as its gradient may come."""

    __slots__ = (
        *("__weakref__", "call", "entries", "fired", "handle", "index", "root", "shape", "spent", "version"),
        *("constant", "link", "met", "plain", "shared", "turned"),
    )

    def __init__(
        self,
        call: Call,
        entries: dict[str, Entry],
        edge: GradientEdge,
        shape: torch.Size,
        root: int | None,
        fired: Callable[[Use, torch.Tensor | None], None],
    ) -> None:
        self.spent = False
        self.call, self.entries, self.shape, self.fired = call, entries, shape, fired
        self.index = edge.output_nr
        self.met: Any = None  # how an expansion of a shared output met the batch, and in which dimension
        self.shared, self.plain = False, ""  # whether expansions of the output did, and a function that saw it as it is
        self.link: Any = None  # to the node that the weight's gradient may be handed to
        self.turned = False  # whether the weight was the parameter's transpose
        self.constant = False  # whether the layer's input was the model's own
        self.root = root  # the backward that recomputed this call, or None for an ordinary forward
        held = call.held
        self.version = None if held is None or held.is_inference() else held._version
        for entry in entries.values():
            entry.live += 1
        self.handle = edge.node.register_prehook(self._fire)

    def _fire(self, grads: tuple[torch.Tensor | None, ...]) -> None:
        with torch._C.DisableTorchFunction():
            self.fired(self, grads[self.index])

    def check_version(self) -> None:
        held = self.call.held
        if held is not None and self.version is not None and held._version != self.version:
            raise RuntimeError(
                f"{self.names()}: the layer's input was modified in place between forward and backward (version "
                f"{held._version}, expected {self.version}); use an out-of-place operation on this layer's input"
            )

    def spend(self) -> None:
        """No gradient can come any more: the activation may go, even where a loss keeps the graph alive."""
        if not self.spent:
            self.spent = True
            self.call.held = self.met = None
            for entry in self.entries.values():
                entry.live -= 1

    def __del__(self) -> None:
        self.spend()

    def names(self) -> str:
        return ", ".join(entry.name for entry in self.entries.values())


def find(args: Iterable[Any], entries: Entries) -> list[Entry]:
    """The watched parameters among a call's arguments, lists included."""
    found: list[Entry] = []
    for arg in args:
        entry = entries.get(id(arg))
        if entry is not None:
            found.append(entry)
        elif isinstance(arg, (list, tuple)):
            found += find(arg, entries)
    return found


def is_dtensor(tensor: Any) -> bool:
    """Whether a parameter is sharded (FSDP2) or used in parts (tensor parallelism)."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: then there is none
    return module is not None and isinstance(tensor, module.DTensor)


def differentiable(out: Any, entries: Entries) -> bool:
    """Whether a call's result carries a gradient back (a watched parameter itself does not count)."""
    if isinstance(out, torch.Tensor):
        return out.requires_grad and out.grad_fn is not None and id(out) not in entries
    return isinstance(out, (list, tuple)) and any(differentiable(item, entries) for item in out)


def gradient_edge(out: torch.Tensor) -> GradientEdge:
    """The node that the gradient of a layer's output passes through, whatever happens to the output later.

    A view (a linear layer's output with position dimensions) gets a new node when it is modified in place; its base
    keeps the one that matters.
    """
    base = out._base if out._is_view() else None
    if base is not None and base.numel() == out.numel() and base.is_contiguous() and out.is_contiguous():
        out = base
    assert out.grad_fn is not None
    return GradientEdge(out.grad_fn, out.output_nr)


def autocast_input(call: Call, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Makes autocast's cast of a layer's input before autocast does, so that graph and use hold the same memory.

    A leaf stays as it is, since autocast may share its cast between several uses.
    """
    held = call.held
    if held is None or not call.lower_precision or not held.is_floating_point() or held.dtype == torch.float64:
        return args, kwargs
    device = held.device.type
    if not torch.is_autocast_enabled(device) or (held.is_leaf and held.requires_grad):
        return args, kwargs
    cast = call.held = held.to(torch.get_autocast_dtype(device))
    args = tuple(cast if arg is held else arg for arg in args)
    return args, {key: cast if value is held else value for key, value in kwargs.items()}
