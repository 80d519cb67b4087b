"""The Gram sum of bf16 factors in pairs. Without AVX-512 BF16 the same tiles take a half of every pair at a time."""

from __future__ import annotations

import pytest
import torch

import gradclust_fast as gf
from gradclust_fast import _native
from gradclust_fast.ops import _linear
from gradclust_fast.ops._checks import as_rows

pytestmark = pytest.mark.skipif(_native.cpu_unavailable() is not None, reason=str(_native.cpu_unavailable()))


def in_pairs(act, grad, bias=False, threads=2):
    out = torch.full((act.shape[0],), float("nan"))
    factors = _native.linear(as_rows(act), as_rows(grad), bias)
    _native._C.grad_sqnorm_cpu(factors, _linear.ROUTES.index("gram_of_pairs"), out.data_ptr(), threads)
    return out


def oracle(act, grad, bias=False):
    act, grad = act.double(), grad.double()
    return (grad.mT @ act).square().sum((1, 2)) + bias * grad.sum(1).square().sum(1)


SHAPES = [  # B, T, I, O: odd and even features, one and several panels, more pairs than a block of depth holds
    (2, 2, 1, 1),
    (3, 7, 33, 1),
    (2, 25, 64, 65),
    (5, 49, 3, 20),
    (2, 130, 31, 257),
    (1, 17, 1031, 2),
    (2, 5, 0, 3),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("B, T, I, O", SHAPES)
def test_matches_the_oracle(B, T, I, O, bias):
    act, grad = torch.randn(B, T, I).bfloat16(), torch.randn(B, T, O).bfloat16()
    torch.testing.assert_close(in_pairs(act, grad, bias).double(), oracle(act, grad, bias), rtol=4e-6, atol=0)


def test_rows_that_begin_anywhere():
    """Rows an odd number of elements apart: every second pair lies across four-byte words."""
    act, grad = torch.randn(4, 30, 77).bfloat16()[:, ::2, 1:60], torch.randn(4, 15, 45).bfloat16()[..., 3:40]
    torch.testing.assert_close(in_pairs(act, grad).double(), oracle(act, grad), rtol=4e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e20])
def test_examples_that_cancel_vanish_or_are_not_numbers_are_done_as_elsewhere(scale):
    act, grad = torch.randn(5, 40, 24), torch.randn(5, 40, 18)
    act[0] = 1 + 2e-2 * act[0]
    grad[0] -= grad[0].mean(0)
    grad[1] = 0
    act[2] *= scale
    grad[2] /= scale
    act[3, 7, 5] = float("nan")
    act, grad = act.bfloat16(), grad.bfloat16()
    got, want = in_pairs(act, grad).double(), oracle(act, grad)
    assert got[3].isnan()
    torch.testing.assert_close(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]], rtol=1e-4, atol=0)


def test_chosen_where_the_processor_multiplies_pairs(monkeypatch):
    act, grad = torch.randn(3, 32, 48).bfloat16(), torch.randn(3, 32, 40).bfloat16()
    monkeypatch.setattr(_native, "bf16_dots", lambda: True)
    with gf.backend("cpu"):
        assert "two at once" in gf.explain("grad_sqnorm", act, grad).route
        assert "two at once" not in gf.explain("grad_sqnorm", act.float(), grad.float()).route
        assert torch.equal(gf.ops.grad_sqnorm(act, grad), in_pairs(act, grad))
        assert torch.equal(gf.ops.grad_quantities(act, grad, sqnorm=True).sqnorm, in_pairs(act, grad))
    monkeypatch.setattr(_native, "bf16_dots", lambda: False)
    with gf.backend("cpu"):
        assert "two at once" not in gf.explain("grad_sqnorm", act, grad).route
