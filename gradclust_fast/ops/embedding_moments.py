"""``embedding_moments``: sums of the examples' gradients of an embedding table and of their squares."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._checks import accumulator
from ._embedding import (
    check_embedding,
    check_range,
    cpu_refuses,
    padding_row,
    positions,
    triton_table_loses,
    triton_table_refuses,
)


def embedding_moments(
    index: torch.Tensor, grad: torch.Tensor, *, num_embeddings: int, padding_idx: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate-wise sums ``Σ_b G_b`` and ``Σ_b G_b∘G_b`` of the gradients ``G_b = Σ_t e_{index[b, t]} ⊗ grad[b, t]``.

    Args:
        index: rows looked up [B, *] int64 or int32; ``*`` is any number of position dimensions.
        grad: gradients of the loss with respect to the looked-up rows [B, *, D].
        num_embeddings: V, the number of rows of the table.
        padding_idx: row that gets no gradient, as in ``torch.nn.Embedding``; counted from the end where negative.

    Returns:
        Two tensors [V, D]; float64 for a float64 grad, else float32; units of gradient and of gradient squared. Rows
        that nobody looked up are zero. A NaN stays in its own row of the table.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; an index outside of the table, named.

    Source:
        Row v of G_b is the sum over the positions of example b that looked v up; the guide's "mathematics" page.

    Example:
        >>> index, grad = torch.tensor([[1, 1], [1, 0]]), torch.ones(2, 2, 1)
        >>> first, second = gf.ops.embedding_moments(index, grad, num_embeddings=3)
        >>> first.flatten().tolist(), second.flatten().tolist()
        ([1.0, 3.0, 0.0], [1.0, 5.0, 0.0])
    """
    return _op.call(index, grad, num_embeddings, padding_idx)


def _check(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> None:
    check_embedding(index, grad, num_embeddings, padding_idx)


def _fake(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dtype = (num_embeddings, grad.shape[-1]), accumulator(grad.dtype)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype)  # [V, D] each


def _reference(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_range(index, num_embeddings)
    return reference.embedding_moments.embedding_moments(index, grad, num_embeddings, padding_idx)


_op = Op(
    "embedding_moments(Tensor index, Tensor grad, SymInt num_embeddings, SymInt? padding_idx) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "positions grouped by row in a hash table, a row a task")
def embedding_moments_cpu(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_range(index, num_embeddings)
    shape, dtype = (num_embeddings, grad.shape[-1]), accumulator(grad.dtype)
    first, second = grad.new_zeros(shape, dtype=dtype), grad.new_zeros(shape, dtype=dtype)  # few rows are written
    index, grad = positions(index, grad)
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _native._C.embedding_moments_cpu(factors, first.data_ptr(), second.data_ptr(), _native.num_threads())
    return first, second


def _cuda_refuses(index: torch.Tensor, grad: torch.Tensor, *_: object) -> str | None:
    if index.numel() * -(-grad.shape[-1] // 32) >= 2**31:
        return "the CUDA kernel takes fewer than 2³¹ warps of a position and 32 features"
    return _cuda.refuses(index)


@_op.kernel("cuda", refuses=_cuda_refuses, route=lambda *_: "the batch's positions sorted by table row, a warp a row")
def embedding_moments_cuda(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    check_range(index, num_embeddings)
    shape, dtype = (num_embeddings, grad.shape[-1]), accumulator(grad.dtype)
    first, second = grad.new_zeros(shape, dtype=dtype), grad.new_zeros(shape, dtype=dtype)  # few rows are written
    if grad.numel() == 0:
        return first, second
    index, grad = positions(index, grad)
    in_order, order = index.flatten().sort(stable=True)  # [B · T] both
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _cuda.launch(
        "embedding_moments_cuda", grad.device, factors, in_order.data_ptr(), order.data_ptr(), first.data_ptr(),
        second.data_ptr(),
    )  # fmt: skip
    return first, second


@_op.kernel(
    "triton",
    refuses=triton_table_refuses,
    loses=triton_table_loses,
    route=lambda *_: "the batch's positions sorted by table row, cut into pieces at the ends of examples",
)
def embedding_moments_triton(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.embedding_moments import embedding_moments as fill  # here: it imports Triton

    check_range(index, num_embeddings)
    shape = (num_embeddings, grad.shape[-1])
    first, second = (grad.new_zeros(shape, dtype=torch.float32) for _ in range(2))  # few rows are written
    fill(*positions(index, grad), padding_row(num_embeddings, padding_idx), first, second)
    return first, second
