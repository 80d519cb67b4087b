"""``embedding_dot``: inner products of every example's gradient of an embedding table with factored centres."""

from __future__ import annotations

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._checks import accumulator, check_auxiliary, shape
from ._embedding import (
    check_embedding,
    check_range,
    cpu_refuses,
    cuda_products_lose,
    cuda_products_refuse,
    padding_row,
    positions,
    triton_table_loses,
    triton_table_refuses,
)


def embedding_dot(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Inner products ⟨G_b, C_k⟩ of every example's gradient of an embedding table with K centres in factored form.

    ``G_b = Σ_t e_{index[b, t]} ⊗ grad[b, t]`` is [V, D] like the table, and ``C_k = center_index[k] ⊗ center_grad[k]``,
    or, with a rank dimension, ``C_k = Σ_r center_index[k, r] ⊗ center_grad[k, r]``.

    Args:
        index: rows looked up [B, *] int64 or int32; ``*`` is any number of position dimensions.
        grad: gradients of the loss with respect to the looked-up rows [B, *, D].
        center_index: what meets the index, [K, V] or [K, r, V], in grad's dtype or the result's.
        center_grad: what meets grad, [K, D] or [K, r, D].
        num_embeddings: V, the number of rows of the table.
        padding_idx: row that gets no gradient, as in ``torch.nn.Embedding``; counted from the end where negative.

    Returns:
        [B, K], float64 for a float64 grad, else float32, in the units of gradient times centre. A NaN in an example
        stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; an index outside of the table, named.

    Source:
        ``⟨G_b, C_k⟩ = Σ_t center_index[k, index[b, t]] (grad[b, t]·center_grad[k])``; Faghri et al. 2020,
        arXiv:2007.04532, section 3 (rank-1 centres).

    Example:
        >>> index, grad = torch.randint(1000, (8, 5)), torch.randn(8, 5, 16)
        >>> gf.ops.embedding_dot(index, grad, torch.randn(3, 1000), torch.randn(3, 16), num_embeddings=1000).shape
        torch.Size([8, 3])
    """
    return _op.call(index, grad, center_index, center_grad, num_embeddings, padding_idx)


def _check(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> None:
    check_embedding(index, grad, num_embeddings, padding_idx)
    if center_index.dim() not in (2, 3) or center_index.shape[-1] != num_embeddings:
        raise ValueError(
            f"center_index must be [K, {num_embeddings}] or [K, r, {num_embeddings}] (num_embeddings), "
            f"got {shape(center_index)}"
        )
    expected = [*center_index.shape[:-1], grad.shape[-1]]
    if list(center_grad.shape) != expected:
        raise ValueError(
            f"center_grad must be {expected} (K and rank from center_index, features from grad), "
            f"got {shape(center_grad)}"
        )
    check_auxiliary("center_index", center_index, grad, "grad")
    check_auxiliary("center_grad", center_grad, grad, "grad")


def _fake(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], center_index.shape[0], dtype=accumulator(grad.dtype))  # [B, K]


def _reference(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    check_range(index, num_embeddings)
    args = (index, grad, center_index, center_grad, num_embeddings, padding_idx)
    return reference.embedding_dot.embedding_dot(*args)


_op = Op(
    "embedding_dot(Tensor index, Tensor grad, Tensor center_index, Tensor center_grad, SymInt num_embeddings, "
    "SymInt? padding_idx) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
)


@_op.kernel(
    "cpu", refuses=cpu_refuses, route=lambda *_: "products with center_grad, weighed and summed over T in cache"
)
def embedding_dot_cpu(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, center_index, center_grad, num_embeddings, padding_idx)
    rank = center_index.shape[1] if center_index.dim() == 3 else 1
    index, grad = positions(index, grad)
    center_index, center_grad = (c.to(out.dtype).contiguous() for c in (center_index, center_grad))
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    _native._C.embedding_dot_cpu(
        factors, center_index.data_ptr(), center_grad.data_ptr(), out.shape[1], rank, out.data_ptr(),
        _native.num_threads(),
    )  # fmt: skip
    return out


def _cuda_refuses(index: torch.Tensor, grad: torch.Tensor, center_index: torch.Tensor, *_: object) -> str | None:
    return cuda_products_refuse(index, grad, center_index.shape[0])


@_op.kernel(
    "cuda",
    refuses=_cuda_refuses,
    loses=cuda_products_lose,
    route=lambda *_: "64 positions a block: products with center_grad, weighed and summed on the chip",
)
def embedding_dot_cuda(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    check_range(index, num_embeddings)
    out = _fake(index, grad, center_index, center_grad, num_embeddings, padding_idx)
    rank = center_index.shape[1] if center_index.dim() == 3 else 1
    if grad.numel() == 0 or out.numel() == 0 or rank == 0:
        return out.zero_()
    index, grad = positions(index, grad)
    center_index, center_grad = (c.to(out.dtype).contiguous() for c in (center_index, center_grad))
    factors = _native.embedding(index, grad, num_embeddings, padding_row(num_embeddings, padding_idx))
    splits = _cuda.native().embedding_products_cuda_splits(factors, 1, out.shape[1])
    partial = out.new_empty(*out.shape, splits) if splits > 1 else out
    _cuda.launch(
        "embedding_dot_cuda", grad.device, factors, center_index.data_ptr(), center_grad.data_ptr(), out.shape[1], rank,
        partial.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out


@_op.kernel(
    "triton",
    refuses=triton_table_refuses,
    loses=triton_table_loses,
    route=lambda *_: "products with center_grad, multiplied by looked-up numbers in one tile and summed over T",
)
def embedding_dot_triton(
    index: torch.Tensor,
    grad: torch.Tensor,
    center_index: torch.Tensor,
    center_grad: torch.Tensor,
    num_embeddings: int,
    padding_idx: int | None,
) -> torch.Tensor:
    from ..triton_kernels.embedding_products import embedding_dot as fill  # here: it imports Triton

    check_range(index, num_embeddings)
    out = _fake(index, grad, center_index, center_grad, num_embeddings, padding_idx)
    fill(*positions(index, grad), padding_row(num_embeddings, padding_idx), center_index, center_grad, out)
    return out
