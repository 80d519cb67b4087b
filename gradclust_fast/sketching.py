"""Random sketches of per-example gradients: the same bits on every device, backend, batch split and process."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ._arguments import integer
from .ops import _random_signs
from .ops.sign_product import generated
from .reference.sign_product import philox4x32 as philox4x32
from .reference.sign_product import sign_matrix

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which torch.compile, FSDP and checkpoint wrappers keep the module they wrap."""


class Factors(Protocol):
    """What a sketch needs from one parameter's per-example gradients (one matrix per example)."""

    @property
    def matrix_shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def sketch(self, left: Tensor | None, right: Tensor | None) -> Tensor:
        """leftᵀ G_b right [B, P, Q]; None stands for the identity."""
        ...


def scaled_signs(
    rows: int,
    cols: int,
    key: tuple[int, int],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    transposed: bool = False,
) -> Tensor:
    """:func:`sign_matrix` times ``scale``, [rows, cols], or its contiguous transpose [cols, rows]."""
    if _random_signs.refuses(dtype, device) is None:
        return _random_signs.random_signs_cuda(rows, cols, key, dtype, device, scale, transposed)
    signs = sign_matrix(rows, cols, key, dtype, device) * scale
    return signs.T.contiguous() if transposed else signs


def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes that DDP, FSDP, torch.compile and checkpoint wrappers add."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


