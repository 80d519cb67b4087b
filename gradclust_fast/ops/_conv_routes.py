"""What the C++ kernels of the conv ops cost by each of their routes, and when they run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch

from .. import _native
from ._conv import Geometry

GRADIENT_ROUTES = ("direct", "correlate")  # csrc/types.h: GradientRoute

ROUTE_TEXT = {
    "direct": "direct, G_b tile by tile from the padded image",
    "correlate": "one short correlation a pair of channels",
    "gram": "structured Gram of positions",
    "filters": "filters: right or the centres convolve the image",
    "positions": "products of positions, pair by pair of examples",
    "mixed": "mixed: left mixes grad's channels first",
}


def cpu_refuses(act: torch.Tensor, *_: object) -> str | None:
    """Why the C++ kernels cannot run on these factors, or None."""
    if act.device.type != "cpu":
        return f"the C++ kernel needs CPU tensors, got {act.device}"
    return _native.cpu_unavailable()


def lanes(n: int) -> int:
    """n output channels or columns, rounded up to what the micro-kernel computes together."""
    return 16 * -(-n // 16)


class Layer(NamedTuple):
    """The sizes of one example: C and O are channels of a group, ``before`` the padding before each dimension."""

    C: int
    O: int
    groups: int
    size: tuple[int, ...]
    out: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def T(self) -> int:
        return math.prod(self.out)

    @property
    def columns(self) -> int:
        return self.C * math.prod(self.kernel_size)


def layer_of(act: torch.Tensor, grad: torch.Tensor, geometry: Sequence[Any]) -> Layer:
    kernel_size, stride, padding, dilation, groups, _ = geometry = Geometry(*geometry)
    return Layer(
        act.shape[1] // groups,
        grad.shape[1] // groups,
        groups,
        tuple(act.shape[2:]),
        tuple(grad.shape[2:]),
        tuple(kernel_size),
        tuple(stride),
        tuple(padding[::2]),
        tuple(dilation),
    )


def phases(size: int, out: int, kernel: int, stride: int, before: int, dilation: int) -> Iterator[int]:
    """Along one dimension: image positions of each phase of the stride that kernel elements meet."""
    reach: dict[int, list[int]] = {}
    for i in range(kernel):
        origin = i * dilation - before
        reach.setdefault(origin % stride, []).append(origin // stride)
    for phase, steps in reach.items():
        inside = range(max(0, min(steps)), min((size - phase - 1) // stride, out - 1 + max(steps)) + 1)
        yield len(inside)


@lru_cache(maxsize=1024)
def gradient_costs(layer: Layer) -> dict[str, float]:
    """Work of making G_b of one example by each route, in FLOP at the direct route's speed.

    The constants are measured (AVX2): placing a number of grad or of a channel costs 24 or 48 FLOP, and what becomes of
    a tile as much as six positions.
    """
    C, O, groups, _, out, kernel_size, stride, _, dilation = layer
    T, kernel = layer.T, math.prod(kernel_size)
    width = 8 * -(-out[-1] // 8)
    rows = math.prod((n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(out, stride, kernel_size, dilation)) / out[-1]
    taps = 9 * -(-kernel // 9)
    return {
        "direct": groups * lanes(O) * (2 * C * kernel * (T + 6) + 24 * T),
        "correlate": groups * O * C * (2.2 * T / out[-1] * width * taps + 48 * rows * width + 600 * taps),
    }


@lru_cache(maxsize=1024)
def position_counts(layer: Layer) -> list[int]:
    """Image positions of each phase of the stride."""
    axes = zip(layer.size, layer.out, layer.kernel_size, layer.stride, layer.before, layer.dilation)
    return [math.prod(phase) for phase in product(*(list(phases(*axis)) for axis in axes))]


def pointwise_loses(act: torch.Tensor, grad: torch.Tensor, *geometry: Any) -> str | None:
    """Where torch's batched products win: one kernel element, and groups narrower than what is computed together."""
    kernel_size, _, _, _, groups, _ = Geometry(*geometry)
    if math.prod(kernel_size) == 1 and grad.shape[1] // groups < 16:
        return "with one kernel element and fewer than 16 output channels a group torch's batched products are faster"
    return None


def cheapest(work: dict[str, float]) -> str:
    return min(work, key=lambda route: work[route])


def describe(work: dict[str, float]) -> str:
    """The cheapest route with its cost, and the others'."""
    route = cheapest(work)
    rest = ", ".join(f"{name} {cost / 1e6:.3g}" for name, cost in work.items() if name != route)
    return f"{ROUTE_TEXT[route]}: {work[route] / 1e6:.3g} effective MFLOP an example (others: {rest})"
