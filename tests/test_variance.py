"""Exact variances of gradient estimators against brute force, and Monte Carlo against them."""

from __future__ import annotations

import copy
import csv

import numpy as np
import pytest
import torch
from measured import MODELS, cnn, data_for, gradients, loss_fn, mlp, random_strata, squared
from torch import nn
from torch.utils.data import TensorDataset

import gradclust_fast as gf


@pytest.mark.parametrize("make", MODELS)
def test_estimators_match_brute_force(make):
    model = make()
    data = data_for(model)
    G = gradients(model, data)
    N, P = G.shape
    points = gf.Strata.from_points(G, torch.arange(N) % 4, 5)
    other = gf.Strata.from_points(G, torch.randint(0, 3, (N,)), 3)
    estimators = [
        gf.Uniform(4),
        gf.Uniform(8),
        gf.Uniform(4, replacement=False),
        gf.Stratified(points),
        gf.Stratified(points, 9, "neyman"),
        gf.Stratified(other, 7, "proportional", replacement=True),
        gf.Stratified(points, 2),
    ]
    report = gf.compare_estimators(model, data, loss_fn, estimators, batch_size=6)
    mean = G.mean(0)
    sigma = (G - mean).square().mean(0)
    assert report[0].variance == pytest.approx(float(sigma.sum()) / 4, rel=1e-10)
    assert report[1].ratio == pytest.approx(0.5)
    assert report[2].variance == pytest.approx(float(sigma.sum()) / 4 * (N - 4) / (N - 1), rel=1e-10)
    assert report[3].variance == pytest.approx(points.distortion / N**2, rel=1e-10)
    for row, estimator in zip(report, estimators):
        if isinstance(estimator, gf.Stratified):
            assert row.variance == pytest.approx(sum(estimator.plan.variance_terms()), rel=1e-9)
        assert row.variance_per_coordinate == pytest.approx(row.variance / P)
        assert row.aggregate_normalized_variance == pytest.approx(row.variance / (row.variance + float(mean @ mean)))
    assert report[6].between_strata == pytest.approx(estimators[6].plan.variance_terms()[1], rel=1e-8)
    assert report[6].between_strata > 0
    # normalized variance per coordinate
    V = torch.zeros(P, dtype=torch.float64)
    for k in range(4):
        own = G[points.labels == k]
        V += (len(own) / N) ** 2 * (own - own.mean(0)).square().mean(0)
    second = V + mean.square()
    there = second > 0
    assert report[3].normalized_variance == pytest.approx(float((V[there] / second[there]).mean()), rel=1e-8)
    assert report[3].left_out == int((~there).sum())


def test_between_strata_variance_is_per_coordinate():
    model = mlp()
    data = data_for(model)
    G = gradients(model, data)
    labels = torch.arange(23) % 6
    (row,) = gf.compare_estimators(model, data, loss_fn, [gf.Stratified(gf.Strata(labels, 6), 3)])
    normalized = []
    for g in G.T:  # one coordinate at a time, as if it were the whole gradient
        V = sum(gf.Stratified(gf.Strata.from_points(g.unsqueeze(1), labels, 6), 3).plan.variance_terms())
        normalized.append(V / (V + float(g.mean()) ** 2))
    assert row.normalized_variance == pytest.approx(sum(normalized) / len(normalized), rel=1e-8)


def test_one_stratum_is_uniform_and_singletons_have_no_variance():
    model = mlp()
    data = data_for(model)
    one, all_apart = gf.Strata(torch.zeros(23, dtype=torch.int64), 1), gf.Strata(torch.arange(23), 23)
    report = gf.compare_estimators(
        model, data, loss_fn, [gf.Uniform(1), gf.Stratified(one), gf.Stratified(one, 5), gf.Stratified(all_apart)]
    )
    assert report[1].variance == pytest.approx(report[0].variance, rel=1e-12)
    assert report[2].variance == pytest.approx(report[0].variance / 5 * 18 / 22, rel=1e-12)
    assert abs(report[3].variance) <= 1e-14 * report[0].variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strata_of_duplicates_have_no_variance(dtype):
    model = mlp(dtype)
    x, y = data_for(model, N=4, dtype=dtype).tensors
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 1, 1, 0, 3, 3, 3])
    data = TensorDataset(x[labels], y[labels])
    report = gf.compare_estimators(model, data, loss_fn, [gf.Uniform(4), gf.Stratified(gf.Strata(labels, 4))])
    assert abs(report[1].variance) <= 1e-12 * report.stats.variance


