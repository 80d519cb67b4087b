"""Gradient Clustering finds the strata that it should, exact and by the paper's method."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from clustered import EXACT_SKETCH, METHODS, clustering, gradients, losses, small_data, small_model, variance
from torch import nn
from torch.utils.data import TensorDataset

import gradclust_fast as gf
from gradclust_fast.clustering import factored
from gradclust_fast.clustering.factored import refill_smallest
from gradclust_fast.clustering.sketches import merge_equal_rows


@pytest.mark.parametrize("method", METHODS)
def test_strata_carry_the_true_variance_of_their_clusters(method):
    model, data = small_model(), small_data()
    found = clustering(method, model=model, sketch=EXACT_SKETCH)
    strata = found.fit(data, losses, batch_size=16)
    rows = gradients(model, data)
    assert strata.distortion / 40**2 == pytest.approx(variance(rows, strata.labels, 6), rel=1e-10)
    between = (
        strata.counts
        / 40
        * (strata.means - strata.means.nan_to_num().mul(strata.counts[:, None]).sum(0) / 40).square().sum(1)
    ).sum()
    within = (strata.counts / 40 * strata.variance).sum()
    sigma2 = (rows - rows.mean(0)).square().sum() / 40
    torch.testing.assert_close(within + between, sigma2)
    if method == "exact":
        assert found.history[-1] == pytest.approx(strata.distortion, rel=1e-9)
        assert all(later <= earlier for earlier, later in zip(found.history, found.history[1:]))
    else:
        assert len(found.history) == 10


def test_exact_clusters_are_far_less_noisy_than_random_ones_also_by_a_sketch():
    model, data = small_model(torch.float32), small_data(120, torch.float32)
    rows = gradients(model, data)
    for sketch in (EXACT_SKETCH, gf.Sketch(dim=64, sides=(8, 8))):
        strata = clustering(model=model, K=10, sketch=sketch).fit(data, losses)
        random_equal = variance(rows, torch.arange(120) % 10, 10)
        assert variance(rows, strata.labels, 10) <= 0.6 * random_equal
        assert strata.distortion / 120**2 == pytest.approx(variance(rows, strata.labels, 10), rel=0.35)


def test_a_clustering_is_a_local_optimum_of_the_true_objective():
    model, data = small_model(), small_data(20)
    strata = clustering(model=model, K=4, sketch=EXACT_SKETCH, tol=0.0).fit(data, losses)
    rows = gradients(model, data)
    best = variance(rows, strata.labels, 4)
    for i in range(20):
        for k in range(4):
            labels = strata.labels.clone()
            labels[i] = k
            assert variance(rows, labels, 4) >= best * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [3, 16, 256])
def test_as_many_clusters_as_distinct_examples_leave_no_variance(dtype, batch_size):
    x, y = small_data(9, dtype).tensors
    copies = torch.randint(9, (70,), generator=torch.Generator().manual_seed(5))
    data, model = TensorDataset(x[copies], y[copies]), small_model(dtype)
    strata = clustering(model=model, K=9).fit(data, losses, batch_size=batch_size)
    rows = gradients(model, data)
    assert variance(rows, strata.labels, 9) <= 1e-12 * variance(rows, torch.zeros(70), 1)


def test_more_clusters_than_examples_leave_no_variance():
    strata = clustering(K=50).fit(small_data(8), losses)
    assert strata.distortion == 0 and strata.num_clusters == 50 and int((strata.counts == 0).sum()) == 42


def test_rounding_differences_between_copies_do_not_keep_them_apart():
    for seed in range(20):  # left as they are, some of these runs end with copies in two clusters
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(12, 16, generator=generator)[torch.randint(12, (150,), generator=generator)]
        noisy = rows * (1 + 1e-7 * torch.randn(rows.shape, generator=generator))
        found = gf.cluster_points(merge_equal_rows(noisy), 12, seed=seed)
        assert variance(rows.double(), found.labels, 12) <= 1e-12 * variance(rows.double(), torch.zeros(150), 1)


def test_rounding_differences_between_copies_are_merged_and_others_kept():
    rows = torch.randn(20, 6).repeat(3, 1)
    noisy = rows * (1 + 1e-7 * torch.randn_like(rows))
    merged = merge_equal_rows(noisy)
    assert len(merged.unique(dim=0)) == 20
    torch.testing.assert_close(merged, rows, rtol=1e-6, atol=0)
    different = torch.randn(50, 6)
    assert torch.equal(merge_equal_rows(different), different)


class Sequence(nn.Module):
    """Two linear layers on [B, T, 4], averaged over positions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.two(self.one(x).tanh()).mean(1)


