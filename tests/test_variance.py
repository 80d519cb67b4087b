from __future__ import annotations

import copy
import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradclust_fast as gf


def loss_fn(output, target):
    return F.cross_entropy(output, target, reduction="none")


def squared(output, target):
    return 0.5 * (output.squeeze(1) - target).square()


def mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def cnn(dtype=torch.float64):
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 3)).to(dtype)


def data_for(model, N=23, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shape = (5,) if isinstance(model[0], nn.Linear) else (2, 5, 5)
    x = torch.randn(N, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(x, torch.randint(0, 3, (N,), generator=generator))


def gradients(model, data, loss_fn=loss_fn):
    """[N, P] per-example gradients, one example at a time."""
    rows = []
    for i in range(len(data)):
        x, y = data[i]
        loss = loss_fn(model(x.unsqueeze(0)), y.unsqueeze(0)).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    return torch.stack(rows)


def flat(by_name):
    return torch.cat([value.flatten() for value in by_name.values()])


MODELS = [pytest.param(mlp, id="mlp"), pytest.param(cnn, id="cnn")]


# --- gradient_stats


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


# --- compare_estimators: exact


def random_strata(N, K, seed=0):
    labels = torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(seed))
    return gf.Strata(labels, K)


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


# --- SVRG


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


# --- Monte Carlo


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


# --- reports


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


# --- no trace


class Failing(TensorDataset):
    def __getitem__(self, i):
        if i == 17:
            raise OSError("disk gone")
        return super().__getitem__(i)


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Linear(6, 3)).double().train()
    model[2].eval()
    snapshot = copy.deepcopy(model)
    data = data_for([nn.Linear(1, 1)])
    if fails:
        data = Failing(*data.tensors)
    loss_fn(model(data.tensors[0]), data.tensors[1]).sum().backward()
    model[0].bias.grad = None
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def measure():
        gf.gradient_stats(model, data, loss_fn, mode="train", batch_size=4)
        estimators = [gf.Uniform(2), gf.SVRG(2, snapshot), gf.Stratified(random_strata(23, 4))]
        gf.compare_estimators(model, data, loss_fn, estimators, monte_carlo=2, batch_size=4)

    if fails:
        with pytest.raises(OSError, match="disk gone"):
            measure()
    else:
        measure()
    assert torch.equal(rng, torch.get_rng_state())
    for net in (model, snapshot):
        assert net.training and net[0].training and not net[2].training
        for module in net.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
        assert all(not p._backward_hooks for p in net.parameters())
    for p, (grad, value) in zip(model.parameters(), grads):
        assert p.grad is grad and (grad is None or torch.equal(grad, value))
    assert all(p.grad is None for p in snapshot.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    gf.gradient_stats(model, data_for([nn.Linear(1, 1)]), loss_fn)  # nothing is still being watched


# --- wrong input


def small():
    model = mlp()
    return model, data_for(model)


def broken_data():
    x, y = data_for(mlp()).tensors
    x = x.clone()
    x[[3, 11]] = float("nan")
    return TensorDataset(x, y)


class Blowup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[1] = float("inf")
        return grad


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, d: gf.gradient_stats(m, d, nn.CrossEntropyLoss()), ValueError, "reduction='none'"),
        (lambda m, d: gf.gradient_stats(m, broken_data(), loss_fn), ValueError, "2 example.*index 3, 11"),
        (
            lambda m, d: gf.gradient_stats(m, d, lambda o, y: loss_fn(Blowup.apply(o), y), batch_size=9),
            ValueError,
            "the gradient of .* is not finite: index 1;",
        ),
        (lambda m, d: gf.gradient_stats(m, TensorDataset(torch.zeros(0, 5)), loss_fn), ValueError, "empty"),
        (lambda m, d: gf.gradient_stats(m, d), TypeError, "loss_fn must be"),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn, mode="test"), ValueError, "'eval' or 'train'"),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn, parameters="x.*"), ValueError, "x.*"),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn).normalized_variance(24, replacement=False), ValueError, "N=23"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, []), ValueError, "estimators is empty"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [128]), TypeError, "got int"),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, gf.Uniform(2)),
            TypeError,
            "must be a list, got one Uniform",
        ),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(2, nn.Linear(5, 3))]),
            ValueError,
            "SVRG.2.: snapshot is not a copy of this model",
        ),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn, batch_size=2.5), TypeError, "batch_size must be an integer"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.Uniform(24, False)]), ValueError, "at most N=23"),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.Stratified(random_strata(9, 2))]),
            ValueError,
            "strata are of 9 examples, the data has 23",
        ),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(2, m)]), ValueError, "copy.deepcopy"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(2, {"a": 1})]), ValueError, "not a state_dict"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.Uniform(2)], monte_carlo=1), ValueError, "at least 2"),
        (lambda m, d: gf.SVRG(2, [1]), TypeError, "snapshot must be a copy"),
        (lambda m, d: gf.Uniform(0), ValueError, "at least 1, got 0"),
        (lambda m, d: gf.Uniform(1.5), TypeError, "must be an int"),
        (lambda m, d: gf.Stratified([0, 1]), TypeError, "strata must be gf.Strata"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*small())
