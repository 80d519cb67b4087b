"""Exact gradient statistics against one example at a time."""

from __future__ import annotations

import pytest
import torch
from measured import MODELS, data_for, gradients, loss_fn, mlp, squared
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradclust_fast as gf


def flat(by_name):
    return torch.cat([value.flatten() for value in by_name.values()])


@pytest.mark.parametrize("make", MODELS)
def test_stats_match_one_example_at_a_time(make):
    model = make()
    data = data_for(model)
    G = gradients(model, data)
    stats = gf.gradient_stats(model, data, loss_fn, batch_size=7)
    mean = G.mean(0)
    var = (G - mean).square().mean(0)
    assert stats.num_examples == 23 and stats.num_coordinates == G.shape[1]
    torch.testing.assert_close(flat(stats.mean), mean)
    torch.testing.assert_close(flat(stats.coordinate_variance), var)
    assert stats.variance == pytest.approx(float(var.sum()), rel=1e-10)
    assert stats.variance_per_coordinate == pytest.approx(float(var.mean()), rel=1e-10)
    assert stats.gradient_sqnorm == pytest.approx(float(mean.square().sum()), rel=1e-10)
    assert stats.sum_sq_norms == pytest.approx(float(G.square().sum()), rel=1e-10)
    assert stats.noise_scale == pytest.approx(stats.variance / stats.gradient_sqnorm)
    for B, replacement, f in [(1, True, 1), (4, True, 1 / 4), (4, False, 1 / 4 * 19 / 22)]:
        second = f * var + mean.square()
        there = second > 0
        expected = float((f * var[there] / second[there]).mean())
        assert stats.normalized_variance(B, replacement=replacement) == pytest.approx(expected, rel=1e-9)
        aggregate = f * stats.variance / (f * stats.variance + stats.gradient_sqnorm)
        assert stats.normalized_variance(B, replacement=replacement, aggregate=True) == pytest.approx(aggregate)
    assert stats.zero_coordinates == int((G == 0).all(0).sum())
    assert list(stats.by_parameter) == [name for name, _ in model.named_parameters()]
    assert sum(p.variance for p in stats.by_parameter.values()) == pytest.approx(stats.variance)
    assert "total" in str(stats)


def test_stats_do_not_depend_on_batches_or_workers():
    model = mlp()
    data = data_for(model)
    one = gf.gradient_stats(model, data, loss_fn, batch_size=23)
    for options in ({"batch_size": 1}, {"batch_size": 5, "num_workers": 2}):
        other = gf.gradient_stats(model, data, loss_fn, **options)
        assert other.variance == pytest.approx(one.variance, rel=1e-12)
    loader = DataLoader(gf.with_indices(data), batch_size=6, shuffle=True)
    assert gf.gradient_stats(model, loader, loss_fn).variance == pytest.approx(one.variance, rel=1e-12)


def test_coordinates_without_gradient_are_left_out_and_counted():
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(10, 3, dtype=torch.float64)
    x[:, 1] = 0
    data = TensorDataset(x, torch.randn(10, dtype=torch.float64))
    stats = gf.gradient_stats(model, data, squared)
    assert stats.zero_coordinates == 1
    G = gradients(model, data, squared)[:, [0, 2]]
    var = (G - G.mean(0)).square().mean(0)
    assert stats.normalized_variance() == pytest.approx(float((var / (var + G.mean(0).square())).mean()))
    report = gf.compare_estimators(model, data, squared, [gf.Uniform(2)])
    assert report[0].left_out == 1 and report[0].normalized_variance == pytest.approx(stats.normalized_variance(2))


def test_float32_models_keep_small_variances():
    # gradients that differ by 1e-3 of their size: float32 sums of squares would leave one digit
    model = nn.Linear(4, 1, bias=False)
    x = (1 + 1e-3 * torch.randn(64, 4)).float()
    data = TensorDataset(x, model(x).detach().squeeze(1) + 1)
    G = gradients(model, data, squared)
    expected = (G - G.mean(0)).square().mean(0).sum()
    assert gf.gradient_stats(model, data, squared).variance == pytest.approx(float(expected), rel=1e-5)


def test_parameters_filter_and_forward():
    model = mlp()
    data = data_for(model)
    weights = gf.gradient_stats(model, data, loss_fn, parameters="*.weight")
    assert list(weights.by_parameter) == ["0.weight", "2.weight"]
    records = [{"x": x, "y": y} for x, y in data]
    by_dict = gf.gradient_stats(
        model, records, forward=lambda m, batch: loss_fn(m(batch["x"]), batch["y"]), parameters="*.weight"
    )
    assert by_dict.variance == pytest.approx(weights.variance)


def test_a_parameter_that_the_loss_does_not_reach_counts_as_zero():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    model = Part().double()
    data = TensorDataset(torch.randn(8, 5, dtype=torch.float64), torch.randint(0, 3, (8,)))
    stats = gf.gradient_stats(model, data, loss_fn)
    assert stats.by_parameter["unused.weight"].variance == 0
    assert stats.zero_coordinates == 18
