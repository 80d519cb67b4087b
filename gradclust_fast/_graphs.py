"""What recording needs to know about autograd's graph and its engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from ._uses import Entries

BACKWARDS = frozenset((torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad))
"""The functions that start a backward."""


TURNS = frozenset(
    (
        *(torch.t, torch.Tensor.t, torch.Tensor.T.__get__, torch.Tensor.mT.__get__),  # type: ignore[attr-defined]
        *(torch.transpose, torch.Tensor.transpose),
    )
)
"""The functions that transpose a matrix."""


def check_graph(
    tensors: Iterable[Any], entries: Entries, seen: Collection[int], guarded: Mapping[int, str] | None = None
) -> None:
    """Every edge into a watched parameter must come from a node that a routed call made.

    Args:
        tensors: tensors or gradient edges that a backward starts from.
        seen: sequence numbers of the nodes that routed calls made.
        guarded: sequence number → parameters, of further nodes that are held to the same.
    """
    stack = [tensor.grad_fn if isinstance(tensor, torch.Tensor) else tensor.node for tensor in tensors]
    visited = set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        for child, _ in node.next_functions:
            if type(child).__name__ != "AccumulateGrad":
                stack.append(child)
                name = guarded.get(child._sequence_nr()) if guarded and child is not None else None
                if name is not None and node._sequence_nr() not in seen:
                    raise NotImplementedError(seen_twice(name, node.name()))
                continue
            entry = entries.get(id(child.variable))  # type: ignore[union-attr]
            if entry is None or any(node._sequence_nr() in span for span in reversed(entry.spans)):
                continue
            if node._sequence_nr() not in seen:
                raise NotImplementedError(
                    f"{entry.name} was used by {node.name()} in a way that the record did not see (a custom "
                    f"autograd.Function, a forward outside of the record, a gradient of a gradient). Leave it out "
                    f"with parameters=, or call the parameter through its layer inside the record"
                )


def seen_twice(names: str, function: str) -> str:
    return (
        f"{names}: the layer's output meets the batch by broadcasting, or its transpose is a product's weight, and "
        f"it is also used by {function}, where no example's own gradient is known. Expand the output once "
        f"(out.expand(B, ...)) and use the expansion everywhere, or leave these parameters out with parameters="
    )


def started_from(func: Any, args: tuple, kwargs: dict) -> tuple[Any, ...]:
    """The tensors that one of ``BACKWARDS`` starts from."""
    name = {torch.autograd.grad: "outputs", torch.autograd.backward: "tensors"}.get(func, "self")
    tensors = args[0] if args else kwargs[name]
    return tuple(tensors) if isinstance(tensors, (list, tuple)) else (tensors,)


def engine_arguments(
    tensors: tuple[torch.Tensor, ...],
    gradients: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *rest: Any,
    **others: Any,
) -> tuple | None:
    """The engine's arguments for a backward into leaves; None for the forms that a reentrant checkpoint refuses."""
    gradients = others.pop("grad_tensors", others.pop("gradient", gradients))
    if any(value is not None for value in (*rest, *others.values())):
        return None
    if gradients is None or isinstance(gradients, torch.Tensor):
        gradients = (gradients,) * len(tensors)
    if any(grad is None and tensor.numel() != 1 for grad, tensor in zip(gradients, tensors)):
        return None
    grads = tuple(torch.ones_like(t) if g is None else g for t, g in zip(tensors, gradients))
    return tensors, grads, create_graph if retain_graph is None else retain_graph, create_graph, ()


def keeps_graph() -> bool:
    """Whether the running backward retains its graph; False outside of one, True where torch cannot tell."""
    if torch._C._current_graph_task_id() == -1:
        return False
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if tell is None else tell()
