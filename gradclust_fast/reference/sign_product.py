"""Random signs from a counter-based generator, and products with a matrix of them that is never whole in memory."""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Random123's constants of Philox4x32
_WEYL = (0x9E3779B9, 0xBB67AE85)
CHUNK = 1 << 20
"""Bits that are made at a time; a row is not cut."""


def philox4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al. 2011) of counters [4, *] in int64 tensors that hold 32-bit words.

    int64 is the widest integer every device has, so the 64-bit products are put together from 16-bit halves.
    """
    even, odd = counter[0::2], counter[1::2]  # [2, *]: words 0 and 2, words 1 and 3
    words = [_MULTIPLIERS, *([(word + turn * step) & _WORD for word, step in zip(key, _WEYL)] for turn in range(10))]
    factor, *round_keys = torch.tensor(words, device=counter.device).view(11, 2, *[1] * (counter.dim() - 1))
    for round_key in round_keys:
        low = (even & 0xFFFF) * factor  # < 2^48
        high = (even >> 16) * factor + (low >> 16)  # < 2^49
        even, odd = (
            (high >> 16).flip(0) ^ odd ^ round_key,
            (((high & 0xFFFF) << 16) | (low & 0xFFFF)).flip(0),
        )
    return torch.stack([even, odd], 1).flatten(0, 1)


def sign_matrix(
    rows: int, cols: int, key: tuple[int, int], dtype: torch.dtype, device: torch.device, first_row: int = 0
) -> torch.Tensor:
    """[rows, cols] of ±1: entry (r, c) is bit c % 32 of word c % 128 // 32 of Philox at counter (c // 128, r, 0, 0).

    The definition, in torch's operations; kernels take the same bits. ``first_row`` is the r of the first row made.
    """
    blocks = -(-cols // 128)
    block = torch.arange(blocks, device=device)
    counter = torch.zeros(4, rows, blocks, dtype=torch.int64, device=device)
    counter[0], counter[1] = block, torch.arange(first_row, first_row + rows, device=device).unsqueeze(1)
    words = philox4x32(counter, key).permute(1, 2, 0).flatten(1)[:, : -(-cols // 32)]  # [rows, ⌈cols/32⌉]
    bits = (words.unsqueeze(2) >> torch.arange(32, device=device)) & 1  # [rows, ⌈cols/32⌉, 32]
    return (1 - 2 * bits.flatten(1)[:, :cols]).to(dtype)


def sign_product(vectors: torch.Tensor, dim: int, key0: int, key1: int, scale: float, transposed: bool) -> torch.Tensor:
    """vectors (scale·S)ᵀ with S = :func:`sign_matrix` [dim, D], or vectors (scale·S) with S [D, dim]; in parts."""
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    B, D = vectors.shape
    if transposed:
        out = vectors.new_zeros(B, dim)
        step = max(1, CHUNK // max(128, dim))
        for row in range(0, D, step):
            signs = sign_matrix(min(step, D - row), dim, (key0, key1), vectors.dtype, vectors.device, row)
            out += vectors[:, row : row + step] @ (signs * scale)
        return out
    out = vectors.new_empty(B, dim)  # [B, R]
    step = max(1, CHUNK // max(128, D))
    for row in range(0, dim, step):
        signs = sign_matrix(min(step, dim - row), D, (key0, key1), vectors.dtype, vectors.device, row)
        out[:, row : row + step] = vectors @ (signs * scale).mT
    return out
