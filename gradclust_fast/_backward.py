"""Backward passes of an open watch: which factors belong together, and when a parameter has all of its own."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge

from ._claims import ModuleUse, check_sum, rerun
from ._constants import rows_differ
from ._dispatch import current_backend, forced_backend
from ._fused import linked
from ._graphs import keeps_graph, seen_twice
from ._uses import Entry, Use
from .layers import BatchLayout, DenseFactors, Factors, turned
from .layers.recompute import ExampleMismatchError

if TYPE_CHECKING:
    from .watching import Watch


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


class Quiet:
    """Context manager: no torch function modes, gradients or autocast; a backend and a number of threads."""

    __slots__ = ("_autocast", "_backend", "_functions", "_grad", "_threads", "_threads_before", "_token")
    _autocast: Any
    _functions: Any
    _grad: bool | None
    _threads_before: int | None
    _token: Any

    def __init__(self, backend: str, threads: int) -> None:
        self._backend, self._threads = backend, threads
        self._functions = self._grad = self._autocast = self._token = self._threads_before = None

    def __enter__(self) -> None:
        try:
            functions = torch._C.DisableTorchFunction()
            functions.__enter__()
            self._functions = functions
            self._grad = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            if torch._C._is_any_autocast_enabled():
                autocast = torch._C._DisableAutocast()
                autocast.__enter__()
                self._autocast = autocast
            self._token = forced_backend.set(self._backend)
            threads = torch.get_num_threads()
            if threads != self._threads:
                self._threads_before = threads
                torch.set_num_threads(self._threads)
        except BaseException:  # an interruption
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        if self._threads_before is not None:
            torch.set_num_threads(self._threads_before)
        if self._token is not None:
            forced_backend.reset(self._token)
        if self._autocast is not None:
            self._autocast.__exit__(None, None, None)
        if self._grad is not None:
            torch._C._set_grad_enabled(self._grad)
        if self._functions is not None:
            self._functions.__exit__(None, None, None)


class Backwards:
    """The uses that wait for a gradient, and the passes that bring it.

    Args:
        watch: hears of every pass, of every parameter's factors and of every parameter's gradient.
        every: the watched parameters.
        claimed: names of those whose per-example gradients must add up to what autograd computes.
        keep_edges: whether ``planned`` will be called; it keeps the graph of every forward alive until its backward.
    """

    def __init__(
        self, watch: Watch, every: list[Entry], claimed: set[str], layout: BatchLayout, keep_edges: bool
    ) -> None:
        self.watch, self.every, self.claimed = watch, every, claimed
        self.layout, self.keep_edges = layout, keep_edges
        self.open = True
        self.uses: weakref.WeakSet[Use] = weakref.WeakSet()
        self.module_uses: weakref.WeakSet[ModuleUse] = weakref.WeakSet()
        self.unseen: dict[str, None] = {}  # parameters that received a gradient through no known use
        self._backend, self._threads = current_backend(), torch.get_num_threads()
        self._edges: list[tuple[Use, GradientEdge]] = []
        self._module_edges: list[ModuleUse] = []
        self._runs: dict[int, Backward] = {}  # by graph task; a nested backward belongs to the one that started it
        self._roots: dict[int, int] = {}
        self._plan: Backward | None = None
        self._hooked: list[torch.Tensor] = []
        self._hooks: list[Any] = []
        for entry in every:
            self.await_gradient(entry, entry.parameter)

    def close(self) -> None:
        """No gradient is waited for any more."""
        self.open = False
        for hook in self._hooks:
            hook.remove()
        for parameter in self._hooked:
            if not parameter._backward_hooks:
                parameter._backward_hooks = None
        for use in list(self.uses):
            use.handle.remove()
            use.spend()
        for module_use in list(self.module_uses):
            module_use.spend()
        self.uses.clear()
        self.module_uses.clear()
        self._edges, self._module_edges, self._hooks, self._hooked = [], [], [], []
        self._runs.clear()

    def await_gradient(self, entry: Entry, parameter: torch.Tensor) -> None:
        """``parameter`` is the watched one, or what stands for it in the graph."""
        self._hooks.append(parameter.register_hook(lambda grad: self._arrived(entry, grad)))
        self._hooked.append(parameter)

    def wait_for(self, use: Use, edge: GradientEdge) -> None:
        self.uses.add(use)
        if self.keep_edges:
            self._edges.append((use, edge))

    def wait_for_module(self, use: ModuleUse) -> None:
        self.module_uses.add(use)
        if self.keep_edges:
            self._module_edges.append(use)

    def planned(self, losses: torch.Tensor) -> None:
        """A pass of its own through everything that waits; it computes no gradient of a parameter with a route."""
        edges, self._edges = [(use, edge) for use, edge in self._edges if not use.spent], []
        modules, self._module_edges = [use for use in self._module_edges if not use.spent], []
        module_edges = [edge for use in modules for edge in use.edges]
        # The sum over examples must be the gradient, so the claimed parameters' gradients are asked for too.
        sums = [entry for entry in self.every if entry.name in self.claimed] if modules else []
        if not edges and not modules:
            raise RuntimeError("no watched layer was called since the last backward; compute losses inside the watch")
        self._plan = run = Backward(planned=True)
        self.watch._begun(run)
        try:
            inputs: list[Any] = [*(edge for _, edge in edges), *module_edges, *(entry.parameter for entry in sums)]
            grads: list[Any] = list(torch.autograd.grad(losses.sum(), inputs, allow_unused=True))
            # A node that only had to deliver its gradient, not pass it on, was not run, so its hook did not fire.
            for (use, _), grad in zip(edges, grads):
                if grad is not None and not use.spent:
                    self.fired(use, grad)
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

    def repeated(self, entries: dict[str, Entry]) -> int | None:
        """The backward in which a checkpoint recomputes, to which whatever comes of it belongs; else None."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        root = self._roots.get(task, task)
        self._open_run(root)
        for entry in entries.values():
            entry.hidden = max(0, entry.hidden - 1)
        return root

    def _open_run(self, root: int) -> Backward:
        run = self._runs.get(root)
        if run is None:
            run = self._runs[root] = Backward()
            torch.autograd.Variable._execution_engine.queue_callback(lambda: self._end_run(root))
            self.watch._begun(run)
        return run

    def _run_of(self, use: Use | ModuleUse) -> Backward:
        if self._plan is not None:
            return self._plan
        task = torch._C._current_graph_task_id()
        if use.root is not None:
            self._roots[task] = use.root
        return self._open_run(self._roots.get(task, task))

    def fired(self, use: Use, grad: torch.Tensor | None) -> None:
        if not self.open:
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
        if use.constant and not use.shared and self.layout.size is None:
            self._check_rows(use)
        if use.link is not None:
            use.link.arrived(grad)
        with self.quiet():
            grad = grad.detach().reshape(use.shape)
            made = {} if use.shared else {role: self._factors(run, use, role, grad) for role in use.entries}
            if not keeps_graph():
                use.spend()
            for role, entry in use.entries.items():
                self._take(run, entry, made.get(role), use.spent)

    def module_fired(self, use: ModuleUse, grads: list[torch.Tensor | None]) -> None:
        if not self.open or self._plan is not None:
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
        with self.quiet():
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
        layout = self.layout
        try:
            if use.met is not None:
                grad, layout = use.met[0].per_example(grad, use.met[1]), BatchLayout()
            factors = use.call.factors(role, grad, layout)
            if use.turned and role == "weight":
                factors = turned(factors)
            if use.link is not None and role == "weight":
                factors = linked(factors, use.link)
        except ValueError as error:
            raise ValueError(f"{name}: its layer {error}") from error
        self._check_B(run, name, factors.B, use.shape)
        return factors

    def _check_rows(self, use: Use) -> None:
        """The rows of a constant that differ are positions, or a table's; as many as examples only by accident."""
        held = use.call.held
        with self.quiet():
            if held is None or not rows_differ(held, min(self.layout.dim, held.dim() - 1)):
                return
        raise NotImplementedError(
            f"{use.names()}: its layer's input {list(held.shape)} does not depend on the batch, and "
            f"{use.plain or 'what follows'} uses its output {list(use.shape)} for all examples at once. Expand the "
            f"output to the batch first, out.expand(B, ...); if the input's rows are the examples, pass batch_size=; "
            f"or leave this layer out with parameters="
        )

    def _check_B(self, run: Backward, name: str, B: int, shape: torch.Size) -> None:
        expected, leader = (run.B, run.leader) if self.layout.size is None else (self.layout.size, "batch_size")
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
        if name in self.claimed and (isinstance(parts[0], DenseFactors) or self.watch.backwards == 0):
            total = parts[0].grads.sum(0) if isinstance(parts[0], DenseFactors) else parts[0].moments()[0]
            run.sums[name] = total, float(parts[0].sqnorm().sqrt().sum())
        self.watch._consume(run, name, parts[0])

    def _arrived(self, entry: Entry, grad: torch.Tensor | None) -> None:
        if grad is None or self._plan is not None:
            return
        task = torch._C._current_graph_task_id()
        run = self._runs.get(self._roots.get(task, task))
        if run is not None and entry.name in run.seen:
            run.received.add(entry.name)
            if entry.name in self.claimed:
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    before = run.grads.get(entry.name)
                    run.grads[entry.name] = grad.detach().clone() if before is None else before + grad
            self.watch._received(run, entry.name, grad)
        elif run is None or entry.name not in run.blank:
            self.unseen[entry.name] = None

    def _end_run(self, root: int) -> None:
        run = self._runs.pop(root, None)
        self._roots = {task: r for task, r in self._roots.items() if r != root}
        if run is None or not self.open or run.B is None:
            return
        asked = [entry.name for entry in self.every if entry.name in run.seen]
        unasked = [name for name in asked if name not in run.received]
        if unasked:
            raise RuntimeError(
                f"a backward inside the record passed through {', '.join(unasked)} without computing their gradient "
                f"(torch.autograd.grad or backward(inputs=...) of something else): run it outside of the record"
            )
        self._edges = [(use, edge) for use, edge in self._edges if not use.spent]
        self._close_run(run)

    def _close_run(self, run: Backward) -> None:
        with self.quiet():
            for name in list(run.stash):
                self._release(run, name)
            for entry in self.every:
                alone = len(entry.parameter._backward_hooks or ()) == 1  # another hook may have changed the gradient
                if entry.name in run.sums and entry.name in run.grads and alone:
                    check_sum(entry.name, *run.sums[entry.name], run.grads[entry.name])
            self.watch.backwards += 1
            self.watch._finished(run)

    def quiet(self) -> Quiet:
        """The state that ops expect, in whatever thread and under whatever modes backward runs."""
        return Quiet(self._backend, self._threads)
