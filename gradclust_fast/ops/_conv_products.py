"""What the CUDA versions of ``conv_sketch`` and ``conv_dot`` share: G_b times their sides, and when they run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from .. import _native
from ..triton_kernels._support import float32_precision
from . import _conv_cuda, _cuda
from ._checks import accumulator
from ._conv import Geometry, features
from ._conv_routes import layer_of

PRODUCTS = ("dot", "right", "left", "whole")  # csrc/conv_products.h: ConvProduct
WORKSPACE = 1 << 27  # bytes of products that are still to be added up: examples enough to fill a large device

# FLOP in the time that a Hopper GPU takes for a byte of memory traffic: rates that such products usually reach there,
# not measured here. Ordinary arithmetic, tensor cores, and torch's own convolutions and products.
_PLAIN = {torch.float32: 11, torch.float64: 6}
_TENSOR = {torch.float32: 57, torch.bfloat16: 115, torch.float16: 115}
_LIBRARY = {"ieee": 14, "tf32x3": 28, "tf32": 85}


def products(
    route: str,
    act: torch.Tensor,
    grad: torch.Tensor,
    geometry: tuple,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Every example's G_b without the bias, multiplied tile by tile on the chip: (examples, products) in turn.

    With rows [n, (r,) O] and columns [n, (r,) I] the products are Σ_r rowsᵀ G_b columns [b, n]; with columns alone
    G_b columns [b, n, O], with rows alone rowsᵀ G_b [b, n, I], with neither G_b [b, O, I]. Nothing may be empty.
    """
    kernel_size, _, _, _, groups, _ = Geometry(*geometry)
    O, C, taps = grad.shape[1], act.shape[1] // groups, math.prod(kernel_size)
    what = (("whole", "right"), ("left", "dot"))[rows is not None][columns is not None]
    act, grad = _conv_cuda.channels_side_by_side(act), _conv_cuda.channels_side_by_side(grad)
    dtype, native = accumulator(act.dtype), _cuda.native()
    codes = _conv_cuda.ROUTES.index(route), PRODUCTS.index(what)
    parts = native.conv_products_cuda_parts(_native.conv(act, grad, *geometry), *codes)
    pitches = native.conv_products_cuda_pitches(codes[0])
    count, rank = 1, 1
    address, pitch = [0, 0], [0, 0]
    packed = []  # held until the kernels are queued
    for i, side in enumerate((rows, columns)):
        if side is not None:
            count, rank = side.shape[0], side.shape[1:-1].numel()
            dims = side.reshape(count * rank, C, taps).mT if i else side.reshape(count * rank, groups, O // groups)
            packed.append(_padded(dims, pitches[i]))
            address[i], pitch[i] = packed[-1].data_ptr(), packed[-1].shape[-1]
    shape = {"dot": (count,), "right": (count, O), "left": (count, taps, C), "whole": (O, C * taps)}[what]
    step = max(1, WORKSPACE // (parts * math.prod(shape) * dtype.itemsize))
    for first in range(0, act.shape[0], step):
        part = slice(first, min(first + step, act.shape[0]))
        out = torch.empty(part.stop - first, parts, *shape, dtype=dtype, device=act.device)
        factors, sides = _native.conv(act[part], grad[part], *geometry), (*address, count, rank, *pitch)
        _cuda.launch("conv_products_cuda", act.device, factors, *codes, sides, out.data_ptr())
        total = out.sum(1) if parts > 1 else out[:, 0]
        yield part, total.mT.flatten(2) if what == "left" else total


def _padded(side: torch.Tensor, multiple: int) -> torch.Tensor:
    """A dense, aligned copy with zeros after the last dimension, up to a multiple."""
    size = side.shape[-1]
    copy = side.new_zeros(*side.shape[:-1], multiple * -(-size // multiple))
    copy[..., :size] = side
    return copy


def refuses(act: torch.Tensor, grad: torch.Tensor, _: object, __: object, *geometry: Any) -> str | None:
    """Why the CUDA kernel cannot run on the arguments of a sketch or of inner products, or None."""
    if 8 * features(act, *geometry) >= 2**31:
        return "the CUDA kernel takes fewer than 2²⁸ columns of G_b"
    return _conv_cuda.refuses(act, grad)


def route(act: torch.Tensor, grad: torch.Tensor, _: object, __: object, *geometry: Any) -> str:
    """The route as a sentence."""
    return f"{_tiles(act, grad, *geometry)}, multiplied on the chip"


_tiles = _conv_cuda.route_of("conv_sqnorm")  # of the same size, and so fetched in the same way


def loses(
    act: torch.Tensor, grad: torch.Tensor, geometry: tuple, columns: int, flops: float, numbers: float
) -> str | None:
    """By FLOPs and bytes of one example, not by a measurement: whether torch's convolution is the faster way.

    Args:
        columns: how many columns or rows or centres every tile is multiplied by.
        flops: what the reference computes, with these as filters of the image.
        numbers: of the accumulator's dtype that it reads and writes beyond act and grad.
    """
    layer, dtype = layer_of(act, grad, geometry), accumulator(act.dtype)
    how = _conv_cuda.choose(act, grad, layer.groups)
    inputs, taps = act[0].numel() + grad[0].numel(), layer.columns // layer.C
    entries, rate = layer.O * layer.columns, _PLAIN[dtype]
    if how != "correlate":
        rows = 32 if layer.O <= 32 and (how == "tiles_tf32" or act.dtype not in _PLAIN) else 64
        entries = rows * -(-layer.O // rows) * taps * 8 * -(-layer.C // 8)
        rate = _PLAIN[act.dtype] if how == "tiles" and act.dtype in _PLAIN else _TENSOR[act.dtype]
    entries *= layer.groups
    ours = 2 * entries * layer.T / rate + 2 * entries * columns / _PLAIN[dtype] + inputs * act.itemsize
    casts = 0 if act.dtype == dtype else 2 * inputs * dtype.itemsize
    library = _LIBRARY["ieee" if dtype == torch.float64 else float32_precision()]
    theirs = flops / library + numbers * dtype.itemsize + casts + inputs * act.itemsize
    if ours <= theirs:
        return None
    made = 2 * layer.groups * layer.O * layer.columns * (layer.T + columns)
    return (
        f"as filters of torch's convolution it takes {flops / 1e6:.3g} MFLOP an example, through G_b {made / 1e6:.3g}; "
        f"by FLOPs and bytes the first is faster"
    )
