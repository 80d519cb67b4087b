"""All pairwise inner products ⟨G_b, G_c⟩ of per-example gradients of a linear layer.

Not measured on a GPU yet; the floors below are counted, not timed. A program makes the products of two groups of rows,
of the activations in one accumulator and of the gradients in another, multiplies them and adds up over positions, so
only [B, B] reaches memory. Pairs above the diagonal are the mirrored ones. B²T²(I+O) FLOPs, bound by the tensor cores.

Sequences are centred as in grad_sqnorm: G_b = G̃_b + s_b c_bᵀ with c_b subtracted from the activations as they are read.
With Y[b, c] = ⟨G_b, s_c c_cᵀ⟩, a grad_dot with B centres, ⟨G_b, G_c⟩ = ⟨G̃_b, G̃_c⟩ + Y + Yᵀ − (s_b·s_c)(c_b·c_c), which
the kernel for one position adds up: it makes (s_b·s_c)(c_b·c_c) as it makes (d_b·d_c)(a_b·a_c).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _support
from ._device import product
from ._support import Target, blocks, launch, unit
from .grad_quantities import grad_quantities
from .grad_sqnorm_gram import centered_rows, centers_and_totals, outer

_SIZES = ["B", "T", "E", "stride_act_b", "stride_act_t", "stride_grad_b", "stride_grad_t"]


@triton.jit
def triangle(index):
    """(i, j), j ≤ i, of entry ``index`` of a triangle counted row by row."""
    i = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)  # index = i(i+1)/2 + j, up to rounding of the root
    i = tl.where(i.to(tl.int64) * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1).to(tl.int64) * (i + 2) // 2 <= index, i + 1, i)
    return i, (index - i.to(tl.int64) * (i + 1) // 2).to(tl.int32)


@triton.jit(do_not_specialize=_SIZES)
def grad_gram_rows_kernel(
    act_ptr, grad_ptr, pairs_ptr, mixed_ptr, out_ptr, B, I, O, stride_act_b: tl.int64, stride_grad_b: tl.int64,
    FINISH: tl.constexpr, BIAS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """(d_b·d_c)(a_b·a_c + bias) for a tile of pairs; FINISH: pairs + Y + Yᵀ + (s_b·s_c)(bias − c_b·c_c)."""
    i, j = triangle(tl.program_id(0))
    left = (i * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    right = (j * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    act_gram = tl.zeros((ROWS, ROWS), tl.float32)
    act_step = stride_act_b * UNIT
    grad_step = stride_grad_b * UNIT
    act_gram = outer(
        act_ptr, left * act_step, right * act_step, left < B, right < B, 0, I, I, act_gram, PRECISION, BLOCK
    )  # fmt: skip
    grad_gram = tl.zeros((ROWS, ROWS), tl.float32)
    grad_gram = outer(
        grad_ptr, left * grad_step, right * grad_step, left < B, right < B, 0, O, O, grad_gram, PRECISION, BLOCK
    )  # fmt: skip
    added = 1.0 if BIAS else 0.0
    inside = (left < B)[:, None] & (right < B)[None, :] & (left[:, None] >= right[None, :])
    at = left[:, None] * B + right[None, :]
    mirrored = right[None, :] * B + left[:, None]
    if FINISH:
        out = tl.load(pairs_ptr + at, mask=inside, other=0.0)
        out += tl.load(mixed_ptr + at, mask=inside, other=0.0) + tl.load(mixed_ptr + mirrored, mask=inside, other=0.0)
        out += grad_gram * (added - act_gram)
    else:
        out = grad_gram * (act_gram + added)
    tl.store(out_ptr + at, out, mask=inside)
    tl.store(out_ptr + mirrored, out, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def grad_gram_pairs_kernel(
    act_ptr, grad_ptr, center_ptr, out_ptr, B, T, E, I, O, stride_act_b: tl.int64, stride_act_t: tl.int64,
    stride_grad_b: tl.int64, stride_grad_t: tl.int64, PACKED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """⟨G̃_b, G̃_c⟩, b ≥ c, of two groups of E examples, or of two examples tile by tile."""
    i, j = triangle(tl.program_id(0))
    row = tl.arange(0, ROWS)
    total = 0.0
    for left_begin in range(0, E * T, ROWS):
        for right_begin in range(0, E * T, ROWS):
            left, right = left_begin + row, right_begin + row
            left_example = (i * E + left // T).to(tl.int64)
            right_example = (j * E + right // T).to(tl.int64)
            left_live = (left < E * T) & (left_example < B)
            right_live = (right < E * T) & (right_example < B)
            left_act = left_example * (stride_act_b * UNIT) + (left % T) * (stride_act_t * UNIT)
            right_act = right_example * (stride_act_b * UNIT) + (right % T) * (stride_act_t * UNIT)
            left_grad = left_example * (stride_grad_b * UNIT) + (left % T) * (stride_grad_t * UNIT)
            right_grad = right_example * (stride_grad_b * UNIT) + (right % T) * (stride_grad_t * UNIT)
            act_gram = tl.zeros((ROWS, ROWS), tl.float32)
            for begin in range(0, I, BLOCK):
                at = begin + tl.arange(0, BLOCK)
                x = centered_rows(act_ptr, center_ptr, left_act, left_example, left_live, left_live, at, I)
                y = centered_rows(act_ptr, center_ptr, right_act, right_example, right_live, right_live, at, I)
                act_gram = product(x, tl.trans(y), act_gram, PRECISION)
            grad_gram = tl.zeros((ROWS, ROWS), tl.float32)
            grad_gram = outer(
                grad_ptr, left_grad, right_grad, left_live, right_live, 0, O, O, grad_gram, PRECISION, BLOCK
            )
            both = act_gram * grad_gram
            if PACKED:
                for e in range(0, E):  # another example's NaN is left out, not multiplied by 0
                    b = i * E + e
                    line = tl.sum(tl.where((left_example == b)[:, None], both, 0.0), 0)
                    for f in range(0, E):
                        c = j * E + f
                        one = tl.sum(tl.where(right_example == c, line, 0.0), 0)
                        tl.store(out_ptr + tl.cast(b, tl.int64) * B + c, one, mask=(b < B) & (c <= b))
            else:
                total += tl.sum(tl.sum(both, 1), 0)
    if not PACKED:
        tl.store(out_ptr + tl.cast(i, tl.int64) * B + j, total)


class Tiles(NamedTuple):
    """Rows of both sides of a product, features at a time, most examples that share a side."""

    rows: int
    block: int
    examples: int
    warps: int
    stages: int


def gram_tiles(rows: int, dtype: torch.dtype, precision: str, target: Target, aligned: bool) -> Tiles:
    """128 rows a side where the triangle of such tiles fills the GPU; what was subtracted from is held in registers."""
    if target.interpreter:
        return Tiles(64, 64, 8, 4, 1)
    if dtype == torch.float32 and precision != "tf32":
        return Tiles(32, 16, 16, 4 if aligned else 8, 1)
    n = blocks(rows, 128)
    if target.capability < (9, 0) or not aligned:  # mma's factors, or every element's address, take registers too
        return Tiles(64, 32, 16, 8, 2)
    if n * (n + 1) // 2 >= target.multiprocessors:
        return Tiles(128, 32, 16, 8, 2)
    return Tiles(64, 32, 16, 4, 2)


def grad_gram(act: torch.Tensor, grad: torch.Tensor, bias: bool, out: torch.Tensor) -> None:
    """act [B, T, I], grad [B, T, O] with feature stride 1; fills out [B, B] in float32."""
    T = act.shape[1]
    if T == 0:
        out.zero_()
    elif T == 1:
        _rows(act[:, 0], grad[:, 0], None, bias, out)
    else:
        center, total = centers_and_totals(act, grad)  # [B, I], [B, O]
        pairs, mixed = torch.empty_like(out), torch.empty_like(out)
        _pairs(act, grad, center, pairs)
        grad_quantities(act, grad, False, dot=mixed, center_grad=total, center_act=center)
        _rows(center, total, (pairs, mixed), bias, out)


def _rows(
    act: torch.Tensor, grad: torch.Tensor, finish: tuple[torch.Tensor, torch.Tensor] | None, bias: bool,
    out: torch.Tensor,
) -> None:  # fmt: skip
    (B, I), O = act.shape, grad.shape[1]
    precision = _support.float32_precision()
    factor = unit(act.stride(0), grad.stride(0))
    tiling = gram_tiles(B, act.dtype, precision, _support.target(act.device), factor > 1)
    n = blocks(B, tiling.rows)
    pairs, mixed = (out, out) if finish is None else finish
    launch(
        grad_gram_rows_kernel, (n * (n + 1) // 2,), act, grad, pairs, mixed, out, B, I, O, act.stride(0) // factor,
        grad.stride(0) // factor, finish is not None, bias, factor, precision, tiling.rows, tiling.block,
        num_warps=tiling.warps, num_stages=tiling.stages, device=act.device,
    )  # fmt: skip


def _pairs(act: torch.Tensor, grad: torch.Tensor, center: torch.Tensor, out: torch.Tensor) -> None:
    B, T, I = act.shape
    O = grad.shape[2]
    precision = _support.float32_precision()
    target = _support.target(act.device)
    factor = unit(*act.stride()[:2], *grad.stride()[:2])
    tiling = gram_tiles(B * T, act.dtype, precision, target, factor > 1)
    packed = tiling.rows >= 2 * T
    if act.dtype == torch.float32 and tiling.rows == 32 and not packed:
        tiling = tiling._replace(warps=8)  # the sum of a long example's tiles beside two products: 4 would spill
    E = min(tiling.rows // T, tiling.examples) if packed else 1
    n = blocks(B, E)
    launch(
        grad_gram_pairs_kernel, (n * (n + 1) // 2,), act, grad, center, out, B, T, E, I, O,
        *(stride // factor for stride in (*act.stride()[:2], *grad.stride()[:2])), packed, factor, precision,
        tiling.rows, tiling.block, num_warps=tiling.warps, num_stages=tiling.stages, device=act.device,
    )  # fmt: skip
