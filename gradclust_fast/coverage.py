"""``coverage``: which parameter is recorded by which route, at which cost, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.modules.conv import _ConvNd

from ._dispatch import OPS
from .layers import Call, ConvCall, LinearCall, recompute, registered
from .layers.registered import COST as REGISTERED_COST
from .selection import Parameters, kind, split


@dataclass(frozen=True)
class CoverageRow:
    """One parameter.

    Attributes:
        parameter: its name without wrapper prefixes.
        module: the type of the module that owns it; several where it is tied.
        route: ``"factored"``, ``"fused"`` (with ``fused=True``: its gradient and its norms together), ``"small"``,
            ``"sum"``, ``"registered"``, ``"recomputed"`` (its module runs again alone), ``"none"`` (recording raises),
            ``"frozen"`` or ``"filtered out"``.
        cost: what recording adds to a step, in words; empty where nothing is recorded.
        note: what to know, or the remedy.
    """

    parameter: str
    module: str
    route: str
    cost: str
    note: str


class Coverage(list[CoverageRow]):
    """A list of :class:`CoverageRow`. Prints as a table."""

    @property
    def complete(self) -> bool:
        """Whether ``gf.record`` with the same parameters would accept the model."""
        return all(row.route != "none" for row in self)

    def __str__(self) -> str:
        header = ("parameter", "module", "route", "cost", "note")
        table = [header] + [(row.parameter, row.module, row.route, row.cost, row.note) for row in self]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in table]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def coverage(model: torch.nn.Module, parameters: Parameters = None, *, fused: bool = False) -> Coverage:
    """How ``gf.record(model, parameters=parameters, fused=fused)`` would treat every parameter. Nothing runs.

    Args:
        model: any module.
        parameters: as for ``gf.record``.
        fused: as for ``gf.record``; the note says whether one kernel makes both on the parameter's device.

    Returns:
        A :class:`Coverage`: a list of rows that prints as a table; ``.complete`` says whether recording would start.

    Example:
        >>> print(gf.coverage(torch.nn.Linear(4, 2)))  # doctest: +SKIP
    """
    states = split(model, parameters)
    coupled = [name for name, module in model.named_modules() if _couples_batch(module)]
    rows = Coverage()
    for entry, state in states:
        notes = []
        if state != "recorded":
            rows.append(CoverageRow(entry.name, kind(entry), state, "", ""))
            continue
        calls, claimants = entry.calls(), entry.claimants()
        if entry.refused():
            note = "leave it out with parameters=, freeze it, or use a module type that has a route"
            rows.append(CoverageRow(entry.name, kind(entry), "none", "", note))
            continue
        if len(entry.owners) > 1:
            notes.append("tied: cross terms included")
        if coupled:
            notes.append(
                f"batch-coupled: BatchNorm in train mode ({coupled[0]}) makes rows shares of the batch gradient"
            )
        own = [module for module, _ in claimants if registered(module) is None]
        if own:
            route, cost = "recomputed", recompute.COST
            notes.append(f"{type(own[0]).__name__} must not mix examples or draw random numbers (dropout)")
        elif claimants:
            route, cost = "registered", REGISTERED_COST
        else:
            route, cost = calls[0].costs[entry.owners[0][1]]  # type: ignore[union-attr]
            if fused and entry.owners[0][1] == "weight":
                gain = _fused_route(calls, entry.owners[0][0], entry.parameter)
                if gain is not None:
                    route, cost = "fused", "computed together with the weight's gradient, if it is used once"
                    notes.append(gain)
        rows.append(CoverageRow(entry.name, kind(entry), route, cost, "; ".join(notes)))
    return rows


def _fused_route(calls: list[type[Call] | None], module: torch.nn.Module, weight: torch.Tensor) -> str | None:
    """How a weight's gradient and norms would be made together; None where they are not."""
    on_cpu = weight.device.type == "cpu"
    if calls == [ConvCall] and on_cpu:
        if isinstance(module, _ConvNd) and _pads_unevenly(module):
            return None
        reason = OPS["conv_weight_sqnorm"].kernels["cpu"].refuses(weight)
        return f"torch's convolution, then the norms, which saves nothing: {reason}" if reason else "in one pass (C++)"
    if calls != [LinearCall]:
        return None
    name = "cpu" if on_cpu else "triton"
    kernel = OPS["grad_weight_sqnorm"].kernels[name]
    reason = kernel.refuses(weight) or kernel.loses(weight)
    if reason is not None:
        return f"torch's product, then the norms, which saves nothing: {reason}"
    how = "C++" if on_cpu else "Triton"
    return f"sequences in one pass ({how}), short ones and single vectors by torch's product, then the norms"


def _pads_unevenly(module: _ConvNd) -> bool:
    if module.padding != "same" or module.padding_mode != "zeros":
        return False
    return any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size))


def _couples_batch(module: torch.nn.Module) -> bool:
    """Train-mode BatchNorm, or one without running statistics, mixes the examples of a batch."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    )