def literal_factored(model, data, K, rounds, seed, batch_size, min_size, start):
    """The paper's rule, one example at a time with dense centres, in float64."""
    N = len(data)
    pairs, full = [], []
    for x, y in data:
        z1 = F.linear(x, model.one.weight, model.one.bias)  # [T, 5]
        h = z1.tanh()
        z2 = F.linear(h, model.two.weight)  # [T, 3]
        d1, d2 = torch.autograd.grad(losses(z2.mean(0)[None], y[None]).sum(), [z1, z2])
        one = torch.ones(1, dtype=torch.float64)
        pairs.append([(d1.sum(0), x.mean(0)), (d1.sum(0), one), (d2.sum(0), h.detach().mean(0))])
        full.append([d1.T @ x, d1.sum(0)[:, None], d2.T @ h.detach()])
    centers = [[torch.outer(rows[k], cols[k]) for rows, cols in start] for k in range(K)]
    generator, labels, distance = torch.Generator().manual_seed(seed), torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    distance = distance.double()
    for _ in range(rounds):
        counts = [0] * K
        for batch in torch.randperm(N, generator=generator).split(batch_size):
            for i in batch.tolist():
                far = [sum(float((g - c).square().sum()) for g, c in zip(full[i], centers[k])) for k in range(K)]
                labels[i] = min(range(K), key=lambda k: (counts[k] + 1) * far[k])
                distance[i] = far[labels[i]]
            for i in batch.tolist():
                counts[labels[i]] += 1
        labels = refill_smallest(labels, distance, K, min_size, generator)
        for k in range(K):
            members = (labels == k).nonzero().flatten().tolist()
            if members:
                means = [
                    [torch.stack([pairs[i][layer][side] for i in members]).mean(0) for side in (0, 1)]
                    for layer in range(3)
                ]
                centers[k] = [torch.outer(d, a) for d, a in means]
    return labels


@pytest.mark.parametrize("min_size", [0, 1, 5])
def test_factored_follows_the_papers_rule(monkeypatch, min_size):
    torch.manual_seed(3)
    model, K, N = Sequence().double(), 5, 48
    data = TensorDataset(torch.randn(N, 3, 4, dtype=torch.float64), torch.randint(3, (N,)))
    shapes = {"one.weight": (5, 4), "one.bias": (5, 1), "two.weight": (3, 5)}
    start = {name: [0.05 * torch.randn(K, n, dtype=torch.float64) for n in shape] for name, shape in shapes.items()}

    def place(self, name, gradients):
        self.rows[name], self.cols[name] = start[name]

    monkeypatch.setattr(factored.Rank1Centers, "place", place)
    found = gf.GradientClustering(model, K, "factored", seed=7, rounds=4, min_size=min_size)
    strata = found.fit(data, losses, batch_size=10)
    expected = literal_factored(model, data, K, 4, 7, 10, min_size, list(start.values()))
    assert torch.equal(strata.labels, expected)
    assert len(expected.unique()) > 1


def test_the_smallest_cluster_takes_half_of_the_most_distorted():
    labels = torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    distances = torch.tensor([1.0] * 6 + [2.0] * 4 + [100.0] * 2)  # N_k S_k: 36, 32, 400
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(refill_smallest(labels, distances.double(), 3, 2, generator), labels)
    after = refill_smallest(labels, distances.double(), 3, 3, generator)
    assert (labels == 2).sum() == 2 and torch.bincount(after).tolist() == [3, 4, 5]
    assert torch.equal(after[6:], labels[6:])
    empty = refill_smallest(labels, distances.double(), 4, 1, generator)
    assert torch.bincount(empty).tolist() == [6, 4, 1, 1]


def test_first_centres_are_small_random_and_reproducible():
    class Gradients:
        device, dtype = torch.device("cpu"), torch.float32

        def rank1(self):
            return torch.randn(8, 4), torch.randn(8, 3)

        def sqnorm(self):
            return torch.full((8,), 25.0)

    centers = [factored.Rank1Centers(6, seed=1) for _ in range(2)]
    for one in centers:
        one.place("w", Gradients())
    assert torch.equal(centers[0].rows["w"], centers[1].rows["w"])
    assert centers[0].rows["w"].shape == (6, 3) and centers[0].cols["w"].shape == (6, 4)
    torch.testing.assert_close(centers[0].sqnorms().sqrt(), torch.full((6,), 5 * factored.START, dtype=torch.float64))
