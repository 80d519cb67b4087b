"""``register_layer``: a user's own layer type with its own factors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .base import Factors
from .linear import LinearFactors

LayerFactors = Callable[[nn.Module, tuple, tuple], dict[str, Any]]

COST = "whatever the registered function does"

_REGISTERED: dict[type, LayerFactors] = {}


def register_layer(module_type: type[nn.Module], factors: LayerFactors) -> None:
    """Tells every later record how to compute the factors of a layer type's own parameters.

    Args:
        module_type: the layer. Subclasses that do not override ``forward`` count as it.
        factors: called in backward as ``factors(module, inputs, output_grads)``. ``inputs`` are the arguments of
            ``forward`` by position, keyword arguments and defaults in their places, tensors detached;
            ``output_grads`` has one entry for every output tensor that requires a gradient (None where no gradient
            came). It returns ``{parameter: (act, grad)}`` for every recorded parameter that the module itself owns,
            where the example's gradient is ``Σ_t grad[b, t] ⊗ act[b, t]`` with act [B, *, I] and grad [B, *, O] for a
            parameter [O, I] (I = 1 for a bias [O]), or any :class:`gradclust_fast.layers.Factors` instead of a pair.

    Raises:
        TypeError: ``module_type`` is not a module class, or ``factors`` cannot be called.
        ValueError: the type is registered already; :func:`unregister_layer` first.
        RuntimeError: when the factors do not add up to the parameter's gradient (checked in a record's first backward).

    Example:
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(features))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> gf.register_layer(Scale, lambda module, inputs, grads: {
        ...     "weight": gf.layers.DenseFactors((inputs[0] * grads[0]).flatten(1, -2).sum(1))})
        >>> gf.coverage(Scale(4))[0].route
        'registered'
        >>> gf.unregister_layer(Scale)
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"module_type must be a subclass of torch.nn.Module, got {module_type!r}; pass the class")
    if not callable(factors):
        raise TypeError(f"factors must be callable as factors(module, inputs, output_grads), got {factors!r}")
    if module_type in _REGISTERED:
        raise ValueError(f"{module_type.__name__} is registered already; call gf.unregister_layer first")
    _REGISTERED[module_type] = factors


def unregister_layer(module_type: type[nn.Module]) -> None:
    """Forgets a registered layer type.

    Raises:
        KeyError: the type is not registered.

    Example:
        >>> gf.register_layer(torch.nn.Linear, lambda module, inputs, output_grads: {})
        >>> gf.unregister_layer(torch.nn.Linear)
    """
    if module_type not in _REGISTERED:
        raise KeyError(f"{getattr(module_type, '__name__', module_type)} is not registered; register_layer adds types")
    del _REGISTERED[module_type]


def registered(module: nn.Module) -> LayerFactors | None:
    """The function registered for a module, if any."""
    for kind in type(module).__mro__:
        if kind in _REGISTERED and type(module).forward is kind.forward:  # type: ignore[attr-defined]
            return _REGISTERED[kind]
    return None


def inputs_of(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """forward's arguments by position."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    named = set(bound.kwargs)
    if named:
        raise NotImplementedError(
            f"a registered layer gets its inputs by position, but {type(module).__name__}.forward takes "
            f"{', '.join(sorted(named))} by keyword only; make them ordinary arguments"
        )
    bound.apply_defaults()
    return bound.args


def checked_factors(module: nn.Module, parameters: dict[str, nn.Parameter], made: Any) -> dict[str, Factors]:
    """What a registered function returned, as factors of every one of ``parameters``."""
    kind = type(module).__name__
    if not isinstance(made, dict):
        raise TypeError(
            f"the factors registered for {kind} must return {{parameter: (act, grad) or Factors}}, got "
            f"{type(made).__name__}"
        )
    missing = [name for name in parameters if name not in made]
    own = [name for name, _ in module.named_parameters()]
    unknown = [name for name in made if name not in own]
    if missing or unknown:
        raise ValueError(
            f"the factors registered for {kind} must be those of {', '.join(parameters)}"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not a parameter of it: {', '.join(map(str, unknown))}" if unknown else "")
        )
    return {name: _checked(f"{kind}.{name}", parameter, made[name]) for name, parameter in parameters.items()}


def _checked(name: str, parameter: torch.Tensor, value: Any) -> Factors:
    shape = parameter.shape
    rows, cols = (shape[0], shape[1:].numel()) if shape else (1, 1)
    if isinstance(value, Factors):
        if value.shape != shape:
            raise ValueError(
                f"the factors registered for {name} must be those of a parameter {list(shape)}, got {list(value.shape)}"
            )
        return value
    if not (isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(t, torch.Tensor) for t in value)):
        raise TypeError(f"the factors registered for {name} must be a pair (act, grad) or Factors, got {value!r}")
    act, grad = (tensor.detach() for tensor in value)
    if act.dim() < 2 or act.shape[:-1] != grad.shape[:-1] or act.shape[-1] != cols or grad.shape[-1] != rows:
        raise ValueError(
            f"the factors registered for {name} {list(shape)} must be act [B, *, {cols}] and grad [B, *, {rows}] with "
            f"the same B and positions, got {list(act.shape)} and {list(grad.shape)}"
        )
    return LinearFactors(act, grad, shape)
