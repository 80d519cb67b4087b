"""Arguments of the wrong kind: one sentence with the argument, what was expected, what came and the remedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradclust_fast as gf

ops = gf.ops
A, G = torch.ones(4, 3), torch.ones(4, 2)
IMAGE, OUT = torch.ones(2, 3, 5, 5), torch.ones(2, 4, 3, 3)
WIDE = torch.ones(2, 4, 13, 13)
POINTS, LABELS = torch.ones(4, 3), torch.tensor([0, 1, 2, 1])
INDEX = torch.tensor([[0, 1]])
REFLECT, CIRCULAR = ({"padding": 5, "padding_mode": "reflect"}, {"padding": 6, "padding_mode": "circular"})

WRONG = [
    pytest.param(lambda: ops.grad_sqnorm([[1.0]], G), "act must be a torch.Tensor, got list", id="list"),
    pytest.param(lambda: ops.grad_sqnorm(A, G.numpy()), "grad must be a torch.Tensor, got ndarray", id="numpy"),
    pytest.param(lambda: ops.grad_sqnorm(A, G, "yes"), "bias must be True or False, got str", id="bias"),
    pytest.param(lambda: ops.grad_sketch(A, G, [1]), "left must be a torch.Tensor or None, got list", id="optional"),
    pytest.param(lambda: ops.grad_sqnorm(A.to_sparse(), G), r"act must be a dense.*act.to_dense\(\)", id="sparse"),
    pytest.param(lambda: ops.cluster_sums(POINTS, LABELS, 3.0), "num_clusters must be an integer, got f", id="float"),
    pytest.param(
        lambda: ops.exact_moves(POINTS, LABELS, 3, 2**63), f"seed must fit into 64 bits, got {2**63}", id="64"
    ),
    pytest.param(
        lambda: ops.embedding_sqnorm(INDEX, torch.ones(1, 2, 3), num_embeddings=5, padding_idx=1.5),
        "padding_idx must be an integer or None, got float",
        id="optional-integer",
    ),
    pytest.param(lambda: ops.norm_grads(A, A, eps="a"), "eps must be a number, got str", id="number"),
    pytest.param(lambda: ops.sign_product(POINTS, 2**64, (1, 2)), f"dim must fit into 64 bits, got {2**64}", id="dim"),
    pytest.param(lambda: ops.sign_product(POINTS, 4, "ab"), "key must be two integers, got 'ab'", id="key"),
    pytest.param(lambda: ops.conv_sqnorm([1], OUT, kernel_size=3), "act must be a torch.Tensor, got list", id="conv"),
    pytest.param(
        lambda: ops.conv_sqnorm(IMAGE, OUT, kernel_size=3.0), "kernel_size must be an integer, got 3.0", id="kernel"
    ),
    pytest.param(
        lambda: ops.conv_gram(IMAGE, WIDE, kernel_size=3, **REFLECT),
        r"padding must be at most 4 with padding_mode='reflect' for act \[2, 3, 5, 5\], got 5",
        id="reflected-beyond-the-image",
    ),
    pytest.param(
        lambda: ops.conv_gram(IMAGE, WIDE, kernel_size=3, **CIRCULAR),
        r"padding must be at most 5 with padding_mode='circular' for act \[2, 3, 5, 5\], got 6",
        id="wrapped-twice",
    ),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_arguments_of_the_wrong_kind_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_whole_numbers_of_numpy_and_sequences_of_one_count():
    assert ops.cluster_sums(POINTS, LABELS, np.int64(3))[1].tolist() == [1, 2, 1]
    assert torch.equal(ops.sign_product(POINTS, 4, [np.uint32(1), np.int64(2)]), ops.sign_product(POINTS, 4, (1, 2)))
    same = ops.conv_sqnorm(IMAGE, OUT, kernel_size=[np.int64(3)], stride=torch.Size([1, 1]), padding=(0,))
    assert torch.equal(same, ops.conv_sqnorm(IMAGE, OUT, kernel_size=3))


def test_the_widest_paddings_that_torch_pads_are_taken():
    for pad, mode in ((4, "reflect"), (5, "circular"), (9, "replicate")):
        grad = torch.ones(2, 4, 3 + 2 * pad, 3 + 2 * pad)
        assert ops.conv_sqnorm(IMAGE, grad, kernel_size=3, padding=pad, padding_mode=mode).isfinite().all()
