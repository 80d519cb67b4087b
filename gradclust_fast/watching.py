"""Sees every use of a model's parameters in an ordinary forward and streams their per-example factors in backward.

A torch-function mode looks at each torch call that has a watched parameter among its arguments. Calls with a route
(``layers``) get a hook on the node that will receive their output's gradient; any other differentiable use raises on
the spot. Nothing is wrapped or swapped, and gradients are only read.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ._arguments import integer
from ._backward import Backward, Backwards
from ._claims import claims_of
from ._compiled import run_compiled, run_eagerly
from ._forward import Forward
from ._uses import Entry, is_dtensor
from .layers import BatchLayout, Factors
from .selection import Parameters, select

_watched: dict[int, str] = {}  # id of every parameter that some open watch watches, and its name
idle: dict[int, Callable[[], None]] = {}
"""id of every parameter whose watch sleeps between a forward and its backward, and what ends that watch."""


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

    _fused = False  # whether weight gradients of linear layers come out of the pass that makes the norms
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
        batch_dim = integer("batch_dim", batch_dim)
        if batch_dim not in (0, 1):
            raise ValueError(f"batch_dim must be 0 or 1, got {batch_dim!r}; move the batch to one of these dimensions")
        if batch_size is not None:
            batch_size = integer("batch_size (the number of examples, or None)", batch_size, 0)
        self.model, self._consumer, self._parameters = model, consume, parameters
        self._layout = BatchLayout(batch_dim, batch_size)
        self.backwards = 0
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
        self.names = [named.name for named in chosen]
        self._every = [Entry(named) for named in chosen]
        claims = claims_of(chosen, self._every)
        claimed = {entry.name for claim in claims for entry in claim.entries.values()}
        with ExitStack() as undo:  # a module that cannot be hooked leaves nothing half open
            run_eagerly()
            undo.callback(run_compiled)
            self._backwards = Backwards(self, self._every, claimed, self._layout, self._keeps_edges)
            undo.callback(self._backwards.close)
            _watched.update((id(entry.parameter), entry.name) for entry in self._every)
            undo.callback(self._forget)
            self._forward = Forward(self.model, self._every, chosen, claims, self._layout, self._backwards, self._fused)
            torch.clear_autocast_cache()  # a cast from before would lead from the parameter past this watch
            self._forward.__enter__()
            undo.pop_all()
        self._state = "open"
        return self

    def _forget(self) -> None:
        for entry in self._every:
            del _watched[id(entry.parameter)]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._state = "closed"
        forward, backwards = self._forward, self._backwards
        del self._forward, self._backwards  # they lead back here: the results go as soon as their user drops them
        forward.__exit__(kind, error, trace)
        run_compiled()
        self._forget()
        forward.close()
        backwards.close()
        if kind is not None:
            return
        if backwards.unseen:
            raise RuntimeError(
                f"{', '.join(backwards.unseen)} received a gradient through a use that the record did not see: a "
                f"forward outside of the record or in another thread, a custom autograd.Function, a scripted or traced "
                f"module. Run forward and backward inside the record, or leave these parameters out with parameters="
            )
        if self.backwards == 0:
            raise RuntimeError(
                "the record received nothing: no backward through a recorded parameter ran inside it; put both "
                "forward and backward inside the `with` block"
            )

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
        self._backwards.planned(losses)
