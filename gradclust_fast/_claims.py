"""Modules that answer for their own parameters: recomputed alone, or read by a registered function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_unflatten

from ._uses import Entry, gradient_edge
from .layers import BatchLayout, Factors, registered
from .layers.recompute import ModuleCall, rounding
from .layers.registered import LayerFactors, checked_factors, inputs_of
from .selection import Named


class Claim:
    """A module and those of its parameters whose uses inside its call need no route of their own."""

    def __init__(self, module: nn.Module, factors: LayerFactors | None) -> None:
        self.module, self.registered = module, factors
        self.entries: dict[str, Entry] = {}  # by name inside the module
        self.vectorised = True

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: entry.parameter for name, entry in self.entries.items()}

    def names(self) -> str:
        return ", ".join(entry.name for entry in self.entries.values())


def claims_of(chosen: list[Named], every: list[Entry]) -> list[Claim]:
    """The modules that answer for recorded parameters themselves; ``every`` has the entries of ``chosen``."""
    claims: dict[nn.Module, Claim] = {}
    for named, entry in zip(chosen, every):
        for module, name in named.claimants():
            claim = claims.setdefault(module, Claim(module, registered(module)))
            claim.entries[name] = entry
    return list(claims.values())


class ModuleUse:
    """One call of a claimed module: waits until the gradients of all its outputs that will come are there."""

    def __init__(
        self,
        claim: Claim,
        call: ModuleCall,
        outputs: list[torch.Tensor],
        root: int | None,
        fired: Callable[[ModuleUse, list[torch.Tensor | None]], None],
        keep_edges: bool,
    ) -> None:
        self.claim, self.call, self.root, self.fired = claim, call, root, fired
        self.entries = claim.entries
        self.spent = False
        self.shape = outputs[0].shape
        self.shapes = [out.shape for out in outputs]
        edges = [gradient_edge(out) for out in outputs]
        nodes = list(dict.fromkeys(edge.node for edge in edges))
        self.places = [(nodes.index(edge.node), edge.output_nr) for edge in edges]
        # Nodes own the hooks that own this object, so it keeps them (until `spend`) only where it must.
        self.nodes = nodes if len(nodes) > 1 else []
        self.edges: list[GradientEdge] = edges if keep_edges else []
        self.task, self.waiting = -1, set[int]()
        self.grads: list[torch.Tensor | None] = []
        for entry in self.entries.values():
            entry.live += 1
        self.handles = [node.register_prehook(lambda grads, k=k: self._fire(k, grads)) for k, node in enumerate(nodes)]

    def _fire(self, k: int, grads: tuple[torch.Tensor | None, ...]) -> None:
        with torch._C.DisableTorchFunction():
            task = torch._C._current_graph_task_id()
            if not self.waiting or task != self.task:
                self.task = task
                executed = [i for i, node in enumerate(self.nodes) if torch._C._will_engine_execute_node(node)]
                self.waiting = set(executed) if self.nodes else {0}
                self.grads = [None] * len(self.places)
            for i, (node, output_nr) in enumerate(self.places):
                if node == k:
                    self.grads[i] = grads[output_nr]
            self.waiting.discard(k)
            if not self.waiting:
                found, self.grads = self.grads, []
                self.fired(self, found)

    def factors(self, grads: list[torch.Tensor | None]) -> dict[str, Factors]:
        self.call.check_versions(self.names())
        grads = [None if g is None else g.detach().reshape(shape) for g, shape in zip(grads, self.shapes)]
        if self.claim.registered is None:
            self.call.vectorised = self.claim.vectorised
            made = self.call.factors(grads)
            self.claim.vectorised = self.call.vectorised
            return made
        args, kwargs = tree_unflatten(self.call.leaves, self.call.spec)
        module = self.claim.module
        made = self.claim.registered(module, inputs_of(module, args, kwargs), tuple(grads))
        return checked_factors(module, self.claim.parameters(), made)

    def spend(self) -> None:
        """No gradient can come any more."""
        if not self.spent:
            self.spent = True
            self.call.release()
            for handle in self.handles:
                handle.remove()
            self.nodes, self.edges, self.handles = [], [], []
            for entry in self.entries.values():
                entry.live -= 1

    def __del__(self) -> None:
        self.spend()

    def names(self) -> str:
        return self.claim.names()


class _Rerun(threading.local):
    """Whether this thread runs a claimed module again, which no watch watches."""

    running = False


rerun = _Rerun()


class Claims:
    """The claimed modules of one watch, and which of their calls are running."""

    def __init__(self, claims: list[Claim], layout: BatchLayout, done: Callable[[Claim, ModuleCall, list, int], None]):
        self.layout, self._done = layout, done
        self.running: list[tuple[Claim, ModuleCall | None, int, tuple]] = []
        self._hooks: list[Any] = []
        for claim in claims:
            self._hooks += [
                claim.module.register_forward_pre_hook(
                    lambda module, args, kwargs, claim=claim: self._opened(claim, args, kwargs),
                    prepend=True,
                    with_kwargs=True,
                ),
                claim.module.register_forward_hook(
                    lambda module, args, out, claim=claim: self._closed(claim, out), always_call=True
                ),
            ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.running = [], []
        del self._done  # the watch, whose results should go as soon as its user drops it

    def covers(self, entry: Entry) -> bool:
        return any(entry is own for claim, *_ in self.running for own in claim.entries.values())

    def _opened(self, claim: Claim, args: tuple, kwargs: dict) -> None:
        if rerun.running:
            return
        with torch._C.DisableTorchFunction():
            try:
                call = ModuleCall(claim.module, claim.parameters(), args, kwargs, self.layout)
            except NotImplementedError as error:
                raise NotImplementedError(f"{claim.names()}: {error}") from None
            first = torch._C._autograd._get_sequence_nr()
            self.running.append((claim, call, first, _random_state(claim)))

    def _closed(self, claim: Claim, out: Any) -> Any:
        if rerun.running or not any(own is claim for own, *_ in self.running):
            return None
        while True:  # calls inside that ended in an exception, which a hook does not always see
            own, call, first, random = self.running.pop()
            if own is claim:
                break
        if out is None:
            return None
        with torch._C.DisableTorchFunction():
            assert call is not None
            leaves, spec = tree_flatten(out)
            wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
            changed = _used_inside([leaves[i] for i in wanted], first)
            for i in changed:  # its own uses inside the module must not count as gradients from outside
                leaves[wanted[i]] = leaves[wanted[i]].clone()
            out = tree_unflatten(leaves, spec) if changed else out
            try:
                outputs = call.finish(out, claim.registered is None)
            except NotImplementedError as error:
                raise NotImplementedError(f"{claim.names()}: {error}") from None
            except ValueError as error:
                raise ValueError(f"{claim.names()}: its layer {error}") from None
            if (
                outputs
                and claim.registered is None
                and any(not torch.equal(a, b) for a, b in zip(random, _random_state(claim)))
            ):
                raise NotImplementedError(
                    f"{claim.names()}: {type(claim.module).__name__} drew random numbers (dropout in train mode), "
                    f"which cannot be drawn again for one example at a time. Set its dropout to 0, call eval() on it, "
                    f"leave these parameters out with parameters=, or give them to a smaller module of their own"
                )
            self._done(claim, call, outputs, first)
        return out if changed else None


def _random_state(claim: Claim) -> tuple[torch.Tensor, ...]:
    state = (torch.get_rng_state(),)
    device = next(iter(claim.entries.values())).parameter.device
    return (*state, torch.cuda.get_rng_state(device)) if device.type == "cuda" else state


def _used_inside(outputs: list[torch.Tensor], first: int) -> list[int]:
    """Which outputs the module used itself to make another output. ``first`` is its first node's sequence number."""
    if len(outputs) < 2:
        return []
    nodes = [gradient_edge(out).node for out in outputs]
    found, visited = set[int](), set()
    stack = [child for node in dict.fromkeys(nodes) for child, _ in node.next_functions]
    while stack:
        node = stack.pop()
        if node is None or node in visited or type(node).__name__ == "AccumulateGrad":
            continue
        visited.add(node)
        if node in nodes:
            found.update(i for i, own in enumerate(nodes) if own is node)
        if node._sequence_nr() >= first:
            stack += [child for child, _ in node.next_functions]
    return sorted(found)


def check_sum(name: str, total: torch.Tensor, size: float, grad: torch.Tensor) -> None:
    """Per-example gradients must add up to what autograd computed; ``size`` is the sum of their norms."""
    grad = grad.to_dense() if grad.layout != torch.strided else grad
    error = float((total - grad.to(total.dtype)).norm())
    if error > rounding(grad.dtype, grad.device) * (size + float(grad.norm())):  # False for NaN: nothing to compare
        raise RuntimeError(
            f"{name}: its per-example gradients do not add up to its gradient (off by {error:.2g} of "
            f"{float(grad.norm()):.2g}). Either examples influence each other in its module (BatchNorm in train mode, "
            f"a mean over the batch), the module hands out more than it returns, or the factors registered for it are "
            f"wrong. Leave it out with parameters="
        )
