"""The noise scale that a record estimates, and what it needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recorded import (
    Tied,
    batch,
    cross_entropy,
    mlp,
    one_at_a_time,
)
from torch import nn

import gradclust_fast as gf

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*torch.jit.script_method"
)


def expected_noise_scale(parts):
    """McCandlish et al. from rows: parts are [B, P] per-example gradients of each backward."""
    traces, sqnorms = [], []
    for rows in parts:
        B, mean, batch = len(rows), rows.square().sum(1).mean(), rows.mean(0).square().sum()
        traces.append(B * (mean - batch) / (B - 1))
        sqnorms.append((B * batch - mean) / (B - 1))
    return sum(traces) / len(traces), sum(sqnorms) / len(sqnorms)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("grads_before", [False, True])
@pytest.mark.parametrize("backwards", [1, 3])
def test_noise_scale_from_one_or_several_batches(reduction, grads_before, backwards):
    model = Tied()
    x, y = batch(B=12)
    if grads_before:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    with gf.record(model, loss_reduction=reduction, loss_scale=4.0) as rec:
        for part in torch.arange(12).chunk(backwards):
            (4 * F.cross_entropy(model(x[part]), y[part], reduction=reduction)).backward()
    oracle = one_at_a_time(model, cross_entropy(x, y))
    rows = torch.cat([g.flatten(1) for g in oracle.values()], 1)
    trace, sqnorm = expected_noise_scale(rows.chunk(backwards))
    noise = rec.noise_scale()
    assert noise.trace == pytest.approx(trace.item(), rel=1e-5)
    assert noise.gradient_sqnorm == pytest.approx(sqnorm.item(), rel=1e-4)
    assert float(noise) == pytest.approx((trace / sqnorm).item(), rel=1e-4)


@pytest.mark.parametrize("spoil", ["clear", "zero", "clip", "replace"])
def test_noise_scale_after_the_gradient_was_changed_says_what_to_do(spoil):
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    if spoil in ("clear", "zero"):
        model.zero_grad(set_to_none=spoil == "clear")
    elif spoil == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    else:
        model[0].weight.grad = model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"call rec.noise_scale\(\) before zero_grad"):
        rec.noise_scale()
    assert rec.sq_norms.shape == (5,)


def test_noise_scale_is_remembered_and_needs_two_examples():
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    first = rec.noise_scale()
    model.zero_grad()
    assert rec.noise_scale() == first
    with gf.record(model) as rec:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    with pytest.raises(RuntimeError, match="at least 2 examples"):
        rec.noise_scale()
