"""Outputs that serve every example at once (position embeddings, relative biases) and meet the batch by broadcasting.

Where such an output, or a view of it, meets the batch, it is expanded to the batch's shape first (stride 0). Autograd
adds up the same numbers in the same order, one node earlier; before that node every example's gradient is still there.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge
from torch.overrides import resolve_name

from ._constants import Constants
from ._uses import Use, differentiable
from .layers import BatchLayout, Call

_T = torch.Tensor
BROADCASTING = frozenset(
    (
        *(torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__),
        *(torch.sub, _T.sub, _T.sub_, _T.__sub__, _T.__rsub__, _T.__isub__),
        *(torch.mul, _T.mul, _T.mul_, _T.__mul__, _T.__rmul__, _T.__imul__),
    )
)
"""Elementwise functions of two tensors, the first two arguments."""
EXPANDING = frozenset((_T.expand, _T.expand_as, torch.broadcast_to, _T.broadcast_to))
VIEWING = frozenset(
    (
        *(_T.permute, torch.permute, _T.transpose, torch.transpose, _T.t, torch.t),
        *(_T.T.__get__, _T.mT.__get__),  # type: ignore[attr-defined]
        *(_T.unsqueeze, torch.unsqueeze, _T.squeeze, torch.squeeze, _T.view, _T.reshape, torch.reshape),
        *(_T.flatten, torch.flatten, _T.contiguous, _T.to, _T.float, _T.type_as, _T.__getitem__),
    )
)


class Root(NamedTuple):
    """The output of a routed call."""

    edge: GradientEdge
    shape: torch.Size
    use: weakref.ref[Use]
    call: Call  # with what it holds, as long as the output lives


class Met(NamedTuple):
    """An expansion to the batch: what turns its gradient into that of the root, an example at a time."""

    root: Root
    value: torch.Tensor | None  # a view of the root's output, or None for the output itself
    shape: torch.Size  # of value

    def per_example(self, grad: torch.Tensor, dim: int) -> torch.Tensor:
        """[…, B at dim, …] gradient of the expansion → [B, *root.shape]."""
        new = grad.dim() - len(self.shape)
        grad = grad.movedim(dim, 0)
        if not new:
            grad = grad.unsqueeze(1 + dim)  # back to size 1
        # What else was expanded is the same for all examples: new dimensions, and those of size 1.
        others = list(range(1, new)) if new else []
        if others:
            grad = grad.sum(others)
        ones = [i for i, n in enumerate(self.shape, 1) if n == 1 and grad.shape[i] != 1]
        grad = grad.sum(ones, keepdim=True) if ones else grad
        if self.value is None:
            return grad
        if grad.dtype != self.value.dtype:
            grad = grad.to(self.value.dtype)
        with torch.enable_grad():  # the graph of a few views: nothing in it is watched
            (grad,) = torch.autograd.grad(self.value, self.root.edge, grad, retain_graph=True, is_grads_batched=True)
        return grad.reshape(grad.shape[0], *self.root.shape)


class Shared:
    """The outputs, and views of them, that may still meet the batch."""

    def __init__(self, layout: BatchLayout, spans: set[int], constants: Constants) -> None:
        self._layout, self.spans, self._constants = layout, spans, constants
        self._values: dict[int, tuple[weakref.ref[torch.Tensor], Root]] = {}
        self.guarded: dict[int, str] = {}  # sequence number of a node that only expansions may lead to → parameters

    def __bool__(self) -> bool:
        return bool(self._values)

    def watch(self, out: torch.Tensor, root: Root) -> None:
        key = id(out)
        values = self._values

        def gone(ref: Any) -> None:
            if key in values and values[key][0] is ref:
                del values[key]

        values[key] = (weakref.ref(out, gone), root)

    def find(self, args: Iterable[Any]) -> list[tuple[torch.Tensor, Root]]:
        found = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                known = self._values.get(id(arg))
                if known is not None and known[0]() is arg:
                    found.append((arg, known[1]))
            elif isinstance(arg, (list, tuple)):
                found += self.find(arg)
        return found

    def called(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        found: list[tuple[torch.Tensor, Root]],
        met: Callable[[Root, torch.Tensor, Met, int], None],
    ) -> Any:
        """Runs a function with a shared argument; ``met`` gets every expansion to the batch."""
        value, root = found[0]
        if func in VIEWING and len(found) == 1 and args and args[0] is value:
            out = func(*args, **kwargs)
            if out is not value and differentiable(out, {}):
                self.watch(out, root)
            return out
        if func in EXPANDING and args and args[0] is value:
            out = func(*args, **kwargs)
            dim = self._batch(root, value, out.shape)
            if dim is not None and out.requires_grad:
                self._meets(root, value, out, dim, met)
                return out
        elif func in BROADCASTING and len(args) > 1 and all(isinstance(arg, torch.Tensor) for arg in args[:2]):
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape)
            dims = [self._batch(root, value, shape) for value, root in found]
            if not any(arg in self._constants for arg in args[:2] if all(arg is not value for value, _ in found)):
                self._align(found, shape)
            if torch.is_grad_enabled() and len(found) - dims.count(None) == 1:
                (at,) = (i for i, dim in enumerate(dims) if dim is not None)
                value, root = found.pop(at)
                # In the result's dtype, so that autograd's sum over the examples is in it too.
                expanded = value.to(torch.result_type(args[0], args[1])).expand(shape)
                self._meets(root, value, expanded, dims[at] or 0, met)
                args = tuple(expanded if arg is value else arg for arg in args)
            out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        if out is not value and differentiable(out, {}):
            self.plain(found, func)
        return out

    def plain(self, found: list[tuple[torch.Tensor, Root]], func: Callable) -> None:
        """A use that is no expansion: either all of a root's uses are, or none."""
        for _, root in found:
            use = root.use()
            if use is not None:
                use.plain = resolve_name(func) or getattr(func, "__name__", str(func))

    def _align(self, found: list[tuple[torch.Tensor, Root]], shape: torch.Size) -> None:
        """What meets the batch with a row for every example has its examples there, whatever it was made from."""
        dim = self._layout.dim
        for value, root in found:
            use = root.use()
            if use is not None and value.dim() == len(shape) > dim and value.shape[dim] == shape[dim]:
                use.constant = False

    def _batch(self, root: Root, value: torch.Tensor, shape: torch.Size) -> int | None:
        """The dimension of ``shape`` that has the batch and that ``value`` does not have; None where there is none."""
        new = len(shape) - value.dim()
        dim = self._layout.dim
        if dim >= len(shape):
            return None
        ordinary = dim < len(root.shape) and root.shape[dim] == 1  # a batch of one, as long as it meets no larger one
        if shape[dim] == 1 and ordinary:
            return None
        return dim if dim < new or (not new and value.shape[dim] == 1) else None

    def _meets(self, root: Root, value: torch.Tensor, expanded: torch.Tensor, dim: int, met: Any) -> None:
        use = root.use()
        if use is None:
            return
        use.shared = True
        end, node = root.edge.node, expanded.grad_fn
        while node is not None:
            self.spans.add(node._sequence_nr())
            if node is end:
                break
            node = node.next_functions[0][0]
            if node is not None:
                self.guarded[node._sequence_nr()] = use.names()
        itself = value.grad_fn is root.edge.node and value.shape == root.shape
        met(root, expanded, Met(root, None if itself else value, value.shape), dim)


def repeated(call: Call, n: int) -> Call:
    """The call as if each of n examples had made it with the one input."""
    other = copy.copy(call)
    if call.held is not None:
        other.held = call.held.detach().expand(n, *call.held.shape)
    return other
