"""``embedding_sqnorm``: squared norm of every example's gradient of an embedding table."""

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


def embedding_sqnorm(
    index: torch.Tensor, grad: torch.Tensor, *, num_embeddings: int, padding_idx: int | None = None
) -> torch.Tensor:
    """Squared norm ‖G_b‖² of every example's gradient of an embedding table; neither G_b nor the table is needed.

    ``G_b = Σ_t e_{index[b, t]} ⊗ grad[b, t]`` is [V, D] like the table: row v is the sum of the gradients of the
    positions that looked v up, so positions that share a row are added before they are squared.

    Args:
        index: rows looked up [B, *] int64 or int32; ``*`` is any number of position dimensions.
        grad: gradients of the loss with respect to the looked-up rows [B, *, D].
        num_embeddings: V, the number of rows of the table. Cost and memory do not depend on it.
        padding_idx: row that gets no gradient, as in ``torch.nn.Embedding``; counted from the end where negative.

    Returns:
        [B], float64 for a float64 grad, else float32, in the units of gradient squared. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; an index outside of the table, named.

    Source:
        The guide's "mathematics" page: an embedding is a linear layer whose inputs are one-hot rows.

    Example:
        >>> index, grad = torch.tensor([[2, 0, 2]]), torch.ones(1, 3, 4)
        >>> gf.ops.embedding_sqnorm(index, grad, num_embeddings=5)  # row 2: 4·2², row 0: 4·1²
        tensor([20.])
    """
    return _op.call(index, grad, num_embeddings, padding_idx)


def _check(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> None:
    check_embedding(index, grad, num_embeddings, padding_idx)


def _fake(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], dtype=accumulator(grad.dtype))  # [B]


def _reference(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> torch.Tensor:
    check_range(index, num_embeddings)
    return reference.embedding_sqnorm.embedding_sqnorm(index, grad, num_embeddings, padding_idx)


_op = Op(
    "embedding_sqnorm(Tensor index, Tensor grad, SymInt num_embeddings, SymInt? padding_idx) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "positions grouped by row in a hash table, an example a task")
def embedding_sqnorm_cpu(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, num_embeddings, padding_idx)
    index, grad = positions(index, grad)
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _native._C.embedding_sqnorm_cpu(factors, out.data_ptr(), _native.num_threads())
    return out


def _cuda_refuses(index: torch.Tensor, grad: torch.Tensor, *_: object) -> str | None:
    if grad.shape[0] * -(-grad.shape[-1] // 32) >= 2**31:
        return "the CUDA kernel takes fewer than 2³¹ blocks of an example and 32 features"
    return _cuda.refuses(index)


@_op.kernel("cuda", refuses=_cuda_refuses, route=lambda *_: "positions sorted by table row, an example a block")
def embedding_sqnorm_cuda(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, num_embeddings, padding_idx)
    if grad.numel() == 0:
        return out.zero_()
    index, grad = positions(index, grad)
    in_order, order = index.contiguous().sort(dim=1, stable=True)  # [B, T] both
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    partial = out.new_empty(grad.shape[0], _cuda.native().embedding_sqnorm_cuda_blocks(factors))
    _cuda.launch(
        "embedding_sqnorm_cuda", grad.device, factors, in_order.data_ptr(), order.data_ptr(), partial.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    return out


@_op.kernel(
    "triton",
    refuses=triton_table_refuses,
    loses=triton_table_loses,
    route=lambda *_: "positions sorted by table row, features of an example a block",
)
def embedding_sqnorm_triton(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    from ..triton_kernels.embedding_sqnorm import embedding_sqnorm as fill  # here: it imports Triton

    check_range(index, num_embeddings)
    out = _fake(index, grad, num_embeddings, padding_idx)
    fill(*positions(index, grad), padding_row(num_embeddings, padding_idx), out)
    return out
