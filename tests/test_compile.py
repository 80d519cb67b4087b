"""Every op inside torch.compile: one graph without breaks, sizes left open."""

from __future__ import annotations

import pytest
import torch

import gradclust_fast as gf

CONV = {"kernel_size": 3, "padding": 1, "bias": True}


def linear(B):
    return torch.randn(B, 5, 4), torch.randn(B, 5, 3)


def images(B):
    return torch.randn(B, 2, 6, 6), torch.randn(B, 3, 6, 6)


def looked_up(B):
    return torch.randint(9, (B, 5)), torch.randn(B, 5, 4)


TABLE = {"num_embeddings": 9, "padding_idx": -2}

CASES = {  # op: (options, arguments for a batch of B)
    "grad_sqnorm": ({"bias": True}, linear),
    "grad_sketch": ({}, lambda B: (*linear(B), torch.randn(3, 2), torch.randn(4, 2))),
    "grad_dot": ({}, lambda B: (*linear(B), torch.randn(B + 1, 3), torch.randn(B + 1, 4))),
    "grad_gram": ({"bias": True}, linear),
    "grad_moments": ({"bias": True}, linear),
    "grad_quantities": ({"sqnorm": True}, linear),
    "grad_weight_sqnorm": ({"bias": True}, linear),
    "conv_sqnorm": (CONV, images),
    "conv_sketch": (CONV, lambda B: (*images(B), torch.randn(3, 2), torch.randn(19, 2))),
    "conv_dot": (CONV, lambda B: (*images(B), torch.randn(B, 3), torch.randn(B, 19))),
    "conv_gram": (CONV, images),
    "conv_moments": (CONV, images),
    "conv_weight_sqnorm": (CONV, images),
    "embedding_sqnorm": (TABLE, looked_up),
    "embedding_sketch": (TABLE, lambda B: (*looked_up(B), torch.randn(9, 2), torch.randn(4, 2))),
    "embedding_dot": (TABLE, lambda B: (*looked_up(B), torch.randn(B, 9), torch.randn(B, 4))),
    "embedding_gram": (TABLE, looked_up),
    "embedding_moments": (TABLE, looked_up),
    "norm_grads": ({"eps": 1e-6}, lambda B: (torch.randn(B, 5, 4), torch.randn(B, 5, 4))),
    "assign": ({}, lambda B: (torch.randn(B, 6), torch.rand(6), torch.rand(B))),
    "assign_points": ({}, lambda B: (torch.randn(B, 6), torch.randn(B + 3, 6))),
    "cluster_sums": ({"num_clusters": 4}, lambda B: (torch.randn(B, 6), torch.randint(0, 4, (B,)))),
    "exact_moves": ({"num_clusters": 4}, lambda B: (torch.randn(B, 6), torch.randint(0, 4, (B,)))),
    "sign_product": ({"key": (1, 2), "scale": 0.5}, lambda B: (torch.randn(B, 6), 5)),
}


def tensors(out):
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]


def test_every_op_has_a_case():
    assert sorted(CASES) == sorted(gf.ops.__all__)


@pytest.mark.parametrize("op", CASES)
def test_compiles_into_one_graph_whatever_the_batch_size(op):
    options, arguments = CASES[op]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *args: getattr(gf.ops, op)(*args, **options), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for B in (7, 11):
        args = arguments(B)
        for got, expected in zip(tensors(compiled(*args)), tensors(getattr(gf.ops, op)(*args, **options)), strict=True):
            assert torch.equal(got, expected)
