from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradclust_fast as gf
from gradclust_fast.clustering import factored
from gradclust_fast.clustering.factored import refill_smallest
from gradclust_fast.clustering.sketches import merge_equal_rows

EXACT_SKETCH = gf.Sketch(sides=(1000, 1000), reduce=False)  # keeps every coordinate
METHODS = ["exact", "factored"]


def losses(output, target):
    return F.cross_entropy(output, target, reduction="none")


def small_model(dtype=torch.float64):
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 3, 3, padding=1, stride=2)
    return nn.Sequential(conv, nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(27, 4)).to(dtype)


def small_data(N=40, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(
        torch.randn(N, 1, 5, 5, generator=generator, dtype=dtype), torch.randint(4, (N,), generator=generator)
    )


def gradients(model, data):
    """[N, parameters] float64, one example at a time."""
    model = model.eval()
    rows = []
    for x, y in data:
        loss = losses(model(x[None]), y[None]).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return torch.stack(rows)


def variance(rows, labels, K):
    """Of one draw from every cluster, weighted by N_k/N."""
    total = 0.0
    for k in range(K):
        members = rows[labels == k]
        if len(members):
            total += len(members) * float((members - members.mean(0)).square().sum())
    return total / len(rows) ** 2


def clustering(method="exact", K=6, model=None, **options):
    return gf.GradientClustering(small_model() if model is None else model, K, method, **options)


# --- what is found ---------------------------------------------------------------------------------------------------


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


# --- the paper's method ----------------------------------------------------------------------------------------------


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


# --- repeatability and data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_strata(method):
    data = small_data()
    first, again = (clustering(method, seed=3).fit(data, losses) for _ in range(2))
    other = clustering(method, seed=4).fit(data, losses)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.parametrize("batch_size, num_workers", [(7, 0), (40, 0), (16, 2)])
def test_loading_makes_no_difference(batch_size, num_workers):
    data = small_data()
    strata = clustering().fit(data, losses, batch_size=13)
    other = clustering().fit(data, losses, batch_size=batch_size, num_workers=num_workers)
    assert torch.equal(strata.labels, other.labels)


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_that_yields_indices_serves_as_the_data_set(method):
    data = small_data()
    loader = DataLoader(gf.with_indices(data), batch_size=16, shuffle=True)
    assert torch.equal(
        clustering(method).fit(loader, losses).labels, clustering(method).fit(data, losses, batch_size=16).labels
    )


def test_forward_serves_any_kind_of_sample():
    data = small_data()
    dicts = [{"image": x, "label": y} for x, y in data]
    strata = clustering().fit(dicts, forward=lambda model, batch: losses(model(batch["image"]), batch["label"]))
    assert torch.equal(strata.labels, clustering().fit(data, losses).labels)


def test_only_the_chosen_parameters_count():
    data, model = small_data(), small_model()
    strata = clustering(model=model, sketch=EXACT_SKETCH, parameters="4.*").fit(data, losses)
    last = gradients(model, data)[:, -(27 * 4 + 4) :]
    assert strata.distortion / 40**2 == pytest.approx(variance(last, strata.labels, 6), rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_fit_starts_from_the_first(method):
    data, model = small_data(), small_model()
    warm = clustering(method, model=model)
    first, begun = warm.fit(data, losses), warm.history[0]
    warm.fit(data, losses)
    if method == "exact":
        assert warm.history[0] == pytest.approx(first.distortion)
    assert warm.history[0] < begun
    fewer = small_data(30)  # other data: a fresh start
    assert torch.equal(warm.fit(fewer, losses).labels, clustering(method, model=model).fit(fewer, losses).labels)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_warm_start_every_fit_is_the_first(method):
    data, cold = small_data(), clustering(method, warm_start=False)
    assert torch.equal(cold.fit(data, losses).labels, cold.fit(data, losses).labels)


# --- what is left behind ---------------------------------------------------------------------------------------------


class Explodes:
    """A data set that fails in the middle of a pass."""

    def __init__(self, data, error):
        self.data, self.error = data, error

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i == 20:
            raise self.error
        return self.data[i]


def state(model):
    return {
        "grads": [p.grad for p in model.parameters()],
        "hooks": [(p._backward_hooks, len(m._forward_hooks)) for m in model.modules() for p in m.parameters()],
        "modes": [m.training for m in model.modules()],
        "buffers": [b.clone() for b in model.buffers()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), OSError("disk")], ids=["fit", "interrupted", "failed"])
def test_nothing_is_left_on_the_model(method, error):
    model = nn.Sequential(small_model(), nn.BatchNorm1d(4, affine=False).double())
    model.train()
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    before, grad = state(model), model[0][0].weight.grad
    found = clustering(method, model=model)
    if error is None:
        found.fit(small_data(), losses)
    else:
        with pytest.raises(type(error)):
            found.fit(Explodes(small_data(), error), losses)
        assert found.strata is None
    after = state(model)
    assert after["grads"][0] is grad and torch.equal(grad, torch.ones_like(grad))
    assert all(g is None for g in after["grads"][1:])
    assert all(torch.equal(a, b) for a, b in zip(before.pop("buffers"), after.pop("buffers")))
    before.pop("grads"), after.pop("grads")
    assert before == after
    small = small_data(4)
    model(small.tensors[0]).sum().backward()  # and it still trains


def test_a_failed_fit_keeps_the_last_strata():
    found = clustering()
    strata = found.fit(small_data(), losses)
    history = found.history
    with pytest.raises(OSError, match="disk"):
        found.fit(Explodes(small_data(), OSError("disk")), losses)
    assert found.strata is strata and found.history is history


def test_train_mode_is_used_when_asked():
    seen = set()
    model, data = nn.Linear(3, 2).eval(), TensorDataset(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    model.register_forward_hook(lambda module, args, output: seen.add(module.training))
    clustering(model=model, K=2).fit(data, losses, mode="train")
    assert seen == {True} and not model.training
    seen.clear()
    clustering(model=model, K=2).fit(data, losses)
    assert seen == {False}


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminals_stderr_only(capsys, monkeypatch, terminal):
    pytest.importorskip("rich")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    clustering("factored", rounds=1).fit(small_data(), losses, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and ("round 1/1" in err) == terminal


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"K": 0}, ValueError, "num_clusters must be at least 1, got 0"),
        ({"K": "8"}, TypeError, "num_clusters must be an integer, got '8'"),
        ({"method": "kmeans"}, ValueError, "method must be one of 'exact', 'factored', 'online', got 'kmeans'"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"sketch": 256}, TypeError, "sketch must be a gf.Sketch, got int"),
        ({"rounds": 3}, ValueError, "rounds is not an option of method='exact', which has max_sweeps, tol"),
        ({"method": "factored", "tol": 0.1}, ValueError, "tol is not an option of method='factored'"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1, got 0"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number, at least 0"),
        ({"method": "factored", "rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"method": "factored", "min_size": -1}, ValueError, "min_size must be at least 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        clustering(**arguments)


@pytest.mark.parametrize("method", METHODS)
def test_bad_data_is_named(method):
    data, found = small_data(), clustering(method)
    with pytest.raises(ValueError, match="dataset is empty"):
        found.fit([], losses)
    with pytest.raises(ValueError, match=r"must return per-example losses \[40\], got \[\]"):
        found.fit(data, F.cross_entropy)
    with pytest.raises(ValueError, match="more than once"):
        found.fit(DataLoader(gf.with_indices(data), sampler=[0, 1, 1, *range(3, 40)]), losses)
    with pytest.raises(ValueError, match="skipped 35 of 40 examples, the first of them index 5"):
        found.fit(DataLoader(gf.with_indices(data), sampler=range(5)), losses)
    with pytest.raises(TypeError, match="does not yield indices"):
        found.fit(DataLoader(data), losses)
    with pytest.raises(TypeError, match="map-style"):
        found.fit(iter(data), losses)
    with pytest.raises(ValueError, match="batch_size=None, which yields single examples"):
        found.fit(DataLoader(gf.with_indices(data), batch_size=None), losses)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        found.fit(data, losses, batch_size=0)
    with pytest.raises(ValueError, match="mode must be"):
        found.fit(data, losses, mode="test")


@pytest.mark.parametrize("method", METHODS)
def test_examples_without_a_finite_gradient_are_named(method):
    x, y = small_data().tensors
    x[[7, 23], 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2 example\(s\) is not finite: index 7, 23"):
        clustering(method).fit(TensorDataset(x, y), losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_finite_loss_with_an_infinite_gradient_is_named(method):
    def steep(output, target):
        return losses(output, target) + output[:, 0].abs().clamp(min=1e-30).mul(0).sqrt()  # slope inf·0 = NaN

    with pytest.raises(ValueError, match=r"40 example\(s\) is not finite: index 0, 1,"):
        clustering(method).fit(small_data(), steep)


@pytest.mark.parametrize("method", METHODS)
def test_one_example_with_an_infinite_gradient_is_named_alone(method):
    class Blowup(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.index_fill(0, torch.tensor([2]), float("inf"))

    with pytest.raises(ValueError, match=r"1 example\(s\) is not finite"):
        clustering(method).fit(small_data(), lambda output, target: losses(Blowup.apply(output), target), batch_size=40)


def test_a_parameter_without_a_route_is_named():
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 2))
    data = TensorDataset(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=r"0\.weight"):
        gf.GradientClustering(model, 2).fit(data, losses)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_modules_are_clustered_too(method):
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    strata = gf.GradientClustering(model, 3, method=method).fit(data, losses)
    assert len(strata.labels) == 12


def test_a_chain_of_small_steps_is_not_merged_from_end_to_end():
    chain = torch.linspace(1, 1.1, 50001).unsqueeze(1)  # neighbours 2e-6 apart, the ends 0.1
    assert (merge_equal_rows(chain) - chain).abs().max() <= 2e-5


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_copies_of_one_example_share_a_stratum_wherever_they_stand(batch_size):
    x, y = small_data().tensors
    which = torch.arange(60)[torch.randperm(60)] % 6
    strata = clustering(K=6).fit(TensorDataset(x[which], y[which]), losses, batch_size=batch_size)
    for example in range(6):
        assert len(strata.labels[which == example].unique()) == 1
