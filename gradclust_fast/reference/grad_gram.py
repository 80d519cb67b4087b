"""All pairwise inner products of per-example gradients of a linear layer."""

from __future__ import annotations

import torch

from .common import sums, upcast

CHUNK = 1 << 24
"""Elements of all examples' G held at a time."""


def grad_gram(act: torch.Tensor, grad: torch.Tensor, bias: bool) -> torch.Tensor:
    """⟨G_b, G_c⟩ = Σ_{s,t} (act[b, s]·act[c, t]) (grad[b, s]·grad[c, t]), centred within each example.

    Replacing both factors by their deviations from the example's means, and adding one position (mean of act,
    Σ_t grad[b, t]), leaves G_b as it is and takes the cancellation of near-constant factors out of the sum.
    """
    act, grad = upcast(act), upcast(grad)  # [B, T, I], [B, T, O]
    B, T = act.shape[:2]
    if T == 0:
        return act.new_zeros(B, B)
    if bias:
        act = torch.cat([act, act.new_ones(B, T, 1)], 2)
    if T == 1:
        return (act[:, 0] @ act[:, 0].mT) * (grad[:, 0] @ grad[:, 0].mT)
    I, O = act.shape[2], grad.shape[2]
    _, mean = sums(act)
    total, grad_mean = sums(grad)
    act = torch.cat([act - mean, mean], 1)  # [B, T + 1, I]
    grad = torch.cat([grad - grad_mean, total], 1)
    if B * T * T * (I + O) > (T + B) * I * O:  # FLOPs of the two ways
        gram = act.new_zeros(B, B)
        for part in grad.split(max(1, CHUNK // max(1, B * I)), 2):  # rows of G, of all examples
            G = (part.mT @ act).flatten(1)
            gram += G @ G.mT
        return gram
    rows = []
    for a, d in zip(act, grad):  # one example against all: [T + 1, B, T + 1] at a time
        rows.append(((act @ a.mT) * (grad @ d.mT)).sum((1, 2)))  # [B]
    gram = torch.stack(rows) if rows else act.new_zeros(0, 0)
    return gram.triu() + gram.triu(1).mT
