"""All pairwise inner products of per-example gradients of an embedding table."""

from __future__ import annotations

import torch

from .embedding_common import add_rows, table_rows


def embedding_gram(
    index: torch.Tensor, grad: torch.Tensor, num_embeddings: int, padding_idx: int | None
) -> torch.Tensor:
    """⟨G_b, G_c⟩ = Σ_v G_b[v]·G_c[v], one example against all; memory grows with the rows used, not with the table."""
    example, row, values = table_rows(index, grad, num_embeddings, padding_idx)
    B = index.shape[0]
    used, compact = torch.unique(row, return_inverse=True)
    table = values.new_zeros(used.numel(), values.shape[1])
    out = values.new_zeros(B, B)
    for b in range(B):
        mine = example == b
        table[compact[mine]] = values[mine]
        shared = torch.isin(compact, compact[mine])  # 0 · NaN of another example's row would be NaN
        out[b] = add_rows(out.new_zeros(B), example[shared], (values[shared] * table[compact[shared]]).sum(1))
    return out.tril() + out.tril(-1).mT
