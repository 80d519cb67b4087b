"""``embedding_sketch``: two-sided projection of every example's gradient of an embedding table."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._checks import accumulator
from ._embedding import (
    check_embedding,
    check_range,
    check_side,
    cpu_refuses,
    cuda_products_lose,
    cuda_products_refuse,
    padding_row,
    positions,
    triton_table_loses,
    triton_table_refuses,
)


def embedding_sketch(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Projection ``leftᵀ G_b right`` of every example's gradient of an embedding table; no G_b is stored.

    ``G_b = Σ_t e_{index[b, t]} ⊗ grad[b, t]`` is [V, D] like the table, so ``left`` meets the table's rows: it is
    looked up, and only the rows that an index names are read.

    Args:
        index: rows looked up [B, *] int64 or int32; ``*`` is any number of position dimensions.
        grad: gradients of the loss with respect to the looked-up rows [B, *, D].
        left: [V, P], in grad's dtype or the result's; None is the identity (P = V: B times the table's rows).
        right: [D, Q]; None is the identity. With both None the result is G_b itself.
        num_embeddings: V, the number of rows of the table.
        padding_idx: row that gets no gradient, as in ``torch.nn.Embedding``; counted from the end where negative.

    Returns:
        [B, P, Q], float64 for a float64 grad, else float32, in the units of the gradient. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; an index outside of the table, named.

    Source:
        ``leftᵀ G_b right = Σ_t left[index[b, t]] ⊗ (rightᵀ grad[b, t])``; the guide's "mathematics" page.

    Example:
        >>> index, grad = torch.randint(1000, (8, 5)), torch.randn(8, 5, 16)
        >>> left, right = torch.randn(1000, 4), torch.randn(16, 3)
        >>> gf.ops.embedding_sketch(index, grad, left, right, num_embeddings=1000).shape
        torch.Size([8, 4, 3])
    """
    return _op.call(index, grad, left, right, num_embeddings, padding_idx)


def _check(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> None:
    check_embedding(index, grad, num_embeddings, padding_idx)
    check_side("left", left, num_embeddings, "num_embeddings", grad)
    check_side("right", right, grad.shape[-1], "grad's features", grad)


def _fake(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    P = num_embeddings if left is None else left.shape[1]
    Q = grad.shape[-1] if right is None else right.shape[1]
    return grad.new_empty(grad.shape[0], P, Q, dtype=accumulator(grad.dtype))  # [B, P, Q]


def _reference(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    check_range(index, num_embeddings)
    return reference.embedding_sketch.embedding_sketch(index, grad, left, right, num_embeddings, padding_idx)


_op = Op(
    "embedding_sketch(Tensor index, Tensor grad, Tensor? left, Tensor? right, SymInt num_embeddings, "
    "SymInt? padding_idx) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
)


def _cpu_route(index: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, *_: object) -> str:
    if left is None:
        return "rows projected a block at a time and added where they belong"
    return "rows projected a block at a time, multiplied by looked-up rows of left in cache"


@_op.kernel("cpu", refuses=cpu_refuses, route=_cpu_route)
def embedding_sketch_cpu(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor | None,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, left, right, num_embeddings, padding_idx)
    index, grad = positions(index, grad)
    left, right = (None if side is None else side.to(out.dtype).contiguous() for side in (left, right))
    address = [0 if side is None else side.data_ptr() for side in (left, right)]
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _native._C.embedding_sketch_cpu(factors, *address, *out.shape[1:], out.data_ptr(), _native.num_threads())
    return out


def _cuda_refuses(
    index: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, *_: object
) -> str | None:
    if left is None:
        return "without left the sketch is as large as the table, and the CUDA kernel sums into registers; pass left"
    return cuda_products_refuse(index, grad, left.shape[1], grad.shape[-1] if right is None else right.shape[1])


@_op.kernel(
    "cuda",
    refuses=_cuda_refuses,
    loses=cuda_products_lose,
    route=lambda *_: "64 positions a block: projected, multiplied by looked-up rows of left and summed on the chip",
)
def embedding_sketch_cuda(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, left, right, num_embeddings, padding_idx)
    if grad.numel() == 0 or out.numel() == 0:
        return out.zero_()
    index, grad = positions(index, grad)
    left, right = left.to(out.dtype).contiguous(), None if right is None else right.to(out.dtype).contiguous()
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    splits = _cuda.native().embedding_products_cuda_splits(factors, *out.shape[1:])
    partial = out.new_empty(*out.shape, splits) if splits > 1 else out
    _cuda.launch(
        "embedding_sketch_cuda", grad.device, factors, left.data_ptr(), 0 if right is None else right.data_ptr(),
        *out.shape[1:], partial.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


def _triton_refuses(index: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, *_: object) -> str | None:
    if left is None:
        return "without left the sketch is as large as the table, and the Triton kernel sums into registers; pass left"
    return triton_table_refuses(index, grad)


@_op.kernel(
    "triton",
    refuses=_triton_refuses,
    loses=triton_table_loses,
    route=lambda *_: "a block of rows projected, multiplied by looked-up rows of left and summed over T in registers",
)
def embedding_sketch_triton(
    index: torch.Tensor,
    grad: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    from ..triton_kernels.embedding_products import embedding_sketch as fill  # here: it imports Triton

    check_range(index, num_embeddings)
    out = _fake(index, grad, left, right, num_embeddings, padding_idx)
    fill(*positions(index, grad), padding_row(num_embeddings, padding_idx), left, right, out)
    return out
