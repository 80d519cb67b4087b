"""Layer type → how its functions are read and what the factors of its per-example gradients are. No kernels."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import nn

from .base import BatchLayout, Call, DenseFactors, Factors
from .conv import ConvCall, ConvFactors, ConvTransposeCall
from .embedding import EmbeddingBagCall, EmbeddingCall, EmbeddingFactors
from .linear import LinearCall, LinearFactors
from .matmul import AddmmCall, MatmulCall, TransposedFactors, flattens, turned
from .norm import BatchNormCall, GroupNormCall, InstanceNormCall, LayerNormCall, RMSNormCall
from .registered import LayerFactors, register_layer, registered, unregister_layer

CALLS: tuple[type[Call], ...] = (
    LinearCall,
    ConvCall,
    ConvTransposeCall,
    EmbeddingCall,
    EmbeddingBagCall,
    MatmulCall,
    AddmmCall,
    LayerNormCall,
    RMSNormCall,
    GroupNormCall,
    BatchNormCall,
    InstanceNormCall,
)
"""The table: a new layer type is one file and one entry here."""

ROUTES: dict[Callable, type[Call]] = {function: call for call in CALLS for function in call.functions}


_BY_OTHER_MARKS = tuple(call for call in CALLS if not call.modules)
"""Layer types that tell their modules by other marks than a type of torch.nn."""

_known: WeakKeyDictionary[type, tuple[tuple[type[Call], tuple[str, ...]], ...]] = WeakKeyDictionary()


def _knowing(kind: type) -> tuple[tuple[type[Call], tuple[str, ...]], ...]:
    """The layer types that know a module type or a base of it, with the names of its parameters."""
    found = _known.get(kind)
    if found is None:
        found = tuple((call, names) for call in CALLS for base, names in call.modules.items() if issubclass(kind, base))
        _known[kind] = found
    return found


def refuses(module: nn.Module, name: str) -> bool:
    """Whether a layer type knows this module and says that it has no per-example gradients the way it is set up."""
    return any(name in names and not call.accepts(module) for call, names in _knowing(type(module)))


def route_of(module: nn.Module, name: str) -> type[Call] | None:
    """How the parameter ``name`` of this module is used, or None where no layer type says so."""
    known = next((call for call, _ in _knowing(type(module)) if call.owns(module, name)), None)
    return known or next((call for call in _BY_OTHER_MARKS if call.owns(module, name)), None)


__all__ = [
    "CALLS",
    "ROUTES",
    "BatchLayout",
    "Call",
    "ConvCall",
    "ConvFactors",
    "DenseFactors",
    "EmbeddingFactors",
    "Factors",
    "LayerFactors",
    "LinearCall",
    "LinearFactors",
    "MatmulCall",
    "TransposedFactors",
    "flattens",
    "refuses",
    "register_layer",
    "registered",
    "route_of",
    "turned",
    "unregister_layer",
]
