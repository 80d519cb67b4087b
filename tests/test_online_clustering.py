"""Online clustering: strata that follow training, from the sketches of recorded steps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradclust_fast as gf
from gradclust_fast.clustering.online import RunningClusters

WHOLE = gf.Sketch(sides=(1000, 1000), reduce=False)  # keeps every coordinate


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def linear_model(inputs=6, classes=4):
    torch.manual_seed(1)
    return nn.Linear(inputs, classes).double()


def clustered_data(N=240, kinds=6, noise=0.05, seed=3):
    """Examples of a few kinds, whose gradients are nearly equal within a kind."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(kinds, (N,), generator=generator)
    x = torch.randn(kinds, 6, generator=generator, dtype=torch.float64)[kind]
    x = x + noise * torch.randn(N, 6, generator=generator, dtype=torch.float64)
    return TensorDataset(x, torch.arange(kinds)[kind] % 4), kind


def objective(points, labels):
    return sum(
        len(own) * float((own - own.mean(0)).square().sum()) for own in (points[labels == k] for k in labels.unique())
    )


def gradients(model, data):
    rows = []
    for x, y in data:
        loss = losses(model(x[None]), y[None]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def recorded(model, data, index, weights=None, sketch=WHOLE, **options):
    x, y = data[index]
    with gf.record(model, sketch=sketch, **options) as rec:
        loss = losses(model(x), y)
        (loss if weights is None else weights * loss).mean().backward()
    model.zero_grad()
    return rec


def online(model, N, K=6, **options):
    return gf.GradientClustering(model, K, "online", sketch=WHOLE, num_examples=N, **options)


# --- what is found ---------------------------------------------------------------------------------------------------


def test_updates_find_the_clusters_of_a_fixed_model():
    model, (data, _) = linear_model(), clustered_data()
    clustering, points = online(model, 240, decay=0.8), gradients(model, data)
    random = objective(points, clustering.strata.labels)
    for epoch in range(6):
        order = torch.randperm(240, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(24):
            clustering.update(recorded(model, data, index), index)
    found = objective(points, clustering.strata.labels)
    best = gf.cluster_points(points, 6).history[-1]
    assert found <= 0.02 * random and found <= 1.6 * best
    # the running statistics are those of the clusters
    exact = gf.Strata.from_points(points, clustering.strata.labels, 6)
    assert clustering.strata.distortion == pytest.approx(exact.distortion, rel=0.5)
    filled = exact.counts > 0
    torch.testing.assert_close(clustering.strata.means[filled], exact.means[filled], atol=0.1, rtol=0.1)


def test_an_update_puts_every_example_where_the_objective_grows_least():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    strata = gf.Strata.from_points(points, torch.randint(4, (30,), generator=generator), 4)
    for i in range(30):
        clusters = RunningClusters.of(strata, 0.9)
        clusters.update(points[[i]], torch.tensor([i]))
        own = int(strata.labels[i])
        cost = []
        for k in range(4):  # the exact change of J where i joins k, from the running statistics
            size = int(strata.counts[k]) - (k == own)
            cost.append(size * (float((points[i] - strata.means[k]).square().sum()) + float(strata.variance[k])))
        assert int(clusters.labels[i]) == min(range(4), key=cost.__getitem__)


def test_running_statistics_are_the_decayed_averages_of_what_came():
    labels = torch.zeros(4, dtype=torch.int64)
    clusters = RunningClusters(labels, 1, decay=0.5)
    generator = torch.Generator().manual_seed(0)
    came, weight = [], []
    for _step in range(5):
        index = torch.randperm(4, generator=generator)[:3]
        points = torch.randn(3, 2, dtype=torch.float64, generator=generator)
        clusters.update(points, index)
        came.append(points)
        weight = [w * 0.5 for w in weight] + [torch.ones(3, dtype=torch.float64)]
        x, w = torch.cat(came), torch.cat(weight)
        mean = (w[:, None] * x).sum(0) / w.sum()
        torch.testing.assert_close(clusters.means[0], mean)
        torch.testing.assert_close(clusters.variance[0], (w * (x - mean).square().sum(1)).sum() / w.sum())
        torch.testing.assert_close(clusters.weight[0], w.sum())


def test_an_emptied_cluster_is_founded_anew():
    points = torch.tensor([[0.0], [0.0], [10.0], [11.0]], dtype=torch.float64)
    strata = gf.Strata.from_points(points, [0, 0, 1, 1], 3)
    clusters = RunningClusters.of(strata, 0.9)
    clusters.update(torch.tensor([[11.0]], dtype=torch.float64), torch.tensor([3]))
    assert clusters.labels.tolist() == [0, 0, 1, 2] and clusters.counts.tolist() == [2, 1, 1]
    assert clusters.means[2].tolist() == [11.0] and float(clusters.variance[2]) == 0
    # the founder leaves for a better place, and its old cluster is free for another
    clusters.update(torch.tensor([[0.0]], dtype=torch.float64), torch.tensor([3]))
    assert clusters.strata().distortion >= 0


def test_copies_gather_and_leave_no_variance():
    model, (data, kind) = linear_model(), clustered_data(120, noise=0.0)
    clustering = online(model, 120, K=8)
    for epoch in range(8):
        for index in torch.randperm(120, generator=torch.Generator().manual_seed(epoch)).split(10):
            clustering.update(recorded(model, data, index), index)
    points = gradients(model, data)
    assert objective(points, clustering.strata.labels) <= 1e-12 * objective(points, torch.zeros(120))
    assert len(kind.unique()) == 6


def test_examples_that_never_came_stay_where_they_were():
    model, (data, _) = linear_model(), clustered_data()
    clustering = online(model, 240)
    before = clustering.strata.labels.clone()
    index = torch.arange(0, 240, 5)
    assert len(clustering.unseen) == 240
    strata = clustering.update(recorded(model, data, index), index)
    rest = torch.ones(240, dtype=torch.bool)
    rest[index] = False
    assert torch.equal(strata.labels[rest], before[rest]) and torch.equal(clustering.unseen, rest.nonzero().flatten())
    assert strata is clustering.strata and int(strata.counts.sum()) == 240


def test_statistics_appear_once_every_cluster_has_met_an_example():
    model, (data, _) = linear_model(), clustered_data()
    clustering = online(model, 240, K=200)
    index = torch.arange(8)
    assert clustering.update(recorded(model, data, index), index).variance is None and clustering.history == []
    gf.StratifiedBatchSampler(clustering.strata, 16)  # usable before
    few = online(model, 240, K=3)
    for start in (0, 8, 16):
        few.update(recorded(model, data, index + start), index + start)
    assert few.strata.variance is not None and few.history[-1] == few.strata.distortion


def test_fit_starts_the_running_centres_and_updates_follow_a_moving_model():
    model, (data, _) = linear_model(), clustered_data(noise=0.3)
    clustering = gf.GradientClustering(model, 24, "online", sketch=WHOLE, decay=0.9)
    old = clustering.fit(data, losses)
    exact = gf.GradientClustering(model, 24, sketch=WHOLE).fit(data, losses)
    assert torch.equal(old.labels, exact.labels) and len(clustering.unseen) == 0
    with torch.no_grad():
        for p in model.parameters():
            p += 1.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=p.dtype)
    for epoch in range(4):
        for index in torch.randperm(240, generator=torch.Generator().manual_seed(epoch)).split(24):
            clustering.update(recorded(model, data, index), index)
    points = gradients(model, data)
    assert objective(points, clustering.strata.labels) <= 0.7 * objective(points, old.labels)


# --- with the sampler ------------------------------------------------------------------------------------------------


def test_weights_are_divided_out():
    model, (data, _) = linear_model(), clustered_data()
    plain, weighted = online(model, 240), online(model, 240)
    index = torch.arange(40)
    weights = torch.linspace(0.2, 3.0, 40, dtype=torch.float64)
    one = plain.update(recorded(model, data, index), index)
    other = weighted.update(recorded(model, data, index, weights), index, weights)
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(plain._running.means, weighted._running.means)
    assert not torch.allclose(_means(model, data, index, weights), plain._running.means)


def _means(model, data, index, weights):
    clustering = online(model, 240)
    clustering.update(recorded(model, data, index, weights), index)
    return clustering._running.means


def test_new_strata_act_at_the_next_epoch_of_a_sampler():
    model, (data, _) = linear_model(), clustered_data()
    clustering = online(model, 240)
    start = clustering.strata
    sampler = gf.StratifiedBatchSampler(start, 24)
    loader = DataLoader(gf.with_indices(data), batch_sampler=sampler)
    for epoch in range(3):
        in_force = start.labels if epoch == 0 else clustering.strata.labels
        for index, _x, _y in loader:
            assert torch.equal(sampler.strata.labels, in_force)
            weights = sampler.weights(index)
            clustering.update(recorded(model, data, index, weights), index, weights)
            sampler.set_strata(clustering.strata)
    next(iter(sampler))
    assert torch.equal(sampler.strata.labels, clustering.strata.labels)


def test_state_dict_continues_with_the_same_bits():
    model, (data, _) = linear_model(), clustered_data()
    clustering = online(model, 240, K=9)
    batches = torch.randperm(240, generator=torch.Generator().manual_seed(0)).split(24)
    for index in batches[:5]:
        clustering.update(recorded(model, data, index), index)
    state = copy.deepcopy(clustering.state_dict())
    again = gf.GradientClustering(model, 9, "online", sketch=WHOLE)
    again.load_state_dict(state)
    for index in batches[5:]:
        for each in (clustering, again):
            each.update(recorded(model, data, index), index)
    assert torch.equal(clustering.strata.labels, again.strata.labels)
    assert torch.equal(clustering.strata.means.nan_to_num(), again.strata.means.nan_to_num())
    assert clustering.history == again.history and torch.equal(clustering.unseen, again.unseen)
    with pytest.raises(ValueError, match="num_clusters=9"):
        online(model, 240, K=8).load_state_dict(state)
    with pytest.raises(ValueError, match="state has no"):
        again.load_state_dict({"method": "online"})


@pytest.mark.parametrize("method", ["exact", "factored"])
def test_state_dict_of_the_other_methods_is_a_warm_start(method):
    model, (data, _) = linear_model(), clustered_data()
    one = gf.GradientClustering(model, 6, method)
    one.fit(data, losses)
    other = gf.GradientClustering(model, 6, method)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one.fit(data, losses).labels, other.fit(data, losses).labels)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_bad_update_is_named_and_changes_nothing():
    model, (data, _) = linear_model(), clustered_data()
    clustering = online(model, 240)
    index = torch.arange(8)
    clustering.update(recorded(model, data, index), index)
    before = copy.deepcopy(clustering.state_dict())
    rec = recorded(model, data, index)
    for bad, error, message in [
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), ValueError, "index 6 comes 2 times"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, 240]), IndexError, "index 240 is outside the 240"),
        (torch.tensor([0, 1, 2, 3, 4, 5, 6, -1]), IndexError, "index -1"),
        (torch.arange(7), ValueError, r"index must be \[8\]"),
        (torch.arange(8.0), TypeError, "integers"),
    ]:
        with pytest.raises(error, match=message):
            clustering.update(rec, bad)
    for weights, message in [(torch.ones(7), r"weights must be \[8\]"), (torch.zeros(8), "positive")]:
        with pytest.raises(ValueError, match=message):
            clustering.update(rec, index, weights)
    with pytest.raises(ValueError, match="open it with"):
        clustering.update(recorded(model, data, index, sketch=gf.Sketch(dim=8)), index)
    with pytest.raises(ValueError, match="different parameters"):
        clustering.update(recorded(model, data, index, parameters="weight"), index)
    with pytest.raises(TypeError, match="rec must be"):
        clustering.update(torch.ones(8, 3), index)
    with pytest.raises(ValueError, match="sketch=None"):
        clustering.update(recorded(model, data, index, sketch=None), index)
    x, y = data[index]
    x = x.clone()
    x[3] = float("nan")
    with pytest.raises(ValueError, match="index 3"):
        clustering.update(recorded(model, TensorDataset(x, y), index), index)
    after = clustering.state_dict()
    assert torch.equal(before["running"]["labels"], after["running"]["labels"])
    assert torch.equal(before["running"]["means"], after["running"]["means"])


def test_update_needs_the_online_method_and_a_data_set():
    model, (data, _) = linear_model(), clustered_data()
    rec = recorded(model, data, torch.arange(8))
    with pytest.raises(ValueError, match="method='online'"):
        gf.GradientClustering(model, 4, sketch=WHOLE).update(rec, torch.arange(8))
    with pytest.raises(RuntimeError, match="num_examples"):
        gf.GradientClustering(model, 4, "online", sketch=WHOLE).update(rec, torch.arange(8))
    with pytest.raises(ValueError, match="below 1"):
        gf.GradientClustering(model, 4, "online", decay=1.0)
    with pytest.raises(ValueError, match="not an option of method='exact'"):
        gf.GradientClustering(model, 4, decay=0.9)
