"""What the conv ops share: the layer's geometry as lists of integers, and its checks.

An op takes ``kernel_size``, ``stride`` and ``dilation`` with one entry a spatial dimension, and ``padding`` with two
(before, after): ``padding="same"`` with an even kernel pads unevenly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

import torch
import torch.nn.functional as F

from .._arguments import integer
from ._checks import check_auxiliary, check_floats, check_like, shape

if TYPE_CHECKING:
    from typing_extensions import Required

GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool bias"
"""The part of a conv op's schema that follows its tensors."""


class Geometry(NamedTuple):
    """The arguments of a conv op that follow its tensors."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    bias: bool


PADDING_MODES = ("zeros", "circular", "reflect", "replicate")

Ints = int | Sequence[int]


class LayerArguments(TypedDict, total=False):
    """The keyword arguments of the public conv functions: the layer's own."""

    kernel_size: Required[Ints]
    stride: Ints
    padding: Ints | str
    dilation: Ints
    groups: int
    bias: bool
    padding_mode: str


def prepare(
    act: torch.Tensor,
    grad: torch.Tensor,
    *tensors: torch.Tensor | None,
    kernel_size: Ints,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    bias: bool = False,
    padding_mode: str = "zeros",
) -> tuple:
    """The public functions' arguments → the ops': lists of integers; a padding mode other than zeros is applied."""
    if not isinstance(act, torch.Tensor):
        raise TypeError(f"act must be a torch.Tensor, got {type(act).__name__}; convert it with torch.as_tensor")
    if not 3 <= act.dim() <= 5:
        raise ValueError(
            f"act must be [B, C_in, *spatial] with 1 to 3 spatial dimensions, got {shape(act)}; "
            f"add the batch dimension with unsqueeze(0)"
        )
    spatial = act.dim() - 2
    kernel_size, stride, dilation = (
        _ints(name, value, spatial, 1)
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation))
    )
    pads = _pads(padding, kernel_size, stride, dilation)
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    if padding_mode != "zeros" and any(pads):
        _check_padded(act, pads, padding_mode)
        act = F.pad(act, reversed_pairs(pads), mode=padding_mode)
        pads = [0] * len(pads)
    return act, grad, *tensors, kernel_size, stride, pads, dilation, groups, bias


Public = TypeVar("Public", bound=Callable[..., Any])


def with_layer_arguments(function: Public) -> Public:
    """Decorator of a public conv function: its signature names what ``**layer`` takes, for ``help`` and ``explain``."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    layer = [p for p in inspect.signature(prepare).parameters.values() if p.kind is p.KEYWORD_ONLY]
    signature = inspect.signature(function).replace(parameters=[*own, *layer])
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def reversed_pairs(pads: Sequence[int]) -> list[int]:
    """[before, after] from the first spatial dimension on → torch.nn.functional.pad's order, from the last on."""
    return [pad for i in range(len(pads) - 2, -1, -2) for pad in pads[i : i + 2]]


def _check_padded(act: torch.Tensor, pads: Sequence[int], padding_mode: str) -> None:
    """How far ``torch.nn.functional.pad`` goes: once around, or up to the mirror's other end."""
    check_floats("act", act)
    for size, pad in zip(act.shape[2:], (max(pads[i : i + 2]) for i in range(0, len(pads), 2))):
        most = {"circular": size, "reflect": size - 1}.get(padding_mode, pad if size else 0)
        if pad > most:
            raise ValueError(
                f"padding must be at most {max(most, 0)} with padding_mode={padding_mode!r} for act {shape(act)}, got "
                f"{pad}; pass the layer's own geometry"
            )


def _ints(name: str, value: Ints, spatial: int, least: int) -> list[int]:
    given: Sequence[Any] = value if isinstance(value, (list, tuple)) else [value] * spatial
    values = [v if type(v) is int else integer(name, v) for v in given]
    if len(values) == 1:
        values *= spatial
    if len(values) != spatial or min(values) < least:
        raise ValueError(
            f"{name} must be an integer ≥ {least}, or {spatial} of them (one a spatial dimension of act), got {value!r}"
        )
    return values


