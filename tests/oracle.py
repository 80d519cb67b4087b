"""The float64 oracle: per-example gradients by a loop over single examples, as literally as possible."""

from __future__ import annotations

import torch


def linear_grads(act: torch.Tensor, grad: torch.Tensor, bias: bool = False) -> torch.Tensor:
    """G_b of act [B, *, I], grad [B, *, O]: [B, O, I], or [B, O, I + 1] with the bias gradient as the last column."""
    rows = []
    for a, d in zip(act.double().cpu(), grad.double().cpu()):
        T = a.shape[:-1].numel()
        a, d = a.reshape(T, act.shape[-1]), d.reshape(T, grad.shape[-1])
        G = d.new_zeros(d.shape[1], a.shape[1] + bias)  # [O, I (+ 1)]
        for t in range(a.shape[0]):
            G += torch.outer(d[t], torch.cat([a[t], a.new_ones(1)]) if bias else a[t])
        rows.append(G)
    if not rows:
        return torch.zeros(0, grad.shape[-1], act.shape[-1] + bias, dtype=torch.float64)
    return torch.stack(rows)


def conv_grads(act: torch.Tensor, grad: torch.Tensor, bias: bool = False, dtype=torch.float64, **geometry):
    """G_b of a convolution by autograd on one example at a time: [B, O, I (+ 1)], the weight's shape flattened."""
    act, grad = act.to("cpu", dtype), grad.to("cpu", dtype)
    conv = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d][act.dim() - 3]
    layer = conv(act.shape[1], grad.shape[1], bias=bias, dtype=dtype, **geometry)
    G = torch.zeros(act.shape[0], grad.shape[1], layer.weight[0].numel() + bias, dtype=dtype)
    for b in range(act.shape[0]):
        if grad[b].numel():  # torch refuses a kernel that does not fit, where G_b = 0
            weight, *rest = torch.autograd.grad(layer(act[b : b + 1]), list(layer.parameters()), grad[b : b + 1])
            G[b] = torch.cat([weight.flatten(1), *(r.unsqueeze(1) for r in rest)], 1)
    return G


def embedding_grads(index, grad, num_embeddings, padding_idx=None, dtype=torch.float64) -> torch.Tensor:
    """G_b of an embedding table [V, D] by autograd on one example at a time: [B, V, D]."""
    index, grad = index.cpu().long(), grad.to("cpu", dtype)
    G = torch.zeros(index.shape[0], num_embeddings, grad.shape[-1], dtype=dtype)
    for b in range(index.shape[0]):
        table = torch.zeros(num_embeddings, grad.shape[-1], dtype=dtype, requires_grad=True)
        if index[b].numel() and grad.shape[-1]:  # torch refuses to look up in a table without columns
            out = torch.nn.functional.embedding(index[b], table, padding_idx=padding_idx)
            (G[b],) = torch.autograd.grad(out, table, grad[b])
    return G
