"""``embedding_gram``: all pairwise inner products of the examples' gradients of an embedding table."""

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

MOST_EXAMPLES = 2**16
"""Their pairs are as many as the blocks of one launch."""


def embedding_gram(
    index: torch.Tensor, grad: torch.Tensor, *, num_embeddings: int, padding_idx: int | None = None
) -> torch.Tensor:
    """Inner products ⟨G_b, G_c⟩ of all pairs of per-example gradients ``G_b = Σ_t e_{index[b, t]} ⊗ grad[b, t]``.

    Args:
        index: rows looked up [B, *] int64 or int32; ``*`` is any number of position dimensions.
        grad: gradients of the loss with respect to the looked-up rows [B, *, D].
        num_embeddings: V, the number of rows of the table. Cost and memory do not depend on it.
        padding_idx: row that gets no gradient, as in ``torch.nn.Embedding``; counted from the end where negative.

    Returns:
        [B, B], symmetric to the bit; float64 for a float64 grad, else float32, in the units of gradient squared.
        Examples without a row in common have 0, and a NaN in an example stays in its own row and column.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; an index outside of the table, named.

    Source:
        ``⟨G_b, G_c⟩ = Σ_v G_b[v]·G_c[v]`` over the rows that both look up; the guide's "mathematics" page.

    Example:
        >>> index, grad = torch.tensor([[2, 0], [2, 3]]), torch.ones(2, 2, 4)
        >>> gf.ops.embedding_gram(index, grad, num_embeddings=5).tolist()
        [[8.0, 4.0], [4.0, 8.0]]
    """
    return _op.call(index, grad, num_embeddings, padding_idx)


def _check(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> None:
    check_embedding(index, grad, num_embeddings, padding_idx)


def _fake(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], grad.shape[0], dtype=accumulator(grad.dtype))  # [B, B]


def _reference(index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None) -> torch.Tensor:
    check_range(index, num_embeddings)
    return reference.embedding_gram.embedding_gram(index, grad, num_embeddings, padding_idx)


_op = Op(
    "embedding_gram(Tensor index, Tensor grad, SymInt num_embeddings, SymInt? padding_idx) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel("cpu", refuses=cpu_refuses, route=lambda *_: "row by row of the table, the examples that share it")
def embedding_gram_cpu(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, num_embeddings, padding_idx)
    index, grad = positions(index, grad)
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _native._C.embedding_gram_cpu(factors, out.data_ptr(), _native.num_threads())
    return out


def _cuda_refuses(index: torch.Tensor, *_: object) -> str | None:
    if index.shape[0] >= MOST_EXAMPLES:
        return "the CUDA kernel takes fewer than 2¹⁶ examples"
    return _cuda.refuses(index)


@_op.kernel("cuda", refuses=_cuda_refuses, route=lambda *_: "a pair of examples a block, common rows by binary search")
def embedding_gram_cuda(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, num_embeddings, padding_idx)
    if grad.numel() == 0:
        return out.zero_()
    index, grad = positions(index, grad)
    in_order, order = index.contiguous().sort(dim=1, stable=True)  # [B, T] both
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _cuda.launch("embedding_gram_cuda", grad.device, factors, in_order.data_ptr(), order.data_ptr(), out.data_ptr())
    return out


def _triton_refuses(index: torch.Tensor, grad: torch.Tensor, *_: object) -> str | None:
    if index.shape[0] >= MOST_EXAMPLES:
        return "the Triton kernel takes fewer than 2¹⁶ examples"
    return triton_table_refuses(index, grad)


@_op.kernel(
    "triton",
    refuses=_triton_refuses,
    loses=triton_table_loses,
    route=lambda *_: "products of positions, those kept that look up one row; tiles without one are passed over",
)
def embedding_gram_triton(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    from ..triton_kernels.embedding_gram import embedding_gram as fill  # here: it imports Triton

    check_range(index, num_embeddings)
    out = _fake(index, grad, num_embeddings, padding_idx)
    fill(*positions(index, grad), padding_row(num_embeddings, padding_idx), out)
    return out