class RightOf(nn.Module):
    """``x @ W``: the factors of W are those of a linear layer, turned."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5, bias=False), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.inner.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_with_a_weight_are_cut_by_stratum_and_measured_in_float64(dtype):
    torch.manual_seed(4)
    model = RightOf().to(dtype)
    x = torch.randn(12, 5, dtype=dtype)
    data = TensorDataset(x, torch.randint(0, 3, (12,)))
    labels = torch.arange(12) % 3
    report = gf.compare_estimators(model, data, loss_fn, [gf.Stratified(gf.Strata(labels, 3))])
    G = gradients(model, data)
    scatter = sum(float((G[labels == k] - G[labels == k].mean(0)).square().sum()) for k in range(3))
    rel = 1e-12 if dtype == torch.float64 else 1e-5
    assert report[0].variance == pytest.approx(4 * scatter / 12**2, rel=rel)  # J/N² with N_k = 4


def test_svrg_is_zero_at_its_snapshot_and_matches_brute_force_away_from_it():
    for make in (mlp, cnn):
        model = make()
        data = data_for(model)
        snapshot = copy.deepcopy(model)
        report = gf.compare_estimators(model, data, loss_fn, [gf.Uniform(4), gf.SVRG(4, snapshot)], batch_size=6)
        assert abs(report[1].variance) <= 1e-25
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        D = gradients(model, data) - gradients(snapshot, data)
        sigma = (D - D.mean(0)).square().mean(0)
        strata = gf.Strata(torch.arange(23) % 3, 3)
        for estimators in (
            [gf.SVRG(4, snapshot), gf.SVRG(4, snapshot.state_dict(), replacement=False)],
            [gf.SVRG(4, snapshot), gf.SVRG(4, snapshot.state_dict(), replacement=False), gf.Stratified(strata)],
        ):
            report = gf.compare_estimators(model, data, loss_fn, estimators, batch_size=6)
            assert report[0].variance == pytest.approx(float(sigma.sum()) / 4, rel=1e-9)
            assert report[1].variance == pytest.approx(float(sigma.sum()) / 4 * 19 / 22, rel=1e-9)
            mean = gradients(model, data).mean(0)
            second = sigma / 4 + mean.square()
            there = second > 0
            expected = float((sigma[there] / 4 / second[there]).mean())
            assert report[0].normalized_variance == pytest.approx(expected, rel=1e-8)
            assert report[0].gradients_per_step == 8
        pair = gf.compare_estimators(model, data, loss_fn, [gf.SVRG(4, snapshot), gf.SVRG(8, snapshot)])
        assert pair[1].ratio == pytest.approx(0.5)


@pytest.mark.parametrize("make", [*MODELS, pytest.param(lambda: cnn_of_groups(), id="groups")])
def test_svrg_on_strata_matches_brute_force(make):
    model = make()
    data = data_for(model)
    snapshots = [copy.deepcopy(model), copy.deepcopy(model)]
    for seed, moved in enumerate([model, snapshots[1]]):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in moved.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    D = [gradients(model, data) - gradients(snapshot, data) for snapshot in snapshots]
    labels = [torch.arange(23) % 4, torch.arange(23) // 5]
    one, other = gf.Strata.from_points(D[0], labels[0], 5), gf.Strata(labels[1], 5)
    estimators = [
        gf.Uniform(4),
        gf.Stratified(one, snapshot=snapshots[0]),
        gf.Stratified(other, 9, "proportional", snapshot=snapshots[0].state_dict()),
        gf.Stratified(one, 9, "neyman", replacement=True, snapshot=snapshots[1]),
        gf.Stratified(one, 2, snapshot=snapshots[0]),  # batches that skip strata
        gf.Stratified(one),
        gf.SVRG(4, snapshots[0]),
    ]
    report = gf.compare_estimators(model, data, loss_fn, estimators, batch_size=6)
    for position, snapshot in zip((1, 2, 3), (0, 0, 1)):
        row, estimator = report[position], estimators[position]
        assert row.variance == pytest.approx(_within(estimator, D[snapshot]), rel=1e-9)
        assert row.gradients_per_step == 2 * estimator.batch_size
    skipping = gf.Stratified(one, 2)  # whose strata carry the differences' variances and means
    assert report[4].variance == pytest.approx(sum(skipping.plan.variance_terms()), rel=1e-8)
    assert report[4].between_strata > 0
    # the others are what they are without it
    plain = gf.compare_estimators(model, data, loss_fn, [estimators[0], *estimators[5:]], batch_size=6)
    for position, row in zip((0, 5, 6), plain):
        assert report[position].variance == pytest.approx(row.variance, rel=1e-12)
    # normalized by the gradient of the model itself
    mean = gradients(model, data).mean(0)
    V = torch.zeros_like(mean)
    for k in range(4):
        part = D[0][labels[0] == k]
        V += (len(part) / 23) ** 2 * (part - part.mean(0)).square().mean(0)
    there = V + mean.square() > 0
    expected = float((V[there] / (V + mean.square())[there]).mean())
    assert report[1].normalized_variance == pytest.approx(expected, rel=1e-8)


def _within(estimator, rows):
    labels, total = estimator.strata.labels, 0.0
    for k, factor in enumerate(estimator.plan.within_factor):
        own = rows[labels == k]
        total += float(factor) * float((own - own.mean(0)).square().sum(1).mean()) if len(own) else 0.0
    return total


def cnn_of_groups():
    torch.manual_seed(2)
    first = nn.Conv2d(2, 4, 3, groups=2)
    return nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)).double()


def test_svrg_on_strata_has_no_variance_at_its_snapshot():
    model = mlp()
    strata = gf.Strata(torch.arange(23) % 4, 4)
    estimators = [gf.Uniform(4), gf.Stratified(strata, snapshot=copy.deepcopy(model))]
    report = gf.compare_estimators(model, data_for(model), loss_fn, estimators)
    assert abs(report[1].variance) <= 1e-25 and "SVRG" in report[1].name
    with pytest.raises(ValueError, match="shares 4 parameters"):
        gf.compare_estimators(model, data_for(model), loss_fn, [gf.Stratified(strata, snapshot=model)])
    with pytest.raises(TypeError, match="snapshot must be"):
        gf.Stratified(strata, snapshot=3)


def test_every_parameter_has_its_share_of_every_estimator():
    model = mlp()
    data = data_for(model)
    snapshot = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    G, labels = gradients(model, data), torch.arange(23) % 4
    strata = gf.Strata(labels, 4)
    estimators = [gf.Uniform(4), gf.Stratified(strata), gf.SVRG(4, snapshot), gf.Stratified(strata, snapshot=snapshot)]
    report = gf.compare_estimators(model, data, loss_fn, estimators, batch_size=6)
    start = 0
    for name, p in model.named_parameters():
        own = G[:, start : start + p.numel()]
        start += p.numel()
        sigma = (own - own.mean(0)).square().mean(0) / 4
        parts = [row.by_parameter[name] for row in report]
        assert parts[0].variance == pytest.approx(float(sigma.sum()), rel=1e-9)
        assert parts[0].variance_per_coordinate == pytest.approx(float(sigma.mean()), rel=1e-9)
        second = sigma + own.mean(0).square()
        there = second > 0
        assert parts[0].normalized_variance == pytest.approx(float((sigma[there] / second[there]).mean()), rel=1e-8)
        assert parts[0].left_out == int((~there).sum()) and parts[0].num_coordinates == p.numel()
        within = gf.Strata.from_points(own, labels, 4).distortion / 23**2
        assert parts[1].variance == pytest.approx(within, rel=1e-9)
        assert parts[1].ratio == pytest.approx(parts[1].variance / parts[0].variance)
        assert name in report.breakdown()
    for row in report:
        assert sum(part.variance for part in row.by_parameter.values()) == pytest.approx(row.variance, rel=1e-12)


def test_breakdown_as_csv(tmp_path):
    model = mlp()
    report = gf.compare_estimators(model, data_for(model), loss_fn, [gf.Uniform(4), gf.Uniform(8)])
    report.to_csv(tmp_path / "parts.csv", by_parameter=True)
    with open(tmp_path / "parts.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], line["parameter"]) for line in lines[:2]] == [
        ("Uniform(4)", "0.weight"),
        ("Uniform(4)", "0.bias"),
    ]
    assert len(lines) == 8 and float(lines[4]["ratio"]) == pytest.approx(0.5)
    assert report.breakdown().count("0.500") >= 4


def test_svrg_quadruples_when_the_distance_doubles_on_least_squares():
    model = nn.Linear(6, 1).double()
    data = TensorDataset(torch.randn(30, 6, dtype=torch.float64), torch.randn(30, dtype=torch.float64))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    direction = {name: torch.randn_like(value) for name, value in start.items()}
    found = []
    for distance in (1.0, 2.0):
        model.load_state_dict({name: start[name] + distance * direction[name] for name in start})
        found.append(gf.compare_estimators(model, data, squared, [gf.SVRG(3, start)])[0].variance)
    assert found[1] == pytest.approx(4 * found[0], rel=1e-9)


def test_monte_carlo_agrees_with_the_exact_figures():
    model = mlp()
    data = data_for(model, N=40)
    G = gradients(model, data)
    snapshot = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    strata = gf.Strata.from_points(G, torch.arange(40) % 6, 6)
    estimators = [
        gf.Uniform(4),
        gf.Uniform(10, replacement=False),
        gf.Stratified(strata),
        gf.Stratified(strata, 3),
        gf.Stratified(strata, 11, "neyman"),
        gf.Stratified(strata, snapshot=snapshot),
        gf.Stratified(strata, 3, snapshot=snapshot),
        gf.SVRG(4, snapshot),
    ]
    report = gf.compare_estimators(model, data, loss_fn, estimators, monte_carlo=150, seed=1, batch_size=8)
    for row in report:
        mc = row.monte_carlo
        assert mc.draws == 150
        assert abs(mc.variance - row.variance) <= 3 * mc.variance_error
        assert 0 < mc.variance_error < 0.25 * row.variance
        assert abs(mc.normalized_variance - row.normalized_variance) <= 3 * mc.normalized_variance_error
        aggregate = mc.aggregate_normalized_variance - row.aggregate_normalized_variance
        assert abs(aggregate) <= 3 * mc.aggregate_normalized_variance_error


def test_monte_carlo_reads_pure_noise_as_one_even_with_ten_draws():
    # The mean of 10 other batches in place of the exact gradient would read 1 + 1/8.
    model = nn.Linear(40, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.randn(64, 40, dtype=torch.float64)
    data = TensorDataset(torch.cat([x, x]), torch.cat([torch.ones(64), -torch.ones(64)]).double())
    (row,) = gf.compare_estimators(model, data, squared, [gf.Uniform(8)], monte_carlo=10)
    assert row.normalized_variance == pytest.approx(1)
    assert row.monte_carlo.normalized_variance == pytest.approx(1)
    assert row.monte_carlo.aggregate_normalized_variance == pytest.approx(1)


def test_monte_carlo_ratio_has_no_small_sample_bias():
    # Many repetitions with few draws each: their mean must hit the exact ratio, which the plug-in misses.
    model = nn.Linear(3, 1, bias=False).double()
    data = TensorDataset(torch.randn(50, 3, dtype=torch.float64), torch.randn(50, dtype=torch.float64) + 0.5)
    rows = [
        gf.compare_estimators(model, data, squared, [gf.Uniform(2)], monte_carlo=6, seed=seed)[0] for seed in range(60)
    ]
    values = torch.tensor([row.monte_carlo.aggregate_normalized_variance for row in rows], dtype=torch.float64)
    V = torch.tensor([row.monte_carlo.variance for row in rows], dtype=torch.float64)
    gg = rows[0].variance / rows[0].aggregate_normalized_variance - rows[0].variance
    exact, error = rows[0].aggregate_normalized_variance, values.std() / 60**0.5
    assert abs(values.mean() - exact) <= 3 * error
    plug_in = (V / (V + gg)).mean()
    assert abs(plug_in - exact) > abs(values.mean() - exact)


def test_monte_carlo_is_reproducible():
    model = mlp()
    data = data_for(model)

    def draw(seed):
        return gf.compare_estimators(model, data, loss_fn, [gf.Uniform(2)], monte_carlo=3, seed=seed)[0].monte_carlo

    assert draw(0) == draw(0) and draw(0) != draw(1)


def test_report_prints_indexes_and_writes(tmp_path):
    model = mlp()
    data = data_for(model)
    estimators = [gf.Uniform(4), gf.Uniform(8, name="twice"), gf.Stratified(random_strata(23, 5), 2)]
    report = gf.compare_estimators(model, data, loss_fn, estimators, monte_carlo=2)
    text = str(report)
    assert "Uniform(4)" in text and "±" in text and "comes from drawing strata" in text
    assert report["twice"] is report[1] and len(report) == 3
    assert report[0:2] == [report[0], report[1]] and report[-1:] == [report[2]] and report[np.int64(1)] is report[1]
    with pytest.raises(KeyError, match="no estimator 'x'; there are Uniform"):
        report["x"]
    report.to_csv(tmp_path / "report.csv")
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["Uniform(4)", "twice", report[2].name]
    assert float(rows[1]["variance"]) == report[1].variance and float(rows[1]["monte_carlo_draws"]) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "report.csv"]


def test_mode_is_reported():
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    data = TensorDataset(torch.randn(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,)))
    calm, noisy = (gf.gradient_stats(model, data, loss_fn, mode=mode) for mode in ("eval", "train"))
    assert "dropout layer(s) off" in calm.notes[0] and "on, one draw" in noisy.notes[0]
    assert calm.variance != noisy.variance
    (row,) = gf.compare_estimators(model, data, loss_fn, [gf.SVRG(2, copy.deepcopy(model))], mode="train")
    assert abs(row.variance) < 1e-25  # the same masks at θ and at the snapshot
