"""Sees every use of a model's parameters in an ordinary forward and streams their per-example factors in backward.

A torch-function mode looks at each torch call that has a watched parameter among its arguments. Calls with a route
(``layers``) get a hook on the node that will receive their output's gradient; any other differentiable use raises on
the spot. Nothing is wrapped or swapped, and gradients are only read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode, resolve_name

from ._claims import Claim, Claims, ModuleUse, check_sum, rerun
from ._compiled import run_compiled, run_eagerly
from ._dispatch import backend, current_backend
from ._graphs import BACKWARDS, TURNS, check_graph, engine_arguments, keeps_graph, seen_twice, started_from
from ._shared import Met, Root, Shared, repeated
from ._uses import Entries, Entry, Use, autocast_input, differentiable, find, gradient_edge, is_dtensor
from .layers import (
    ROUTES,
    BatchLayout,
    Call,
    DenseFactors,
    EmbeddingCall,
    Factors,
    MatmulCall,
    flattens,
    registered,
    turned,
)
from .layers.recompute import ExampleMismatchError, ModuleCall
from .selection import Named, Parameters, select

_watched: dict[int, str] = {}  # id of every parameter that some open watch watches, and its name
idle: dict[int, Callable[[], None]] = {}
"""id of every parameter whose watch sleeps between a forward and its backward, and what ends that watch."""


class Backward:
    """One backward pass through watched layers."""

    def __init__(self, planned: bool = False) -> None:
        self.B: int | None = None
        self.planned = planned  # by Watch.backward, which computes no parameter gradient
        self.leader = ""  # the parameter that said B
        self.stash: dict[str, list[Factors]] = {}
        self.seen: set[str] = set()  # parameters whose factors came
        self.consumed: set[str] = set()
        self.blank: set[str] = set()  # parameters that autograd reached with no gradient at all
        self.received: set[str] = set()  # parameters whose gradient autograd computed
        self.sums: dict[str, tuple[torch.Tensor, float]] = {}  # of claimed parameters: Σ_b G_b and Σ_b ‖G_b‖
        self.grads: dict[str, torch.Tensor] = {}  # and what autograd says it is
        self.state: Any = None  # the consumer's


class _Mode(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watch = self.watch
        if func in BACKWARDS:
            return watch._backward_call(func, args, kwargs)
        if watch._sharded:
            watch._resolve((*args, *kwargs.values()))
        used = find(args, watch._entries)
        if kwargs:
            used += find(kwargs.values(), watch._entries)
        if watch._shared:
            shared = watch._shared.find((*args, *kwargs.values()))
            if shared and not used:
                return watch._shared.called(func, args, kwargs, shared, watch._meets)
            watch._shared.plain(shared, func)
        return watch._used(func, args, kwargs, used) if used else func(*args, **kwargs)


class Watch:
    """Context manager: ``consume(name, factors)`` for every watched parameter of every backward inside.

    Args:
        model: any module. Its forward, backward and ``.grad`` are what they would be without the watch.
        consume: called once per parameter and backward, as soon as the last use's gradient is known; ``factors`` are
            the :class:`~gradclust_fast.layers.Factors` of all uses together. Their memory is freed afterwards unless
            the consumer keeps them.
        parameters: name globs, or a predicate of name and parameter; None watches every trainable parameter.
        batch_dim: the batch dimension of layers that leave it open (linear layers on sequences: 0 or 1).
        batch_size: number of examples, where some layer sees several rows an example (consecutive for
            ``batch_dim=0``, strided for 1).

    Raises:
        NotImplementedError: a watched parameter without a route, or a use of one, when it happens.
        RuntimeError: on exit, when no backward ran or a parameter received a gradient through an unseen use.
    """

    _keeps_edges = True  # what `backward` needs; it keeps the graph of every forward alive until its backward

    def __init__(
        self,
        model: torch.nn.Module,
        consume: Callable[[str, Factors], None],
        *,
        parameters: Parameters = None,
        batch_dim: int = 0,
        batch_size: int | None = None,
    ) -> None:
        if batch_dim not in (0, 1):
            raise ValueError(f"batch_dim must be 0 or 1, got {batch_dim!r}; move the batch to one of these dimensions")
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 0):
            raise ValueError(f"batch_size must be a number of examples or None, got {batch_size!r}")
        self.model, self._consumer, self._parameters = model, consume, parameters
        self._layout = BatchLayout(batch_dim, batch_size)
        self.backwards = 0
        self._entries: Entries = {}
        self._state = "new"

    # --- what a subclass may add to --------------------------------------------------------------------------------

    def _begun(self, run: Backward) -> None:
        """Before the first gradient of a backward is used."""

    def _consume(self, run: Backward, name: str, factors: Factors) -> None:
        self._consumer(name, factors)

    def _received(self, run: Backward, name: str, grad: torch.Tensor) -> None:
        """A parameter's gradient of this backward, before it is accumulated."""

    def _finished(self, run: Backward) -> None:
        """All factors of a backward were consumed and its gradients accumulated."""

    # --- opening and closing ---------------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        if self._state != "new":
            raise RuntimeError(f"this {type(self).__name__} was used before; open a new one for every `with`")
        chosen = select(self.model, self._parameters)
        for give_up in {idle[id(named.parameter)] for named in chosen if id(named.parameter) in idle}:
            give_up()
        twice = [named.name for named in chosen if id(named.parameter) in _watched]
        if twice:
            raise RuntimeError(
                f"the model is already being recorded ({', '.join(twice)}); close the other record first, or ask it "
                f"for everything at once"
            )
        whole = [named.name for named in chosen if is_dtensor(named.parameter) and named.claimants()]
        if whole:
            raise NotImplementedError(
                f"{', '.join(whole)}: sharded (fully_shard) and recomputed or registered, which need whole parameters "
                f"in backward; leave them out with parameters=, or do not shard their modules"
            )
        run_eagerly()
        self.names = [named.name for named in chosen]
        self._entries = {id(named.parameter): Entry(named) for named in chosen}
        self._every = list(self._entries.values())
        self._sharded = [
            (entry, named.owners) for entry, named in zip(self._every, chosen) if is_dtensor(entry.parameter)
        ]
        self._turned: dict[int, weakref.ref[torch.Tensor]] = {}  # transposes of parameters, while they live
        self._leads: dict[int, torch.Size] = {}
        self._backend, self._threads = current_backend(), torch.get_num_threads()
        self._uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self._edges: list[tuple[Use, GradientEdge]] = []
        self._module_uses: weakref.WeakSet[ModuleUse] = weakref.WeakSet()
        self._module_edges: list[ModuleUse] = []
        self._spans: set[int] = set()  # sequence numbers of the graph nodes that routed calls made
        self._shared = Shared(self._layout, self._spans)
        self._runs: dict[int, Backward] = {}  # by graph task; a nested backward belongs to the one that started it
        self._roots: dict[int, int] = {}
        self._plan: Backward | None = None
        self._unseen: dict[str, None] = {}
        self._hooked: list[torch.Tensor] = []
        self._hooks: list[Any] = []
        for entry in self._every:
            self._await_gradient(entry, entry.parameter)
        _watched.update((id(entry.parameter), entry.name) for entry in self._every)
        self._claims = Claims(self._claimed(chosen), self._layout, self._module_called)
        flat = {id(m): m for named in chosen for m, _ in named.owners if flattens(m)}
        self._hooks += [m.register_forward_pre_hook(self._led, with_kwargs=True) for m in flat.values()]
        torch.clear_autocast_cache()  # a cast from before would lead from the parameter past this watch
        self._mode = _Mode(self)
        self._mode.__enter__()
        self._state = "open"
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._state = "closed"
        self._mode.__exit__(kind, error, trace)
        run_compiled()
        for hook in self._hooks:
            hook.remove()
        for entry in self._every:
            del _watched[id(entry.parameter)]
        for parameter in self._hooked:
            if not parameter._backward_hooks:
                parameter._backward_hooks = None
        self._claims.close()
        for use in list(self._uses):
            use.handle.remove()
            use.spend()
        for module_use in list(self._module_uses):
            module_use.spend()
        del self._mode, self._hooks, self._hooked
        self._entries = {id(entry.parameter): entry for entry in self._every}
        self._sharded = []
        self._uses.clear()
        self._edges.clear()
        self._module_uses.clear()
        self._module_edges.clear()
        self._runs.clear()
        del self._turned, self._shared
        if kind is not None:
            return
        if self._unseen:
            raise RuntimeError(
                f"{', '.join(self._unseen)} received a gradient through a use that the record did not see: a forward "
                f"outside of the record or in another thread, a custom autograd.Function, a scripted or traced "
                f"module. Run forward and backward inside the record, or leave these parameters out with parameters="
            )
        if self.backwards == 0:
            raise RuntimeError(
                "the record received nothing: no backward through a recorded parameter ran inside it; put both "
                "forward and backward inside the `with` block"
            )

    def _claimed(self, chosen: list[Named]) -> list[Claim]:
        """The modules that answer for recorded parameters themselves."""
        claims: dict[nn.Module, Claim] = {}
        for named in chosen:
            for module, name in named.claimants():
                claim = claims.setdefault(module, Claim(module, registered(module)))
                claim.entries[name] = self._entries[id(named.parameter)]
        return list(claims.values())

    def _await_gradient(self, entry: Entry, parameter: torch.Tensor) -> None:
        self._hooks.append(parameter.register_hook(lambda grad: self._arrived(entry, grad)))
        self._hooked.append(parameter)

    # --- forward ---------------------------------------------------------------------------------------------------

    def _resolve(self, args: tuple) -> None:
        """FSDP2 puts whole parameters, other tensors than the sharded ones, into the modules while these run."""
        for arg in args:
            if isinstance(arg, (list, tuple)):
                self._resolve(tuple(arg))
            elif isinstance(arg, torch.nn.Parameter) and arg.requires_grad and id(arg) not in self._entries:
                for entry, owners in self._sharded:
                    if any(module._parameters.get(name) is arg for module, name in owners):
                        self._entries[id(arg)] = entry
                        self._await_gradient(entry, arg)

    def _led(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """A module that flattens its input is called: the shape says where the batch is."""
        input = args[0] if args else next(iter(kwargs.values()))
        self._leads.update((id(parameter), input.shape[:-1]) for parameter in module._parameters.values())

    def _turn(self, out: torch.Tensor, entry: Entry) -> None:
        """A transpose of a parameter is known as long as it lives."""
        key, known, living = id(out), self._entries, self._turned

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
            and id(args[0]) in self._entries
            and id(args[0]) not in self._turned
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
            if differentiable(changed, self._entries):
                self._refuse(func, used, "has no per-example route")
            return out
        try:
            call = route(*args, **kwargs)
        except NotImplementedError as error:
            raise NotImplementedError(f"{', '.join(entry.name for entry in used)}: {error}") from None
        if self._sharded and any(is_dtensor(parameter) for parameter in call.parameters.values()):
            self._refuse(func, used, "is used as a DTensor (tensor parallelism), which has no per-example route")
        entries = {
            role: self._entries[id(parameter)]
            for role, parameter in call.parameters.items()
            if parameter is not None and self._entries.get(id(parameter)) in used
        }
        turns = [role for role in entries if id(call.parameters[role]) in self._turned]
        if isinstance(call, MatmulCall):
            for parameter in call.parameters.values():
                call.lead = self._leads.pop(id(parameter), call.lead)
        if torch.is_grad_enabled():
            args, kwargs = autocast_input(call, args, kwargs)
        first = torch._C._autograd._get_sequence_nr()
        out = func(*args, **kwargs)
        if not out.requires_grad:
            for entry in used:
                entry.hidden += 1
            return out
        if len(entries) != len(used) or (turns and not (call.turns and turns == ["weight"])):
            self._refuse(func, used, "is used in a place of this function that has no per-example route")
        self._spans.update(range(first, torch._C._autograd._get_sequence_nr()))
        use = self._wait_for(call, entries, out)
        use.turned = bool(turns)
        dim = self._layout.dim
        if call.shareable and (isinstance(call, EmbeddingCall) or (dim < out.dim() and out.shape[dim] == 1)):
            self._shared.watch(out, Root(gradient_edge(out), out.shape, weakref.ref(use), call))
        return out

    def _meets(self, root: Root, expanded: torch.Tensor, met: Met, dim: int) -> None:
        """A shared output meets the batch: wait for the gradient of its expansion."""
        use = root.use()
        if use is None:
            return
        edge = GradientEdge(expanded.grad_fn, expanded.output_nr)  # type: ignore[arg-type]
        again = Use(repeated(root.call, expanded.shape[dim]), use.entries, edge, expanded.shape, use.root, self._fired)
        again.met, again.turned = (met, dim), use.turned
        self._uses.add(again)
        if self._keeps_edges:
            self._edges.append((again, edge))

    def _wait_for(self, call: Call, entries: dict[str, Entry], out: torch.Tensor) -> Use:
        call.held = None if call.held is None or call.light.issuperset(entries) else call.held.detach()
        root = self._repeated(entries)
        edge = gradient_edge(out)
        use = Use(call, entries, edge, out.shape, root, self._fired)
        self._uses.add(use)
        if self._keeps_edges:
            self._edges.append((use, edge))
        return use

    def _repeated(self, entries: dict[str, Entry]) -> int | None:
        """The backward in which a checkpoint recomputes, to which whatever comes of it belongs; else None."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        root = self._roots.get(task, task)
        self._open_run(root)
        for entry in entries.values():
            entry.hidden = max(0, entry.hidden - 1)
        return root

    def _module_called(self, claim: Claim, call: ModuleCall, outputs: list[torch.Tensor], first: int) -> None:
        if not outputs:
            for entry in claim.entries.values():
                entry.hidden += 1
            return
        span = range(first, torch._C._autograd._get_sequence_nr())
        for entry in claim.entries.values():
            entry.spans.append(span)
        root = self._repeated(claim.entries)
        use = ModuleUse(claim, call, outputs, root, self._module_fired, self._keeps_edges)
        self._module_uses.add(use)
        if self._keeps_edges:
            self._module_edges.append(use)

    def _refuse(self, func: Any, used: list[Entry], why: str) -> None:
        names = ", ".join(dict.fromkeys(entry.name for entry in used))
        raise NotImplementedError(
            f"{names} {why}: {resolve_name(func) or getattr(func, '__name__', func)} uses it in a differentiable way. "
            f"Leave it out with parameters=, compute this term outside of the record (a penalty on the weights is the "
            f"same for every example), or call the parameter through its layer"
        )

    # --- backward --------------------------------------------------------------------------------------------------

    def backward(self, losses: torch.Tensor) -> None:
        """Streams the gradients of ``losses.sum()`` to the consumer. No parameter gradient is computed.

        ``.grad`` is not touched, and the time of the weight-gradient products is saved. The graph is freed.

        Args:
            losses: per-example losses [B], computed inside this watch.
        """
        if self._state != "open":
            raise RuntimeError("backward must be called inside the `with` block that watched the forward")
        if losses.dim() != 1 or not losses.requires_grad:
            raise ValueError(
                f"losses must be per-example losses [B] with a graph, got shape {list(losses.shape)} and "
                f"requires_grad={losses.requires_grad}; use reduction='none' and compute them inside the watch"
            )
        edges, self._edges = [(use, edge) for use, edge in self._edges if not use.spent], []
        modules, self._module_edges = [use for use in self._module_edges if not use.spent], []
        module_edges = [edge for use in modules for edge in use.edges]
        # The sum over examples must be the gradient, so the claimed parameters' gradients are asked for too.
        sums = [entry for entry in self._every if entry.name in self._claims.names] if modules else []
        if not edges and not modules:
            raise RuntimeError("no watched layer was called since the last backward; compute losses inside the watch")
        self._plan = run = Backward(planned=True)
        self._begun(run)
        try:
            inputs: list[Any] = [*(edge for _, edge in edges), *module_edges, *(entry.parameter for entry in sums)]
            grads: list[Any] = list(torch.autograd.grad(losses.sum(), inputs, allow_unused=True))
            # A node that only had to deliver its gradient, not pass it on, was not run, so its hook did not fire.
            for (use, _), grad in zip(edges, grads):
                if grad is not None and not use.spent:
                    self._fired(use, grad)
            rest = grads[len(edges) :]
            del grads
            for module_use in modules:
                count = len(module_use.edges)
                self._module_done(module_use, rest[:count])
                del rest[:count]
            run.grads = {entry.name: grad for entry, grad in zip(sums, rest) if grad is not None}
        finally:
            self._plan = None
        if run.B is not None and losses.shape[0] != run.B:
            raise ValueError(
                f"losses must be [{run.B}] (the number of examples that {run.leader} saw), got {list(losses.shape)}; "
                f"pass one loss per example, or say where the batch is with batch_dim= or batch_size="
            )
        self._close_run(run)

    def _backward_call(self, func: Any, args: tuple, kwargs: dict) -> Any:
        tensors = started_from(func, args, kwargs)
        check_graph(tensors, self._entries, self._spans, self._shared.guarded)
        if func is not torch.autograd.grad and any(entry.hidden for entry in self._every):
            call = engine_arguments(tensors, *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})
            if call is not None:
                engine = torch.autograd.Variable._execution_engine
                with self._mode:  # a torch function runs without the mode, which must see what a checkpoint repeats
                    engine.run_backward(*call, allow_unreachable=True, accumulate_grad=True)
                return None
        return func(*args, **kwargs)

    def _open_run(self, root: int) -> Backward:
        run = self._runs.get(root)
        if run is None:
            run = self._runs[root] = Backward()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_run(root))
            self._begun(run)
        return run

    def _run_of(self, use: Use | ModuleUse) -> Backward:
        if self._plan is not None:
            return self._plan
        task = torch._C._current_graph_task_id()
        if use.root is not None:
            self._roots[task] = use.root
        return self._open_run(self._roots.get(task, task))

    def _fired(self, use: Use, grad: torch.Tensor | None) -> None:
        if self._state != "open":
            return
        if torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{use.names()}: create_graph=True inside a record: a gradient of a gradient has no per-example "
                f"route. Compute this term outside of the record"
            )
        run = self._run_of(use)
        if grad is None:
            run.blank.update(entry.name for entry in use.entries.values())
            return
        use.check_version()
        if use.shared and use.plain and use.root is not None:  # no walk over the graph saw what a checkpoint repeats
            raise NotImplementedError(seen_twice(use.names(), use.plain))
        with self._quiet():
            grad = grad.detach().reshape(use.shape)
            made = {} if use.shared else {role: self._factors(run, use, role, grad) for role in use.entries}
            if not keeps_graph():
                use.spend()
            for role, entry in use.entries.items():
                self._take(run, entry, made.get(role), use.spent)

    def _module_fired(self, use: ModuleUse, grads: list[torch.Tensor | None]) -> None:
        if self._state != "open" or self._plan is not None:
            return
        if torch.is_grad_enabled():
            raise NotImplementedError(
                f"{use.names()}: create_graph=True inside a record: a gradient of a gradient has no per-example "
                f"route. Compute this term outside of the record"
            )
        self._module_done(use, grads)

    def _module_done(self, use: ModuleUse, grads: list[torch.Tensor | None]) -> None:
        run = self._run_of(use)
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            run.blank.update(entry.name for entry in use.entries.values())
            return
        with self._quiet():
            rerun.running = True
            try:
                made = use.factors(grads)
            except (NotImplementedError, ExampleMismatchError) as error:
                raise type(error)(f"{use.names()}: {error}") from error
            finally:
                rerun.running = False
            if not keeps_graph():
                use.spend()
            for role, entry in use.entries.items():
                self._check_B(run, entry.name, made[role].B, use.shape)
                self._take(run, entry, made[role], use.spent)

    def _factors(self, run: Backward, use: Use, role: str, grad: torch.Tensor) -> Factors:
        name = use.entries[role].name
        layout = self._layout
        try:
            if use.met is not None:
                grad, layout = use.met[0].per_example(grad, use.met[1]), BatchLayout()
            factors = use.call.factors(role, grad, layout)
            if use.turned and role == "weight":
                factors = turned(factors)
        except ValueError as error:
            raise ValueError(f"{name}: its layer {error}") from error
        self._check_B(run, name, factors.B, use.shape)
        return factors

    def _check_B(self, run: Backward, name: str, B: int, shape: torch.Size) -> None:
        expected, leader = (run.B, run.leader) if self._layout.size is None else (self._layout.size, "batch_size")
        if expected is None:
            run.B, run.leader = B, name
        elif expected != B:
            raise ValueError(
                f"{name}: its layer's output {list(shape)} has {B} examples, but {leader} has {expected}. "
                f"If the batch is the second dimension pass batch_dim=1; if examples have several rows here pass "
                f"batch_size=; if the output serves all examples, expand it to the batch before anything else uses "
                f"it; or leave this layer out with parameters="
            )
        else:
            run.B, run.leader = expected, leader

    def _take(self, run: Backward, entry: Entry, factors: Factors | None, spent: bool) -> None:
        if factors is None and entry.name not in run.stash:
            return
        if entry.name in run.consumed:
            raise RuntimeError(
                f"{entry.name}: a use was recomputed after the parameter's per-example gradients were complete; "
                f"checkpoint it with use_reentrant=False, or leave it out with parameters="
            )
        run.seen.add(entry.name)
        stash = run.stash.setdefault(entry.name, [])
        if factors is not None:
            stash.append(factors)
        if spent and entry.live == 0 and entry.hidden == 0:
            self._release(run, entry.name)

    def _release(self, run: Backward, name: str) -> None:
        parts = run.stash.pop(name)
        while len(parts) > 1:  # pairwise, so that n uses are copied log n times
            parts = [a.concat(b) for a, b in zip(parts[::2], parts[1::2])] + parts[len(parts) & ~1 :]
        run.consumed.add(name)
        # Dense sums cost little; multiplying factors out is worth it once, since a registered function stays the same.
        if name in self._claims.names and (isinstance(parts[0], DenseFactors) or self.backwards == 0):
            total = parts[0].grads.sum(0) if isinstance(parts[0], DenseFactors) else parts[0].moments()[0]
            run.sums[name] = total, float(parts[0].sqnorm().sqrt().sum())
        self._consume(run, name, parts[0])

    def _arrived(self, entry: Entry, grad: torch.Tensor | None) -> None:
        if grad is None or self._plan is not None:
            return
        task = torch._C._current_graph_task_id()
        run = self._runs.get(self._roots.get(task, task))
        if run is not None and entry.name in run.seen:
            run.received.add(entry.name)
            if entry.name in self._claims.names:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    before = run.grads.get(entry.name)
                    run.grads[entry.name] = grad.detach().clone() if before is None else before + grad
            self._received(run, entry.name, grad)
        elif run is None or entry.name not in run.blank:
            self._unseen[entry.name] = None

    def _end_run(self, root: int) -> None:
        run = self._runs.pop(root, None)
        self._roots = {task: r for task, r in self._roots.items() if r != root}
        if run is None or self._state != "open" or run.B is None:
            return
        unasked = [name for name in self.names if name in run.seen and name not in run.received]
        if unasked:
            raise RuntimeError(
                f"a backward inside the record passed through {', '.join(unasked)} without computing their gradient "
                f"(torch.autograd.grad or backward(inputs=...) of something else): run it outside of the record"
            )
        self._edges = [(use, edge) for use, edge in self._edges if not use.spent]
        self._close_run(run)

    def _close_run(self, run: Backward) -> None:
        with self._quiet():
            for name in list(run.stash):
                self._release(run, name)
            for entry in self._every:
                alone = len(entry.parameter._backward_hooks or ()) == 1  # another hook may have changed the gradient
                if entry.name in run.sums and entry.name in run.grads and alone:
                    check_sum(entry.name, *run.sums[entry.name], run.grads[entry.name])
            self.backwards += 1
            self._finished(run)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """The state that ops expect, in whatever thread and under whatever modes backward runs."""
        threads = torch.get_num_threads()
        with torch._C.DisableTorchFunction(), torch.no_grad(), torch._C._DisableAutocast(), backend(self._backend):
            if threads != self._threads:
                torch.set_num_threads(self._threads)
            try:
                yield
            finally:
                if threads != self._threads:
                    torch.set_num_threads(threads)
