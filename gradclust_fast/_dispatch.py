"""The op registry: one schema, one reference and any number of kernels per op; which of them runs, and why."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
OPS: dict[str, Op] = {}

_library = torch.library.Library("gradclust_fast", "DEF")
forced_backend: ContextVar[str | None] = ContextVar("gradclust_fast_backend", default=None)


_MISMATCH = re.compile(
    r"Expected a value of type '(?P<kind>[^']+)' for argument '(?P<name>\w+)' but instead found type "
    r"'(?P<found>[^']+)'\.\s+Position: (?P<position>\d+)"
)
"""How torch's dispatcher says that an argument is of the wrong type."""
_KINDS = {
    "Tensor": ("a torch.Tensor", "convert it with torch.as_tensor"),
    "int": ("an integer", "pass a whole number"),
    "float": ("a number", "convert it with float()"),
    "bool": ("True or False", "pass one of them"),
}


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be 'auto' or one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def current_backend() -> str:
    """The backend in force in this thread: ``gf.backend``'s, else ``GRADCLUST_BACKEND``, else ``auto``."""
    name = forced_backend.get()
    if name is None:
        name = _checked(os.environ.get("GRADCLUST_BACKEND") or "auto", "GRADCLUST_BACKEND")
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every op in this thread onto one backend. A forced backend never falls back; it raises.

    Args:
        name: ``"auto"`` (chosen per call), ``"reference"`` (pure PyTorch), ``"cpu"`` (C++), ``"triton"`` or
            ``"cuda"``. ``GRADCLUST_BACKEND`` sets the default.

    Raises:
        ValueError: for any other name.
        RuntimeError: from an op that the backend cannot run, saying what is missing and how to get it.

    Example:
        >>> with gf.backend("reference"):
        ...     norms = gf.ops.grad_sqnorm(torch.ones(2, 3), torch.ones(2, 4))
    """
    token = forced_backend.set(_checked(name, "backend"))
    try:
        yield
    finally:
        forced_backend.reset(token)


@dataclass(frozen=True)
class Kernel:
    """One backend's version of an op. Every callable takes the op's own arguments."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    """Why this kernel cannot run on these arguments, or None."""
    loses: Callable[..., str | None]
    """Why ``auto`` should pass this kernel over (a measured crossover), or None."""
    route: Callable[..., str]
    """Which algorithm would run, and why."""


@dataclass(frozen=True)
class Explanation:
    """What ``gf.explain`` returns: the choice, its route, and why each other backend was not chosen."""

    op: str
    backend: str | None
    route: str
    others: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'nothing can run this'}{self.route and ' — ' + self.route}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.others.items()])


class Op:
    """An operator of ``torch.ops.gradclust_fast``. ``call`` runs it; backward through it raises.

    Args:
        schema: in torch's schema language, e.g. ``"grad_dot(Tensor act, Tensor grad) -> Tensor"``.
        check: raises on wrong arguments; called with the op's arguments before any kernel and in the fake kernel.
        fake: outputs with the right shape, dtype and device (``new_empty``).
        reference: pure PyTorch, the definition of correct; runs on every device.
        prepare: maps the public function's arguments to the op's, where they differ.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        reference_route: Callable[..., str] = lambda *_: "pure PyTorch",
        prepare: Callable[..., tuple] = lambda *args, **kwargs: (*args, *kwargs.values()),
    ) -> None:
        self.name = schema.split("(")[0]
        self.prepare = prepare
        self.check, self.fake, self.reference = check, fake, reference
        self.kernels: dict[str, Kernel] = {}
        self.kernel("reference", route=reference_route)(reference)
        _library.define(schema)
        _library.impl(self.name, self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gradclust_fast::{self.name}", self._fake, lib=_library)
        torch.library.register_autograd(f"gradclust_fast::{self.name}", self._no_backward, lib=_library)
        self.overload = getattr(torch.ops.gradclust_fast, self.name).default
        OPS[self.name] = self

    def call(self, *args: Any) -> Any:
        """The op through torch's dispatcher, as the public functions call it."""
        try:
            return self.overload(*args)
        except RuntimeError as error:
            wrong = _MISMATCH.search(str(error))  # the schema's own check, which comes before this op's
            if wrong is None:
                raise
            kind, name, value = wrong["kind"], wrong["name"], args[int(wrong["position"])]
            if kind.endswith(("int", "int]")) and isinstance(value, int):
                raise ValueError(f"{name} must fit into 64 bits, got {value}; pass a smaller one") from None
            expected, remedy = next(text for key, text in _KINDS.items() if key in kind)
            expected += " or None" if kind.startswith("Optional") else ""
            raise TypeError(f"{name} must be {expected}, got {wrong['found']}; {remedy}") from None

    def kernel(
        self,
        name: str,
        *,
        refuses: Callable[..., str | None] = lambda *_: None,
        loses: Callable[..., str | None] = lambda *_: None,
        route: Callable[..., str] = lambda *_: "",
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: registers a backend's version of this op."""

        def register(run: Callable[..., Any]) -> Callable[..., Any]:
            self.kernels[name] = Kernel(run, refuses, loses, route)
            return run

        return register

    def explain(self, *args: Any) -> Explanation:
        """Chooses without running."""
        forced = current_backend()
        order = (forced,) if forced != "auto" else ("cuda", "triton", "cpu", "reference")
        others = {}
        for name in order:
            kernel = self.kernels.get(name)
            if kernel is None:
                others[name] = f"{self.name} has no {name} version"
                continue
            reason = kernel.refuses(*args) or (kernel.loses(*args) if forced == "auto" else None)
            if reason is None:
                return Explanation(self.name, name, kernel.route(*args), others)
            others[name] = reason
        return Explanation(self.name, None, "", others)

    def choose(self, *args: Any) -> Kernel:
        forced = current_backend()
        if forced == "auto":
            # Triton's interpreter would run on the CPU too, and always lose.
            for name in ("cpu",) if args[0].device.type == "cpu" else ("cuda", "triton"):
                kernel = self.kernels.get(name)
                if kernel is not None and not kernel.refuses(*args) and not kernel.loses(*args):
                    return kernel
            return self.kernels["reference"]
        choice = self.explain(*args)
        if choice.backend is None:
            raise RuntimeError(
                f"{self.name}: backend {forced!r} was forced and cannot run: {choice.others[forced]}. "
                f"Use gf.backend('auto') to let gradclust_fast choose"
            )
        return self.kernels[choice.backend]

    def run(self, *args: Any) -> Any:
        """The op without torch's dispatcher (about 50 µs a call less): for eager code without autograd, as in hooks."""
        self.check(*args)
        kernel = self.choose(*args)
        try:
            if torch._C._is_any_autocast_enabled():  # the documented precision is the op's, not the caller's region's
                with torch._C._DisableAutocast():
                    return kernel.run(*args)
            return kernel.run(*args)
        except torch.OutOfMemoryError as error:  # its message names the size and the device
            raise torch.OutOfMemoryError(f"gradclust_fast::{self.name} ran out of memory: {error}") from error

    def _fake(self, *args: Any) -> Any:
        self.check(*args)
        return self.fake(*args)

    def _no_backward(self, *_: Any) -> None:
        raise RuntimeError(
            f"gradclust_fast::{self.name} is not differentiable; call it on detached tensors or under torch.no_grad()"
        )


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which kernel an op would run on these arguments, by which route, and why the others would not.

    Args:
        op: a function of ``gf.ops`` or its name.
        args, kwargs: what you would call it with. Nothing is computed.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        ValueError: for an unknown op, and whatever the op itself would raise on these arguments.

    Example:
        >>> print(gf.explain("grad_sqnorm", torch.ones(8, 4), torch.ones(8, 3)))  # doctest: +SKIP
    """
    from . import ops

    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"op must be a function of gf.ops or its name ({', '.join(sorted(OPS))}), got {op!r}")
    bound = inspect.signature(getattr(ops, name)).bind(*args, **kwargs)
    bound.apply_defaults()
    op_args = OPS[name].prepare(*bound.args, **bound.kwargs)
    OPS[name].check(*op_args)
    return OPS[name].explain(*op_args)
