"""Sketches of an embedding table's per-example gradients, and their inner products with centres.

Not measured on a GPU yet. The kernel is grad_quantities', whose head tells its story: positions meet ``right`` or the
centres in one tile, are multiplied by what their rows look up, and summed over an example. Neither [B, T, Q] nor
[B, T, P] is stored, grad is read once where one tile holds all columns, and nothing depends on the size of the table.
"""

from __future__ import annotations

import torch

from .grad_quantities import grad_quantities


def embedding_sketch(
    index: torch.Tensor, grad: torch.Tensor, padding: int, left: torch.Tensor, right: torch.Tensor | None,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """index [B, T] int64, grad [B, T, D] with feature stride 1, left [V, P]; fills out [B, P, Q] in float32."""
    grad_quantities(grad, index.contiguous(), False, sketch=out, left=left, right=right, padding=padding)


def embedding_dot(
    index: torch.Tensor, grad: torch.Tensor, padding: int, center_index: torch.Tensor, center_grad: torch.Tensor,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """index [B, T] int64, grad [B, T, D] with feature stride 1; fills out [B, K] in float32. padding: a row, or −1."""
    grad_quantities(
        grad, index.contiguous(), False, dot=out, center_grad=center_index, center_act=center_grad, padding=padding
    )
