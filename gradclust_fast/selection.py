"""Which parameters of a model are recorded, under which names, and whether every one of them has a route."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.jit import ScriptModule
from torch.nn.utils.parametrize import is_parametrized

from .layers import Call, refuses, registered, route_of
from .sketching import WRAPPERS

Parameters = str | Iterable[str] | Callable[[str, nn.Parameter], bool] | None

_WRAPPERS = WRAPPERS | {"module"}

REMEDIES = (
    "leave them out with parameters= (name globs, or a predicate of name and parameter), freeze them with "
    "requires_grad_(False), give their module a function of its own (gf.register_layer), or build it from types "
    "that have a route or are recomputed (gf.coverage(model) lists every parameter)"
)


@dataclass
class Named:
    """A parameter, its name without wrapper prefixes, and every module that owns it (more than one where tied)."""

    name: str
    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    def calls(self) -> list[type[Call] | None]:
        return [route_of(module, name) for module, name in self.owners]

    def claimants(self) -> list[tuple[nn.Module, str]]:
        """The owners that answer for the parameter themselves: registered ones, and those without a route."""
        return [
            (module, name)
            for module, name in self.owners
            if registered(module) is not None or (route_of(module, name) is None and not refuses(module, name))
        ]

    def refused(self) -> bool:
        return self.scripted() or any(refuses(m, name) and registered(m) is None for m, name in self.owners)

    def scripted(self) -> bool:
        return any(isinstance(module, ScriptModule) for module, _ in self.owners)


def _is_wrapper(module: nn.Module, child: str) -> bool:
    """DistributedDataParallel, torch.compile's and FSDP's modules: one child under a known name and nothing else."""
    return child in _WRAPPERS and len(module._modules) == 1 and not module._parameters and not module._buffers


def named_parameters(model: nn.Module) -> list[Named]:
    """Every parameter once, in ``model.named_parameters()``'s order, under its clean name."""
    found: dict[int, Named] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str, owner: nn.Module, inside: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                entry = found.setdefault(id(parameter), Named(prefix + name, parameter))
                entry.owners.append((owner, inside + name))
        for child, submodule in module._modules.items():
            if submodule is not None:
                # These are never called on examples: the module that holds them uses their parameters.
                silent = (
                    isinstance(submodule, (nn.ParameterList, nn.ParameterDict))
                    or (isinstance(module, nn.MultiheadAttention) and child == "out_proj")
                    or (child == "parametrizations" and is_parametrized(module))
                    or "parametrizations." in inside
                )
                visit(
                    submodule,
                    prefix if _is_wrapper(module, child) else f"{prefix}{child}.",
                    owner if silent else submodule,
                    f"{inside}{child}." if silent else "",
                )

    visit(model, "", model, "")
    entries = list(found.values())
    count = Counter(entry.name for entry in entries)
    if len(count) < len(entries):  # two parameters that only their wrappers' names tell apart
        full_names = {id(parameter): name for name, parameter in model.named_parameters()}
        for entry in entries:
            if count[entry.name] > 1:
                entry.name = full_names[id(entry.parameter)]
    return entries


def _matcher(parameters: Parameters, names: list[str]) -> Callable[[str, nn.Parameter], bool]:
    if parameters is None:
        return lambda name, parameter: True
    if callable(parameters):
        return parameters
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be name globs or a predicate(name, parameter), got {parameters!r}")
    globs = [parameters] if isinstance(parameters, str) else list(parameters)
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(
                f"parameters must be name globs (strings) or a predicate(name, parameter), got a "
                f"{type(glob).__name__}; pass names, not the parameters themselves"
            )
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ValueError(f"parameters: the glob {glob!r} matches none of the model's parameters ({shown})")
    return lambda name, parameter: any(fnmatchcase(name, glob) for glob in globs)


def split(model: nn.Module, parameters: Parameters) -> list[tuple[Named, str]]:
    """Every parameter with ``"recorded"``, ``"frozen"`` or ``"filtered out"``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    entries = named_parameters(model)
    wanted = _matcher(parameters, [entry.name for entry in entries])
    states = []
    for entry in entries:
        if not wanted(entry.name, entry.parameter):
            states.append((entry, "filtered out"))
        else:
            states.append((entry, "recorded" if entry.parameter.requires_grad else "frozen"))
    return states


def select(model: nn.Module, parameters: Parameters) -> list[Named]:
    """The trainable parameters to record.

    Raises:
        TypeError, ValueError: ``model`` or ``parameters`` of the wrong kind, or nothing left to record.
        NotImplementedError: naming every parameter that belongs to a module without a route.
    """
    chosen = [entry for entry, state in split(model, parameters) if state == "recorded"]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise NotImplementedError(
            "FullyShardedDataParallel hides the layers' parameters in flat ones; shard the model with "
            "torch.distributed.fsdp.fully_shard, which recording supports"
        )
    if not chosen:
        raise ValueError(
            "model has no trainable parameter to record; unfreeze some with requires_grad_(True) or widen parameters="
        )
    scripted = [entry.name for entry in chosen if entry.scripted()]
    if scripted:
        raise NotImplementedError(
            f"{', '.join(scripted)}: scripted or traced (torch.jit), which hides what its layers do from a record; "
            f"record the module that it was made from, or leave these parameters out with parameters="
        )
    lazy = [entry.name for entry in chosen if nn.parameter.is_lazy(entry.parameter)]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} has no shape yet; run one forward before recording")
    lost = [entry for entry in chosen if entry.refused()]
    if lost:
        shown = "; ".join(f"{entry.name} ({kind(entry)})" for entry in lost)
        raise NotImplementedError(f"no per-example route for {shown}. Remedies: {REMEDIES}")
    return chosen


def kind(entry: Named) -> str:
    """The types of the modules that own a parameter, e.g. ``Linear``, or ``Embedding + Linear`` where it is tied."""
    return " + ".join(dict.fromkeys(type(module).__name__ for module, _ in entry.owners))
