"""Forward under an open watch: every torch call with a watched parameter gets a use that waits, or an error."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode, resolve_name

from ._backward import Backwards
from ._claims import Claim, Claims, ModuleUse
from ._constants import Constants
from ._fused import Link, call_linked, fusable
from ._graphs import BACKWARDS, TURNS, check_graph, engine_arguments, started_from
from ._shared import Met, Root, Shared, repeated
from ._uses import Entry, Use, autocast_input, differentiable, find, gradient_edge, is_dtensor
from .layers import ROUTES, BatchLayout, Call, EmbeddingCall, MatmulCall, flattens
from .layers.recompute import ModuleCall
from .selection import Named


class Forward(TorchFunctionMode):
    """The torch-function mode of a watch. Entered and left with it, or in between (a watch that sleeps).

    Args:
        model: the watched one.
        every: the watched parameters, in the order of ``chosen``.
        claims: the modules that answer for watched parameters themselves.
        backwards: where the uses wait.
        fused: whether linear layers and convolutions hand their weight gradient over to whatever makes the norms.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        every: list[Entry],
        chosen: list[Named],
        claims: list[Claim],
        layout: BatchLayout,
        backwards: Backwards,
        fused: bool,
    ) -> None:
        super().__init__()
        self.every, self.backwards = every, backwards
        self.entries = {id(entry.parameter): entry for entry in every}
        self.turned: dict[int, weakref.ref[torch.Tensor]] = {}  # transposes of parameters, while they live
        self._sharded = [(entry, named.owners) for entry, named in zip(every, chosen) if is_dtensor(entry.parameter)]
        self._fused = fused and not self._sharded
        self._leads: dict[int, torch.Size] = {}
        self._layout = layout
        self._spans: set[int] = set()  # sequence numbers of the graph nodes that routed calls made
        self._constants = Constants(model)
        self._shared = Shared(layout, self._spans, self._constants)
        self._claims = Claims(claims, layout, self._module_called)
        flat = {id(m): m for named in chosen for m, _ in named.owners if flattens(m)}
        self._hooks = [m.register_forward_pre_hook(self._led, with_kwargs=True) for m in flat.values()]

    def close(self) -> None:
        """No module calls back any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._constants.close()
        self._claims.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._constants.asks(func, args):
            return self._constants.made(func, args, kwargs, self._called(func, args, kwargs))
        return self._called(func, args, kwargs)

    def _called(self, func: Any, args: tuple, kwargs: dict) -> Any:
        if func in BACKWARDS:
            return self._backward_call(func, args, kwargs)
        if self._sharded:
            self._resolve((*args, *kwargs.values()))
        used = find(args, self.entries)
        if kwargs:
            used += find(kwargs.values(), self.entries)
        if self._shared:
            shared = self._shared.find((*args, *kwargs.values()))
            if shared and not used:
                return self._shared.called(func, args, kwargs, shared, self._meets)
            self._shared.plain(shared, func)
        return self._used(func, args, kwargs, used) if used else func(*args, **kwargs)

    def _resolve(self, args: tuple) -> None:
        """FSDP2 puts whole parameters, other tensors than the sharded ones, into the modules while these run."""
        for arg in args:
            if isinstance(arg, (list, tuple)):
                self._resolve(tuple(arg))
            elif isinstance(arg, torch.nn.Parameter) and arg.requires_grad and id(arg) not in self.entries:
                for entry, owners in self._sharded:
                    if any(module._parameters.get(name) is arg for module, name in owners):
                        self.entries[id(arg)] = entry
                        self.backwards.await_gradient(entry, arg)

    def _led(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """A module that flattens its input is called: the shape says where the batch is."""
        input = args[0] if args else next(iter(kwargs.values()))
        self._leads.update((id(parameter), input.shape[:-1]) for parameter in module._parameters.values())

    def _turn(self, out: torch.Tensor, entry: Entry) -> None:
        """A transpose of a parameter is known as long as it lives."""
        key, known, living = id(out), self.entries, self.turned

        def gone(ref: Any) -> None:
            if living.get(key) is ref:
                del living[key], known[key]

        known[key], living[key] = entry, weakref.ref(out, gone)
        if out.grad_fn is not None:
            number = out.grad_fn._sequence_nr()
            self._spans.add(number)
            self._shared.guarded[number] = entry.name

    def _used(self, func: Any, args: tuple, kwargs: dict, used: list[Entry]) -> Any:
        if self._claims.running:
            used = [entry for entry in used if not self._claims.covers(entry)]
            if not used:
                return func(*args, **kwargs)
        if (
            func in TURNS
            and args
            and id(args[0]) in self.entries
            and id(args[0]) not in self.turned
            and args[0].dim() == 2
        ):
            out = func(*args, **kwargs)
            if out.stride() == args[0].stride()[::-1] and out.shape == args[0].shape[::-1]:
                self._turn(out, used[0])
                return out
        route = ROUTES.get(func)
        if route is None:
            out = func(*args, **kwargs)
            changed = args[0] if func is torch.Tensor.__setitem__ else out
            if differentiable(changed, self.entries):
                self._refuse(func, used, "has no per-example route")
            return out
        try:
            call = route(*args, **kwargs)
        except NotImplementedError as error:
            raise NotImplementedError(f"{', '.join(entry.name for entry in used)}: {error}") from None
        if self._sharded and any(is_dtensor(parameter) for parameter in call.parameters.values()):
            self._refuse(func, used, "is used as a DTensor (tensor parallelism), which has no per-example route")
        entries = {
            role: self.entries[id(parameter)]
            for role, parameter in call.parameters.items()
            if parameter is not None and self.entries.get(id(parameter)) in used
        }
        constant = call.held is not None and call.held in self._constants
        turns = [role for role in entries if id(call.parameters[role]) in self.turned]
        if isinstance(call, MatmulCall):
            for parameter in call.parameters.values():
                call.lead = self._leads.pop(id(parameter), call.lead)
        if torch.is_grad_enabled():
            args, kwargs = autocast_input(call, args, kwargs)
        first = torch._C._autograd._get_sequence_nr()
        link = None
        if self._fused and "weight" in entries and fusable(call, bool(turns)):
            weight = call.parameters["weight"]
            assert weight is not None
            link = Link(weight)
            out = call_linked(call, func, link)
        else:
            out = func(*args, **kwargs)
        if not out.requires_grad:
            for entry in used:
                entry.hidden += 1
            return out
        if len(entries) != len(used) or (turns and not (call.turns and turns == ["weight"])):
            self._refuse(func, used, "is used in a place of this function that has no per-example route")
        self._spans.update(range(first, torch._C._autograd._get_sequence_nr()))
        use = self._wait_for(call, entries, out)
        use.turned, use.link, use.constant = bool(turns), link, constant
        dim = self._layout.dim
        ones = dim < out.dim() and out.shape[dim] == 1
        if call.shareable and (isinstance(call, EmbeddingCall) or constant or ones):
            self._shared.watch(out, Root(gradient_edge(out), out.shape, weakref.ref(use), call))
        return out

    def _meets(self, root: Root, expanded: torch.Tensor, met: Met, dim: int) -> None:
        """A shared output meets the batch: wait for the gradient of its expansion."""
        use = root.use()
        if use is None:
            return
        edge = GradientEdge(expanded.grad_fn, expanded.output_nr)  # type: ignore[arg-type]
        again = Use(
            repeated(root.call, expanded.shape[dim]), use.entries, edge, expanded.shape, use.root, self.backwards.fired
        )
        again.met, again.turned = (met, dim), use.turned
        self.backwards.wait_for(again, edge)

    def _wait_for(self, call: Call, entries: dict[str, Entry], out: torch.Tensor) -> Use:
        call.held = None if call.held is None or call.light.issuperset(entries) else call.held.detach()
        root = self.backwards.repeated(entries)
        edge = gradient_edge(out)
        use = Use(call, entries, edge, out.shape, root, self.backwards.fired)
        self.backwards.wait_for(use, edge)
        return use

    def _module_called(self, claim: Claim, call: ModuleCall, outputs: list[torch.Tensor], first: int) -> None:
        if not outputs:
            for entry in claim.entries.values():
                entry.hidden += 1
            return
        span = range(first, torch._C._autograd._get_sequence_nr())
        for entry in claim.entries.values():
            entry.spans.append(span)
        root = self.backwards.repeated(claim.entries)
        use = ModuleUse(claim, call, outputs, root, self.backwards.module_fired, self.backwards.keep_edges)
        self.backwards.wait_for_module(use)

    def _refuse(self, func: Any, used: list[Entry], why: str) -> None:
        names = ", ".join(dict.fromkeys(entry.name for entry in used))
        raise NotImplementedError(
            f"{names} {why}: {resolve_name(func) or getattr(func, '__name__', func)} uses it in a differentiable way. "
            f"Leave it out with parameters=, compute this term outside of the record (a penalty on the weights is the "
            f"same for every example), or call the parameter through its layer"
        )

    def _backward_call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors = started_from(func, args, kwargs)
        check_graph(tensors, self.entries, self._spans, self._shared.guarded)
        if func is not torch.autograd.grad and any(entry.hidden for entry in self.every):
            call = engine_arguments(tensors, *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})
            if call is not None:
                engine = torch.autograd.Variable._execution_engine
                with self:  # a torch function runs without the mode, which must see what a checkpoint repeats
                    engine.run_backward(*call, allow_unreachable=True, accumulate_grad=True)
                return None
        return func(*args, **kwargs)