@dataclass(frozen=True)
class Sketch:
    """A random linear map from a model's per-example gradient to ``dim`` numbers that keeps inner products.

    ``sketch_b = Σ_l S_l · vec(L_lᵀ G_b^l M_l)`` over parameters ``l``, where ``G_b^l`` [rows, cols] is example b's
    gradient of the parameter as a matrix: first two thin matrices, then a dense map to ``dim``. All entries are
    ±1/√size from a counter-based generator keyed by the seed and the parameter's name, so a sketch taken on another
    device, in another process or with another batch size has the same matrices, and
    ``E⟨sketch_i, sketch_j⟩ = ⟨g_i, g_j⟩`` over seeds.

    Args:
        dim: R, length of a sketch. A squared distance has a relative variance of at most (1+2/P)(1+2/Q)(1+2/R) − 1.
            Used by ``reduce=True``.
        seed: any 64-bit integer; another seed gives independent matrices.
        sides: (P, Q), how many columns the thin matrices keep. A side of the gradient that is no longer stays as it is
            (identity), and the room it leaves goes to the other side: a bias keeps up to P·Q entries.
        reduce: with False the second stage is left out: ``apply`` returns [B, P_l·Q_l], and the parameters' vectors
            must be concatenated in the order of the model's parameters, never added. With True they are added.

    Raises:
        ValueError, TypeError: sizes that are not positive integers.

    Source:
        The guide's "sketching" page; generator: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Example:
        >>> sketch = gf.Sketch(dim=256, seed=0)
        >>> sketch.stages((10, 1024))
        (10, 102)
    """

    dim: int = 256
    seed: int = 0
    sides: tuple[int, int] = (32, 32)
    reduce: bool = True
    _cache: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.sides, (tuple, list)):
            raise TypeError(f"sides must be two integers (P, Q), got {self.sides!r}")
        object.__setattr__(self, "sides", tuple(self.sides))
        for name, value in (("dim", self.dim), ("seed", self.seed), *(("sides", side) for side in self.sides)):
            integer(name, value, None if name == "seed" else 1)
        if len(self.sides) != 2:
            raise ValueError(f"sides must be two integers (P, Q), got {self.sides!r}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}  # the matrices follow from the other fields; don't ship them

    def stages(self, matrix_shape: tuple[int, int]) -> tuple[int, int]:
        """Sides (P_l, Q_l) after the first stage for a gradient matrix [rows, cols]."""
        rows, cols = matrix_shape
        P, Q = self.sides
        if rows <= P:
            return rows, min(cols, P * Q // max(rows, 1))
        if cols <= Q:
            return min(rows, P * Q // max(cols, 1)), cols
        return P, Q

    def width(self, matrix_shape: tuple[int, int]) -> int:
        """Length of what ``apply`` returns for a gradient matrix [rows, cols]."""
        return self.dim if self.reduce else math.prod(self.stages(matrix_shape))

    def apply(self, name: str, factors: Factors) -> Tensor:
        """One parameter's part of every example's sketch, from its factors; its gradients are never stored.

        Args:
            name: the parameter's name; wrapper prefixes make no difference.
            factors: its per-example gradients in factored form.

        Returns:
            [B, dim], to be added over parameters; with ``reduce=False`` [B, P_l·Q_l], to be concatenated.
        """
        name = canonical_name(name)
        first = self._first(name, factors)
        if not self.reduce:
            return first
        reduced = generated(first, self.dim, self._key(name, "second"), 1 / math.sqrt(self.dim))
        return first @ self._stored(name, first) if reduced is None else reduced

    def matrices(
        self, name: str, matrix_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(L [rows, P_l], M [cols, Q_l], S [P_l·Q_l, dim]) of one parameter; None is the identity.

        float64 gradients get float64 matrices, all others float32. L and M are kept for the next call. S is made in
        this one: ``apply`` has no need of it where a kernel multiplies by signs that it makes on the way.
        """
        name = canonical_name(name)
        left, right = self._thin(name, matrix_shape, dtype, device)
        if not self.reduce:
            return left, right, None
        return left, right, self._second(name, math.prod(self.stages(matrix_shape)), dtype, device)

    def _first(self, name: str, factors: Factors) -> Tensor:
        """[B, P_l·Q_l]. The matrix of a long bias is not thin, so it is made on the way as well."""
        (rows, cols), (P, Q) = factors.matrix_shape, self.stages(factors.matrix_shape)
        if getattr(factors, "dense", False) and min(rows, cols) == 1 and max(rows, cols) > P * Q:
            vectors, which = factors.sketch(None, None).flatten(1), "left" if cols == 1 else "right"
            made = generated(vectors, P * Q, self._key(name, which), 1 / math.sqrt(P * Q), transposed=True)
            if made is not None:
                return made
        left, right = self._thin(name, factors.matrix_shape, factors.dtype, factors.device)
        return factors.sketch(left, right).flatten(1)

    def _thin(
        self, name: str, matrix_shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        """L and M: inputs of the op that makes the first stage, and small."""
        key = (name, tuple(matrix_shape), dtype, device)
        if key not in self._cache:
            (rows, cols), (P, Q) = matrix_shape, self.stages(matrix_shape)
            left = self._matrix(name, "left", rows, P, P, dtype, device) if rows > P else None
            right = self._matrix(name, "right", cols, Q, Q, dtype, device) if cols > Q else None
            self._cache[key] = left, right
        return self._cache[key]

    def _second(self, name: str, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """S [width, dim]. Rows of the generator are the outputs, so a longer sketch begins with a shorter one."""
        return self._matrix(name, "second", self.dim, width, self.dim, dtype, device, transposed=True)

    def _stored(self, name: str, first: Tensor) -> Tensor:
        """S where no kernel makes it on the way: PyTorch takes much longer to make it than to multiply by it."""
        key = (name, "second", first.shape[1], first.dtype, first.device)
        if key not in self._cache:
            self._cache[key] = self._second(name, first.shape[1], first.dtype, first.device)
        return self._cache[key]

    def _matrix(
        self,
        name: str,
        which: str,
        rows: int,
        cols: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        transposed: bool = False,
    ) -> Tensor:
        """±1/√size [rows, cols], or its transpose."""
        dtype = dtype if dtype == torch.float64 else torch.float32
        # Normal tensors even when first needed under inference_mode: later calls may run outside of it.
        with torch.inference_mode(False), torch.no_grad():
            # A product, not a quotient: devices divide by a scalar in different ways.
            return scaled_signs(rows, cols, self._key(name, which), 1 / math.sqrt(size), dtype, device, transposed)

    def _key(self, name: str, which: str) -> tuple[int, int]:
        digest = hashlib.blake2b(f"{self.seed}/{which}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
