"""What only the Triton kernel of assign_points does: many features, parts of them, products of less precision."""

from __future__ import annotations

import pytest
import torch

import gradclust_fast as gf
from gradclust_fast.triton_kernels import _support

pytestmark = pytest.mark.skipif(
    _support.unavailable(torch.device("cpu")) is not None, reason="needs Triton and its interpreter"
)

SHAPES = [  # B, K, R, why
    pytest.param(40, 20, 600, id="parts-of-the-features"),
    pytest.param(130, 20, 530, id="one-tile-of-centres"),
    pytest.param(130, 40, 530, id="several-tiles-of-centres"),
    pytest.param(40, 40, 140, id="every-row-measured-again"),
]


def check(points, centers, counts=None, rtol=1e-5):
    oracle = (points.double()[:, None] - centers.double()).square().sum(2)
    if counts is not None:
        oracle = oracle * (counts.double() + 1)
    with gf.backend("triton"):
        label, cost = gf.ops.assign_points(points, centers, counts)
        again = gf.ops.assign_points(points, centers, counts)
    assert torch.equal(label, oracle.argmin(1))
    torch.testing.assert_close(cost.double(), oracle.amin(1), rtol=rtol, atol=0)
    assert torch.equal(label, again[0]) and torch.equal(cost, again[1])


@pytest.mark.parametrize("types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)])
@pytest.mark.parametrize("B, K, R", SHAPES)
def test_labels_are_those_of_float64_differences(B, K, R, types):
    points, centers = torch.randn(B, R).to(types[0]), torch.randn(K, R).to(types[1])
    check(points, centers, torch.randint(0, 20, (K,)) if B == 40 else None)


@pytest.mark.parametrize("B, K, R", SHAPES[:3])
def test_a_large_common_mean_costs_no_digits(B, K, R):
    check(1000 + torch.randn(B, R), 1000 + torch.randn(K, R))


@pytest.mark.parametrize("B, K, R", SHAPES[:3])
def test_rows_beside_their_centres_keep_their_digits_and_equal_centres_tie(B, K, R):
    centers = torch.randn(K // 2, R).repeat(2, 1)
    near = torch.arange(B) % len(centers)
    points = centers[near] + torch.randn(B, R) / 1000
    points[:5] = centers[near[:5]]
    check(points, centers)


def test_a_low_precision_setting_changes_no_label():
    setting = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        check(torch.randn(70, 520), torch.randn(30, 520))
    finally:
        torch.set_float32_matmul_precision(setting)


def test_three_and_more_centres_within_rounding_are_all_measured():
    centers = torch.randn(1, 520) + torch.randn(40, 520) / 3e6
    check(torch.randn(50, 520), centers)
