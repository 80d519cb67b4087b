"""Any module, run again one example at a time: per-example gradients of the parameters that have no factored route.

The module's inputs are kept until the gradients of its outputs are known. Then ``torch.func`` differentiates the
module alone, a chunk of examples at a time, each as a batch of one; what cannot be vectorised runs in a loop. The
outputs must come out as they did in the forward, so a module that mixes examples is found out.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_flatten, tree_unflatten

from .base import BatchLayout, DenseFactors, Factors, accumulator

COST = "its module runs forward and backward once more; a gradient an example, as large as the parameter"

_CHUNK_BYTES = 64 << 20  # of per-example gradients in flight
_ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3}  # a different order of sums; 5e-2 for half precision


class ExampleMismatchError(RuntimeError):
    """A module gives one example something else than it gave it within its batch."""


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """Relative difference that two orders of summation may make (TF32 on a GPU)."""
    return max(_ROUNDING.get(dtype, 5e-2), 1e-2 if device.type == "cuda" and dtype == torch.float32 else 0)


@dataclass(frozen=True)
class Split:
    """Where the examples are in a tensor: ``rows`` rows each of dimension ``dim``, consecutive or strided."""

    dim: int
    rows: int = 1
    strided: bool = False

    def stack(self, tensor: Tensor, B: int) -> Tensor:
        """[B, *shape of one example as a batch of one]."""
        if self.strided:
            return tensor.unflatten(self.dim, (self.rows, B)).movedim(self.dim + 1, 0)
        return tensor.unflatten(self.dim, (B, self.rows)).movedim(self.dim, 0)


Splits = tuple[Split | None, ...]


class ModuleCall:
    """One call of a module.

    Args:
        module: what was called.
        parameters: {name inside the module: parameter} to differentiate; the others are constants.
        args, kwargs: what it was called with. Tensors are kept until :meth:`release`.
        layout: where the examples are, where the module's type does not say so.
    """

    def __init__(
        self, module: nn.Module, parameters: dict[str, nn.Parameter], args: tuple, kwargs: dict, layout: BatchLayout
    ) -> None:
        self.module, self.parameters, self.layout = module, parameters, layout
        leaves, self.spec = tree_flatten((args, kwargs))
        if any(isinstance(leaf, PackedSequence) for leaf in (*leaves, *args, *kwargs.values())):
            raise NotImplementedError(
                f"{type(module).__name__} got a PackedSequence, whose rows are not examples; pass the padded batch "
                f"and leave the padding out of the loss"
            )
        self.leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.versions = [_version(leaf) for leaf in self.leaves]
        device = next(iter(parameters.values())).device.type
        self.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self.vectorised = True
        self.outputs: list[Tensor] = []
        # In train mode a forward may move them on (spectral_norm); running it again starts where it started.
        self.buffers = _copies(module) if module.training else None

    def finish(self, output: Any, again: bool = True) -> list[Tensor]:
        """Takes the module's result; returns its tensors that carry a gradient.

        Args:
            again: whether :meth:`factors` will be asked.

        Raises:
            NotImplementedError: a result in which tensors cannot be found.
        """
        leaves, _ = tree_flatten(output)
        for leaf in leaves:
            if isinstance(leaf, PackedSequence) or not isinstance(
                leaf, (Tensor, int, float, str, bool, type(None), torch.dtype, torch.device)
            ):
                raise NotImplementedError(
                    f"{type(self.module).__name__} returns a {type(leaf).__name__}, whose tensors cannot be seen; "
                    f"return tensors, or tuples, lists or dicts of them"
                )
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        found = [leaves[i] for i in self.places]
        if found and again:
            self.outputs = [out.detach() for out in found]
            self.output_versions = [_version(out) for out in self.outputs]
            self._find_examples()
        return found

    def release(self) -> None:
        self.leaves, self.outputs, self.buffers = [], [], None

    def check_versions(self, names: str) -> None:
        for leaf, version in zip(self.leaves, self.versions):
            if version is not None and leaf._version != version:
                raise RuntimeError(
                    f"{names}: an input of {type(self.module).__name__} was modified in place between forward and "
                    f"backward (version {leaf._version}, expected {version}); use an out-of-place operation on it"
                )

    # --- where the examples are ------------------------------------------------------------------------------------

    def _find_examples(self) -> None:
        args, kwargs = tree_unflatten(list(range(len(self.leaves))), self.spec)
        known = _known_dims(self.module, args, kwargs, self.leaves)
        tensors = [i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if known is None and not tensors:
            raise NotImplementedError(
                f"{type(self.module).__name__} is called without a tensor, so nothing tells its examples apart; let "
                f"the module itself add or concatenate its parameters to the batch, which it gets as an argument"
            )
        splits: list[Split | None] = [None] * len(self.leaves)
        self.doubtful: list[int] = []  # inputs that only their size makes batches
        if known is not None:
            given, result = known
            lead = next(iter(given))
            self.B = self.layout.size or self.leaves[lead].shape[given[lead].dim]
            for i, split in given.items():
                if isinstance(self.leaves[i], Tensor) and self.leaves[i].shape[split.dim] == self.B * split.rows:
                    splits[i] = split
            outputs = [result[min(place, len(result) - 1)] for place in self.places]
            self.output_splits: Splits = tuple(
                Split(dim) if dim < out.dim() and out.shape[dim] == self.B else self._split(out)
                for dim, out in zip(outputs, self.outputs)
            )
        else:
            lead = tensors[0]
            first = self.leaves[lead]
            self.B = self.layout.size or first.shape[self._dim(first)]
            for i in tensors:
                splits[i] = self._split(self.leaves[i])
            self.doubtful = [i for i in tensors if i != lead and splits[i] is not None]
            self.output_splits = tuple(self._split(out) for out in self.outputs)
        self.input_splits: Splits = tuple(splits)

    def _dim(self, tensor: Tensor) -> int:
        """The layout's batch dimension. The last one of a tensor that is no index holds features."""
        return max(0, min(self.layout.dim, tensor.dim() - (2 if tensor.is_floating_point() else 1)))

    def _split(self, tensor: Tensor) -> Split | None:
        """By the layout's dimension; else by the only dimension that is as long as the batch."""
        if tensor.dim() == 0:
            return None
        dim = self._dim(tensor)
        size = tensor.shape[dim]
        if size == self.B:
            return Split(dim)
        if self.layout.size and size and size % self.B == 0:
            return Split(0, tensor.shape[0] // self.B, bool(self.layout.dim)) if tensor.shape[0] % self.B == 0 else None
        same = [d for d, n in enumerate(tensor.shape) if n == self.B]
        return Split(same[0]) if len(same) == 1 else None

    def _readings(self) -> Iterator[Splits]:
        """Every input as long as the batch as a part of it; then without the ones that may be so by accident."""
        doubtful = self.doubtful[:3]
        for count in range(len(doubtful) + 1):
            for shared in combinations(doubtful, count):
                yield tuple(None if i in shared else split for i, split in enumerate(self.input_splits))

    # --- gradients -------------------------------------------------------------------------------------------------

    def factors(self, grads: list[Tensor | None]) -> dict[str, Factors]:
        """Per-example gradients of every parameter from the gradients of ``finish``'s tensors.

        Raises:
            NotImplementedError: a gradient of an output without a batch dimension, or a module that cannot run on one
                example.
            ExampleMismatchError: a module that mixes examples.
        """
        kind = type(self.module).__name__
        for grad, out, split in zip(grads, self.outputs, self.output_splits):
            if grad is not None and split is None:
                raise NotImplementedError(
                    f"{kind} returns {list(out.shape)}, in which the {self.B} examples cannot be told apart; let the "
                    f"module itself add or concatenate its parameters to the batch, or compute a mean over the batch "
                    f"outside of it"
                )
        if self.B == 0:
            return {
                name: DenseFactors(p.new_zeros(0, *p.shape, dtype=accumulator(p.dtype)))
                for name, p in self.parameters.items()
            }
        failure: Exception | None = None
        for splits in self._readings():
            try:
                made = self._run(splits, grads)
            except ExampleMismatchError as error:
                failure = error if failure is None else failure
            else:
                return {name: DenseFactors(rows) for name, rows in made.items()}
        assert failure is not None
        raise failure

    def _run(self, splits: Splits, grads: list[Tensor | None]) -> dict[str, Tensor]:
        batched = [i for i, split in enumerate(splits) if split is not None]
        leaves = [splits[i].stack(self.leaves[i], self.B) for i in batched]  # type: ignore[union-attr]
        asked = [i for i, grad in enumerate(grads) if grad is not None]
        cotangents = [self._examples(i, grads[i].to(self.outputs[i].dtype)) for i in asked]  # type: ignore[union-attr]
        parameters = {name: p.detach() for name, p in self.parameters.items()}
        buffers = _copies(self.module) if self.buffers is None else self.buffers
        made = {
            name: p.new_empty(self.B, *p.shape, dtype=accumulator(p.dtype))  # [B, *shape]
            for name, p in parameters.items()
        }

        def outputs(parameters: dict[str, Tensor], own: tuple[Tensor, ...]) -> list[Tensor]:
            everything = list(self.leaves)
            for i, leaf in zip(batched, own):
                everything[i] = leaf
            args, kwargs = tree_unflatten(everything, self.spec)
            state = buffers if self.buffers is None else {name: buffer.clone() for name, buffer in buffers.items()}
            with _flat_weights(self.module, parameters):
                out = functional_call(self.module, {**state, **parameters}, args, kwargs)
            found, _ = tree_flatten(out)
            return [found[self.places[i]] for i in asked]

        def vectorised(own: tuple[Tensor, ...], cotangents: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            out, pull, *_ = vjp(lambda p: outputs(p, own), parameters)
            (gradients,) = pull(cotangents)
            return gradients, out

        def alone(own: tuple[Tensor, ...], cotangents: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            with torch.enable_grad():
                leaf = {name: p.detach().requires_grad_() for name, p in parameters.items()}
                out = outputs(leaf, own)
                pairs = [(o, c) for o, c in zip(out, cotangents) if o.requires_grad]
                if not pairs:
                    return {name: torch.zeros_like(p) for name, p in parameters.items()}, out
                found = torch.autograd.grad(
                    [o for o, _ in pairs], list(leaf.values()), [c for _, c in pairs], allow_unused=True
                )
            zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
            return {n: zeros[n] if g is None else g for n, g in zip(leaf, found)}, [o.detach() for o in out]

        size = sum(p.numel() * p.element_size() for p in parameters.values())
        chunk = max(1, min(max(8, -(-self.B // 8)), _CHUNK_BYTES // max(size, 1)))
        device, dtype, enabled = self.autocast
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(device, dtype, enabled=enabled))
            stack.enter_context(_same_attributes(self.module))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
            for start in range(0, self.B, chunk):
                some = slice(start, start + chunk)
                own, pulled = tuple(leaf[some] for leaf in leaves), [c[some] for c in cotangents]
                result = None
                if self.vectorised:
                    try:
                        result = vmap(vectorised, randomness="error")(own, pulled)
                    except Exception:  # whatever torch.func does not know; the loop then says what is really wrong
                        self.vectorised = False
                if result is None:
                    rows = []
                    for b in range(pulled[0].shape[0]):
                        try:
                            rows.append(alone(tuple(leaf[b] for leaf in own), [c[b] for c in pulled]))
                        except Exception as error:
                            raise ExampleMismatchError(
                                f"{type(self.module).__name__} cannot run on one example of its batch of {self.B} "
                                f"alone: {error}"
                            ) from error
                    result = (
                        {name: torch.stack([row[0][name] for row in rows]) for name in made},
                        [torch.stack(outs) for outs in zip(*(row[1] for row in rows))],
                    )
                self._compare(asked, result[1], some)
                for name, rows_of in result[0].items():
                    made[name][some] = rows_of
        return made

    def _examples(self, i: int, tensor: Tensor) -> Tensor:
        split = self.output_splits[i]
        assert split is not None
        return split.stack(tensor, self.B)

    def _compare(self, asked: list[int], outputs: list[Tensor], some: slice) -> None:
        for i, again in zip(asked, outputs):
            before = self.outputs[i]
            if self.output_versions[i] is None or before._version != self.output_versions[i]:
                continue  # overwritten since by an in-place operation
            before = self._examples(i, before)[some]
            same = again.shape == before.shape
            if same:
                wide = accumulator(before.dtype)
                error = (again.to(wide) - before.to(wide)).flatten(1).norm(dim=1)
                size = before.to(wide).flatten(1).norm(dim=1)
                same = not bool((error > rounding(before.dtype, before.device) * (size + size.mean())).any())
            if not same:
                raise ExampleMismatchError(
                    f"{type(self.module).__name__} gives an example another output alone than within its batch of "
                    f"{self.B}: it mixes examples (BatchNorm in train mode, a mean over the batch), keeps state "
                    f"between calls, or has its batch elsewhere (batch_dim=, batch_size=). Leave its parameters out "
                    f"with parameters="
                )


def _version(leaf: Any) -> int | None:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


@contextmanager
def _same_attributes(module: nn.Module) -> Iterator[None]:
    """What modules set on themselves (attention maps, an old weight_norm's weight) stays as the forward left it."""
    before = [(child, dict(vars(child))) for child in module.modules()]
    try:
        yield
    finally:
        for child, attributes in before:
            vars(child).clear()
            vars(child).update(attributes)


class _flat_weights:
    """nn.RNN and its kin read their weights from a list of their own, which ``functional_call`` does not know."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.changed: list[tuple[nn.RNNBase, list]] = []
        if isinstance(module, nn.RNNBase):
            self.changed.append((module, module._flat_weights))
            module._flat_weights = [
                parameters.get(name, getattr(module, name, None)) for name in module._flat_weights_names
            ]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for module, weights in self.changed:
            module._flat_weights = weights


def _known_dims(
    module: nn.Module, args: Any, kwargs: Any, leaves: list
) -> tuple[dict[int, Split], tuple[int, ...]] | None:
    """Batch dimensions of torch's own modules: {leaf: split}, the leading input first, and one per output."""
    for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            break
    else:
        return None
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    cell, attention = isinstance(module, nn.RNNCellBase), isinstance(module, nn.MultiheadAttention)
    lead = leaves[given["query" if attention else "input"]]
    if lead.dim() != (2 if cell else 3):
        raise ValueError(f"has an input of shape {list(lead.shape)} without a batch dimension; unsqueeze(0) it")
    if cell:
        return {i: Split(0) for value in given.values() for i in tree_flatten(value)[0]}, (0,)
    dim = 0 if module.batch_first else 1  # type: ignore[union-attr]
    if not attention:
        states = tree_flatten(given.get("hx"))[0]
        return {given["input"]: Split(dim), **{i: Split(1) for i in states if i is not None}}, (dim, 1)
    found = {given[name]: Split(dim) for name in ("query", "key", "value")}
    for name, rows in (("key_padding_mask", 1), ("attn_mask", int(module.num_heads))):  # type: ignore[arg-type]
        i = given.get(name)
        if i is not None and isinstance(leaves[i], Tensor) and (name != "attn_mask" or leaves[i].dim() == 3):
            found[i] = Split(0, rows)
    return found, (dim, 0)
