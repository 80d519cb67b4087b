"""What every layer type provides: how to read a call of its function, and the factors of its per-example gradients."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .._dispatch import OPS
from ..ops._checks import accumulator as accumulator


def run_op(name: str, *args: Any) -> Any:
    """An op without torch's dispatcher: factors are detached and consumed outside of autograd."""
    return OPS[name].run(*args)


class Factors(ABC):
    """One parameter's per-example gradients ``G_b`` of one backward, in factored form: no ``G_b`` is stored.

    A parameter of any shape is seen as a matrix [rows, cols]: a weight [O, I], a bias [O, 1]. The gradients are of
    the loss as it was back-propagated: ``G_b`` is example b's share of it, unscaled by neither B nor a loss scale.
    Results are float64 for float64 factors, else float32.
    """

    shape: torch.Size
    """The parameter's own shape."""
    dense: ClassVar[bool] = False
    """Whether the gradients are stored as they are, so that ``sketch(None, None)`` costs nothing."""

    @property
    @abstractmethod
    def B(self) -> int: ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the factors; results are in ``accumulator(dtype)``."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        rows = self.shape[0] if self.shape else 1
        return rows, self.shape[1:].numel()

    @abstractmethod
    def sqnorm(self) -> torch.Tensor:
        """[B] ‖G_b‖²."""

    @abstractmethod
    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        """[B, P, Q] ``leftᵀ G_b right`` with left [rows, P], right [cols, Q]; None is the identity."""

    @abstractmethod
    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        """[B, K] ⟨G_b, C_k⟩, ``C_k = center_rows[k] ⊗ center_cols[k]``; [K, ·], or [K, r, ·] summed over r."""

    @abstractmethod
    def gram(self) -> torch.Tensor:
        """[B, B] ⟨G_b, G_c⟩."""

    @abstractmethod
    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``Σ_b G_b`` and ``Σ_b G_b∘G_b``, shaped like the parameter."""

    @abstractmethod
    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(a [B, cols], d [B, rows]): mean over positions of the inputs, sum over positions of the output gradients.

        ``d ⊗ a`` is the paper's rank-1 stand-in for G_b. A grouped convolution has one such pair a group: then both
        carry a rank dimension, [B, groups, cols] and [B, groups, rows], that ``dot`` sums over. So do dense gradients
        with more than one column, which are exact.
        """

    @abstractmethod
    def negated(self) -> Factors:
        """The factors of ``−G_b``."""

    @abstractmethod
    def linear(self) -> Factors:
        """The same gradients as factors of a plain linear layer, or as dense ones where that is smaller."""

    def double(self) -> Factors:
        """The same factors in float64."""
        return self._each(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def part(self, start: int, end: int) -> Factors:
        """The factors of examples start..end−1."""
        part = self._each(lambda tensor: tensor[start:end])
        if end - start != part.B:
            raise NotImplementedError(
                f"{type(self).__name__} cannot be cut into examples: every tensor among its attributes must have them "
                f"in its first dimension"
            )
        return part

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Factors:
        """A copy with every tensor changed, those of factors inside included."""
        out = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(out, name, change(value))
            elif isinstance(value, Factors):
                setattr(out, name, value._each(change))
        return out

    @abstractmethod
    def _concat(self, other: Any) -> Factors | None:
        """The factors of the sum with factors of the same class, or None where only plain linear factors can add."""

    def _meet(self, other: Factors) -> Factors | None:
        """The factors of the sum with factors of another class that this one knows, or None."""
        return None

    def concat(self, other: Factors) -> Factors:
        """The factors of ``G_b + G'_b``: another use of the same parameter by the same examples, cross terms included.

        Raises:
            ValueError: for another parameter's shape or another number of examples.
        """
        if self.shape != other.shape or self.B != other.B:
            raise ValueError(
                f"other must hold gradients of the same parameter {list(self.shape)} and the same {self.B} examples, "
                f"got {list(other.shape)} and {other.B}"
            )
        joined = self._concat(other) if type(self) is type(other) else self._meet(other) or other._meet(self)
        if joined is None:
            mine, theirs = self.linear(), other.linear()
            joined = mine._concat(theirs) if type(mine) is type(theirs) else None
        return DenseFactors.of(self).concat(DenseFactors.of(other)) if joined is None else joined

    def subtract(self, other: Factors) -> Factors:
        """The factors of ``G_b − G'_b``, example by example (another backward of the same examples, as in SVRG)."""
        return self.concat(other.negated())


class DenseFactors(Factors):
    """Per-example gradients that are small enough to be stored: biases and other vectors. grads: [B, *shape]."""

    dense = True

    def __init__(self, grads: torch.Tensor) -> None:
        self.grads = grads
        self.shape = grads.shape[1:]

    @classmethod
    def of(cls, factors: Factors) -> DenseFactors:
        """Any factors, multiplied out: B times the parameter's memory."""
        if isinstance(factors, DenseFactors):
            return factors
        return cls(factors.sketch(None, None).reshape(factors.B, *factors.shape))

    @property
    def B(self) -> int:
        return self.grads.shape[0]

    @property
    def device(self) -> torch.device:
        return self.grads.device

    @property
    def dtype(self) -> torch.dtype:
        return self.grads.dtype

    def _flat(self) -> torch.Tensor:
        return self.grads.reshape(self.B, self.shape.numel())  # [B, rows·cols]

    def sqnorm(self) -> torch.Tensor:
        return self._flat().square().sum(1)

    def sketch(self, left: torch.Tensor | None = None, right: torch.Tensor | None = None) -> torch.Tensor:
        out = self.grads.reshape(self.B, *self.matrix_shape)  # [B, rows, cols]
        if left is not None:
            out = (out.mT @ left.to(out.dtype)).mT  # one matrix product; left.mT @ out would be B of them
        return out if right is None else out @ right.to(out.dtype)

    def dot(self, center_rows: torch.Tensor, center_cols: torch.Tensor) -> torch.Tensor:
        rows, cols = self.matrix_shape
        K = center_rows.shape[0]
        rank = center_rows.shape[1] if center_rows.dim() == 3 else 1
        left, right = (c.to(self.dtype).reshape(K, rank, n) for c, n in ((center_rows, rows), (center_cols, cols)))
        centres = left.mT @ right  # [K, rows, cols]
        return self._flat() @ centres.reshape(K, rows * cols).mT

    def gram(self) -> torch.Tensor:
        flat = self._flat()
        return flat @ flat.mT

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.grads.sum(0), self.grads.square().sum(0)

    def rank1(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, cols = self.matrix_shape
        if cols == 1:
            return self.grads.new_ones(self.B, 1), self._flat()
        # Row by row, G_b itself: a sum of rows outer products, so that the mean of such pairs is the mean gradient.
        unit = torch.eye(rows, dtype=self.dtype, device=self.device)
        return self.grads.reshape(self.B, rows, cols), unit.expand(self.B, rows, rows)

    def negated(self) -> DenseFactors:
        return DenseFactors(-self.grads)

    def linear(self) -> Factors:
        return self

    def _concat(self, other: DenseFactors) -> DenseFactors:
        return DenseFactors(self.grads + other.grads)


@dataclass(frozen=True)
class BatchLayout:
    """Where the examples are in a layer's input and output.

    Args:
        dim: the batch dimension, where the layer leaves it open.
        size: the number of examples; a layer that sees n·size rows then has n positions an example: consecutive rows
            for ``dim=0``, every size-th row for ``dim=1``. None: as many examples as the batch dimension has.
    """

    dim: int = 0
    size: int | None = None

    def rows(self, tensor: torch.Tensor, features: int = 1) -> torch.Tensor:
        """[*, F] → [B, *, F] with ``features`` trailing dimensions that are not positions."""
        if tensor.dim() <= features:
            raise ValueError(f"has an input of shape {list(tensor.shape)} without a batch dimension; unsqueeze(0) it")
        dim = min(self.dim, tensor.dim() - features - 1)
        return self.fold(tensor.movedim(dim, 0) if dim else tensor)

    def fold(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n·B, *] → [B, n, *] where ``size`` says that an example has several rows; else unchanged."""
        n = tensor.shape[0]
        if self.size is None or n == self.size or self.size == 0 or n % self.size:
            return tensor
        if self.dim:
            return tensor.reshape(n // self.size, self.size, *tensor.shape[1:]).transpose(0, 1)
        return tensor.reshape(self.size, n // self.size, *tensor.shape[1:])


class Call(ABC):
    """One call of a function that a layer type's parameters go through.

    A subclass is constructed with the function's own arguments, so its ``__init__`` is the function's signature.
    ``held`` is what must survive until backward; ``parameters`` says which role each of the function's arguments has.
    """

    functions: ClassVar[tuple[Callable, ...]]
    """The torch functions this class reads, as ``__torch_function__`` gets them."""
    modules: ClassVar[dict[type, tuple[str, ...]]]
    """Module types whose parameters, by name, are used by these functions only."""
    light: ClassVar[frozenset[str]] = frozenset(("bias",))
    """Roles whose factors need no input: nothing is held for them."""
    lower_precision: ClassVar[bool] = True
    """Whether autocast casts the function's input down."""
    costs: ClassVar[dict[str, tuple[str, str]]]
    """Parameter name → (cost class, note) for coverage."""

    held: torch.Tensor | None
    parameters: dict[str, torch.Tensor | None]

    shareable: ClassVar[bool] = False
    """Whether one output may serve all examples (a position embedding): input and output have any position dims."""
    turns: ClassVar[bool] = False
    """Whether ``weight`` may be the transpose of a parameter."""

    @classmethod
    def owns(cls, module: torch.nn.Module, name: str) -> bool:
        """Whether this module uses its parameter ``name`` through ``functions`` only.

        A subclass counts as its base as long as it does not override ``forward``: what forward does was tested.
        """
        for kind, names in cls.modules.items():
            inherited = isinstance(module, kind) and type(module).forward is kind.forward  # type: ignore[attr-defined]
            if inherited and name in names and cls.accepts(module):
                return True
        return False

    @classmethod
    def accepts(cls, module: torch.nn.Module) -> bool:
        """Whether a module of one of ``modules`` is set up in a way that has per-example gradients."""
        return True

    @abstractmethod
    def factors(self, role: str, grad: torch.Tensor, layout: BatchLayout) -> Factors:
        """The factors of one parameter, from the gradient of the call's output."""