def _pads(padding: Ints | str, kernel_size: list[int], stride: list[int], dilation: list[int]) -> list[int]:
    if padding == "valid":
        return [0] * (2 * len(kernel_size))
    if padding == "same":
        if any(s != 1 for s in stride):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride}; give the padding as integers")
        totals = [d * (k - 1) for d, k in zip(dilation, kernel_size)]
        return [pad for total in totals for pad in (total // 2, total - total // 2)]
    if isinstance(padding, str):
        raise ValueError(f"padding must be integers, 'same' or 'valid', got {padding!r}")
    return [pad for p in _ints("padding", padding, len(kernel_size), 0) for pad in (p, p)]


def check_conv(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> None:
    """act [B, C_in, *spatial] and grad [B, C_out, *out_spatial] fit each other and the geometry."""
    kernel_size, stride, padding, dilation, groups, _ = Geometry(*geometry)
    for name, tensor in (("act", act), ("grad", grad)):
        check_floats(name, tensor)
    spatial = len(kernel_size)
    if len(stride) != spatial or len(dilation) != spatial or len(padding) != 2 * spatial:
        raise ValueError(
            f"stride and dilation must have {spatial} entries like kernel_size and padding twice as many, "
            f"got {list(stride)}, {list(dilation)}, {list(padding)}; call the function of gf.ops, which expands them"
        )
    if act.dim() != spatial + 2 or grad.dim() != spatial + 2:
        raise ValueError(
            f"act and grad must be [B, channels, *spatial] with {spatial} spatial dimensions (from kernel_size), "
            f"got {shape(act)} and {shape(grad)}"
        )
    if act.shape[0] != grad.shape[0]:
        raise ValueError(
            f"act must be [B, C_in, *spatial] with B={grad.shape[0]} (from grad), got {shape(act)}; "
            f"pass the same batch to both"
        )
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    for name, tensor in (("act", act), ("grad", grad)):
        if tensor.shape[1] % groups:
            raise ValueError(
                f"{name} must have a number of channels divisible by groups={groups}, got {tensor.shape[1]}; "
                f"pass the layer's own groups"
            )
    expected = out_size(act.shape[2:], kernel_size, stride, padding, dilation)
    if list(grad.shape[2:]) != expected:
        raise ValueError(
            f"grad must have spatial size {expected} (from act {shape(act)}, kernel_size={list(kernel_size)}, "
            f"stride={list(stride)}, padding={list(padding)} before and after, dilation={list(dilation)}), "
            f"got {shape(grad)}; pass the layer's own geometry"
        )
    check_like("grad", grad, act)


def out_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Positions of the layer's output along each spatial dimension; 0 where the kernel does not fit."""
    return [
        max(0, (n + lo + hi - d * (k - 1) - 1) // s + 1)
        for n, k, s, lo, hi, d in zip(size, kernel_size, stride, padding[::2], padding[1::2], dilation)
    ]


def features(act: torch.Tensor, *geometry: Any) -> int:
    """Columns of G_b: I = C_in/groups · prod(kernel_size), and one more with bias."""
    kernel_size, _, _, _, groups, bias = Geometry(*geometry)
    return act.shape[1] // groups * math.prod(kernel_size) + bool(bias)


def check_conv_sides(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *geometry: Any
) -> None:
    """left [O, P] and right [I (+ 1), Q]; None is the identity."""
    check_conv(act, grad, *geometry)
    I, bias = features(act, *geometry), geometry[-1]
    for name, side, size, what in (
        ("left", left, grad.shape[1], "grad's channels"),
        ("right", right, I, f"C_in/groups · prod(kernel_size){' + 1 for the bias' if bias else ''}"),
    ):
        if side is None:
            continue
        if side.dim() != 2 or side.shape[0] != size:
            raise ValueError(
                f"{name} must be [{size}, {'P' if name == 'left' else 'Q'}] ({what}), got {shape(side)}; "
                f"one column per sketch dimension, or None for the identity"
            )
        check_auxiliary(name, side, act)


def check_conv_centers(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, *geometry: Any
) -> None:
    """center_grad [K, O] and center_act [K, I (+ 1)], or both with a rank dimension in the middle."""
    check_conv(act, grad, *geometry)
    O, I, bias = grad.shape[1], features(act, *geometry), geometry[-1]
    if center_grad.dim() not in (2, 3) or center_grad.shape[-1] != O:
        raise ValueError(f"center_grad must be [K, {O}] or [K, r, {O}] (grad's channels), got {shape(center_grad)}")
    expected = [*center_grad.shape[:-1], I]
    if list(center_act.shape) != expected:
        raise ValueError(
            f"center_act must be {expected} (K and rank from center_grad, C_in/groups · prod(kernel_size)"
            f"{' + 1 for the bias' if bias else ''} features), got {shape(center_act)}"
        )
    check_auxiliary("center_grad", center_grad, act)
    check_auxiliary("center_act", center_act, act)
