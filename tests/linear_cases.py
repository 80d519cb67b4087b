"""Shapes and properties that every op of linear layers is tested on."""

from __future__ import annotations

import pytest
import torch

GRID = [  # B, positions, I, O, why
    pytest.param(0, (), 3, 2, id="empty-batch"),
    pytest.param(1, (), 1, 1, id="all-ones"),
    pytest.param(5, (), 37, 19, id="vector-ragged"),
    pytest.param(3, (1,), 129, 65, id="one-position"),
    pytest.param(3, (0,), 4, 5, id="no-positions"),
    pytest.param(4, (7,), 33, 17, id="sequence-shorter-than-features"),
    pytest.param(2, (67,), 5, 9, id="sequence-longer-than-features"),
    pytest.param(2, (3, 5), 16, 32, id="two-position-dims"),
    pytest.param(2, (70,), 130, 66, id="several-tiles"),
    pytest.param(19, (2,), 1, 23, id="one-in-feature"),
    pytest.param(19, (3,), 23, 1, id="one-out-feature"),
    pytest.param(2, (33,), 300, 4, id="several-depth-blocks"),
    pytest.param(3, (2,), 0, 5, id="no-in-features"),
    pytest.param(3, (), 5, 0, id="no-out-features"),
]


def factors(B, positions, I, O, dtype):
    return torch.randn(B, *positions, I).to(dtype), torch.randn(B, *positions, O).to(dtype)


def strided_factors():
    """act [3, 4, 3] with a feature stride, grad [3, 4, 7] with its batch inside."""
    return torch.randn(6, 4, 10)[::2, :, 1::3], torch.randn(4, 3, 7).transpose(0, 1)


def near_constant_factors(dtype):
    """Activations that hardly vary under gradients that sum to zero: the plain Gram sum cancels."""
    act, grad = 3 + 1e-2 * torch.randn(2, 64, 48), torch.randn(2, 64, 40)
    return act.to(dtype), (grad - grad.mean(1, keepdim=True)).to(dtype)


def eager_grads(act, grad, bias=False):
    """G_b as eager torch makes it in the accumulator's dtype: what a kernel's error is compared with."""
    act, grad = (
        act.flatten(1, -2) if act.dim() > 2 else act[:, None],
        grad.flatten(1, -2) if act.dim() > 2 else grad[:, None],
    )
    dtype = torch.float64 if act.dtype == torch.float64 else torch.float32
    act, grad = act.to(dtype), grad.to(dtype)
    if bias:
        act = torch.cat([act, act.new_ones(*act.shape[:-1], 1)], 2)
    return grad.mT @ act  # [B, O, I (+ 1)]


WRONG_FACTORS = [  # act, grad, error, message
    (torch.ones(31, 128), torch.ones(32, 8), ValueError, r"act must be \[B, \*, I\] with \[B, \*\] = \[32\]"),
    (torch.ones(3), torch.ones(3), ValueError, "add the batch dimension"),
    (torch.ones(3, 2), torch.ones(3, 2, dtype=torch.float64), TypeError, "grad must be torch.float32 like act"),
    (torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2), TypeError, "act must be float32"),
]
