from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import gradclust_fast as gf
from gradclust_fast.allocation import Plan


class Scripted:
    """A generator that hands out the given uniform numbers: enumerates every outcome of a draw."""

    def __init__(self, values):
        self.values = list(values)

    def random(self, size):
        out, self.values = self.values[:size], self.values[size:]
        return np.array(out)


def points_and_strata(counts, R=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    points = torch.randn(len(labels), R, dtype=torch.float64, generator=generator) + labels.unsqueeze(1)
    return points, gf.Strata.from_points(points, labels, len(counts))


def estimate(plan, strata, points, index):
    weight = torch.from_numpy(plan.weight)[strata.labels[index]]
    return (weight.unsqueeze(1) * points[index]).mean(0)


def moments(plan, strata, points, outcomes):
    """Mean and total variance over equally likely scripted draws."""
    drawn = torch.stack([estimate(plan, strata, points, plan.draw(Scripted(u))) for u in outcomes])
    mean = drawn.mean(0)
    return mean, float((drawn - mean).square().sum(1).mean())


def uniforms(size):
    """One number per value of floor(u · size)."""
    return [(i + 0.5) / size for i in range(size)]


# --- unbiased, with the variance that is predicted


def test_all_draws_of_one_per_stratum_average_to_the_full_gradient():
    points, strata = points_and_strata([3, 1, 0, 4, 2])
    plan = Plan(strata, 4)
    mean, variance = moments(plan, strata, points, itertools.product(*(uniforms(n) for n in [3, 1, 4, 2])))
    torch.testing.assert_close(mean, points.mean(0), rtol=1e-12, atol=1e-12)
    assert variance == pytest.approx(strata.distortion / len(points) ** 2, rel=1e-12)
    assert sum(plan.variance_terms()) == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("allocation", ["equal", "proportional", "neyman"])
@pytest.mark.parametrize("replacement", [False, True])
def test_all_draws_of_several_per_stratum_average_to_the_full_gradient(allocation, replacement):
    points, strata = points_and_strata([4, 2, 3])
    plan = Plan(strata, 5, allocation, replacement)
    sizes = []  # Floyd's algorithm visits the strata in steps: step j draws below N_k − m_k + j + 1
    if replacement:
        sizes = [n for n, m in zip([4, 2, 3], plan.take) for _ in range(m)]
    else:
        for j in range(max(plan.take)):
            sizes += [n - m + j + 1 for n, m in zip([4, 2, 3], plan.take) if m > j]
    mean, variance = moments(plan, strata, points, itertools.product(*map(uniforms, sizes)))
    torch.testing.assert_close(mean, points.mean(0), rtol=1e-12, atol=1e-12)
    assert sum(plan.variance_terms()) == pytest.approx(variance, rel=1e-11)


@pytest.mark.parametrize("counts, B", [([3, 1, 2, 5], 2), ([20, 1, 2, 1, 3], 3), ([2, 2, 2], 1), ([9, 9, 1, 1], 3)])
def test_batches_below_the_number_of_strata_are_unbiased(counts, B):
    points, strata = points_and_strata(counts)
    plan = Plan(strata, B)
    assert plan.inclusion.sum() == pytest.approx(B)
    assert (plan.inclusion <= 1).all()
    below = plan.inclusion < 1
    ratio = plan.inclusion[below] / np.array(counts)[below]
    assert ratio == pytest.approx(ratio[0])  # π_k ∝ N_k
    # every set of strata with its probability, every draw within them
    mean, square, total = 0, 0.0, 0.0
    coin = plan.design.coin
    for heads in itertools.product([0, 1], repeat=len(coin)):
        if sum(heads) != plan.design.size:
            continue
        p = np.prod(np.where(heads, coin, 1 - coin))
        chosen = sorted([*plan.certain, *plan.chance[np.nonzero(heads)[0]]])
        members = [(strata.labels == k).nonzero().flatten() for k in chosen]
        for index in itertools.product(*members):
            g = estimate(plan, strata, points, torch.stack(index))
            weight = p / np.prod([counts[k] for k in chosen])
            mean, square, total = mean + weight * g, square + weight * float(g.square().sum()), total + weight
    mean = mean / total
    torch.testing.assert_close(mean, points.mean(0), rtol=1e-9, atol=1e-9)
    within, between = plan.variance_terms()
    assert within + between == pytest.approx(square / total - float(mean.square().sum()), rel=1e-7)
    assert between > 0


def test_predicted_variance_holds_in_the_long_run():
    points, strata = points_and_strata([6, 3, 1, 8, 2, 5], seed=1)
    for B, allocation in [(3, "equal"), (8, "proportional"), (9, "neyman")]:
        sampler = gf.StratifiedBatchSampler(strata, B, allocation, seed=3)
        drawn = torch.stack(
            [
                (sampler.weights(i).double().unsqueeze(1) * points[i]).mean(0)
                for _ in range(400)
                for i in map(torch.tensor, sampler)
            ]
        )
        squares = (drawn - points.mean(0)).square().sum(1)
        error = squares.std() / len(squares) ** 0.5
        assert abs(squares.mean() - sampler.predicted_variance()) <= 4 * error
        assert ((drawn.mean(0) - points.mean(0)).abs() <= 4.5 * drawn.std(0) / len(drawn) ** 0.5).all()


def test_weights_mean_is_one_in_expectation():
    _, strata = points_and_strata([4, 1, 7, 3])
    for B in (2, 4, 9):
        plan = Plan(strata, B)
        expected = plan.take if plan.take is not None else plan.inclusion
        assert (plan.weight * expected).sum() / B == pytest.approx(1)


def test_without_replacement_no_example_comes_twice_in_a_batch():
    _, strata = points_and_strata([5, 2, 30])
    for batch in gf.StratifiedBatchSampler(strata, 20, "proportional"):
        assert len(set(batch)) == 20
    whole = next(iter(gf.StratifiedBatchSampler(strata, 37)))
    assert sorted(whole) == list(range(37))


def test_every_example_of_a_stratum_is_equally_likely():
    _, strata = points_and_strata([6, 4])
    sampler = gf.StratifiedBatchSampler(strata, 5, "proportional", seed=9)
    hits = torch.zeros(10)
    M = 0
    while M < 12_000:
        for batch in sampler:
            hits[batch] += 1
            M += 1
    p = torch.tensor([3 / 6, 2 / 4])[strata.labels]
    assert ((hits / M - p).abs() <= 4.5 * (p * (1 - p) / M).sqrt()).all()


# --- the same batches whatever happens around them


def strata_of(N=60, K=7, seed=0):
    return gf.Strata(torch.randint(0, K, (N,), generator=torch.Generator().manual_seed(seed)), K)


def test_batches_depend_on_seed_epoch_and_batch_only():
    def sampler(seed=0):
        return gf.StratifiedBatchSampler(strata_of(), 8, seed=seed)

    first = sampler()
    epochs = [list(first) for _ in range(3)]
    assert len(first) == 8 == len(epochs[0])  # ceil(60 / 8)
    torch.manual_seed(99)
    np.random.seed(99)
    second = sampler()
    second.set_epoch(2)
    assert list(second) == epochs[2]
    second.set_epoch(0)
    assert list(second) == epochs[0] and list(second) == epochs[1]
    assert epochs[0] != epochs[1] and list(sampler(1)) != epochs[0]
    assert len({tuple(b) for e in epochs for b in e}) == 24


def loaded(sampler, workers, epochs=2):
    loader = DataLoader(gf.with_indices(list(range(60))), batch_sampler=sampler, num_workers=workers)
    return [index.tolist() for _ in range(epochs) for index, _ in loader]


def test_workers_change_nothing():
    plain = gf.StratifiedBatchSampler(strata_of(), 8)
    batches = [b for _ in range(2) for b in plain]
    assert loaded(gf.StratifiedBatchSampler(strata_of(), 8), 0) == batches
    assert loaded(gf.StratifiedBatchSampler(strata_of(), 8), 2) == batches


def test_resume_continues_with_what_training_has_not_consumed(tmp_path):
    straight = gf.StratifiedBatchSampler(strata_of(), 8)
    batches = [b for _ in range(3) for b in straight]
    for done in (0, 3, 8):
        sampler = gf.StratifiedBatchSampler(strata_of(), 8)
        loader = DataLoader(gf.with_indices(list(range(60))), batch_sampler=sampler, num_workers=2)
        list(loader)
        running = iter(loader)  # workers fetch ahead of what is consumed
        for _ in range(done):
            next(running)
        torch.save(sampler.state_dict(batches_done=done), tmp_path / "sampler.pt")
        del running
        resumed = gf.StratifiedBatchSampler(strata_of(seed=5), 8)
        resumed.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
        rest = [b for _ in range(2) for b in resumed]
        assert rest[: 16 - done] == batches[8 + done :]
        again = gf.StratifiedBatchSampler(strata_of(), 8)
        again.load_state_dict(resumed.state_dict(batches_done=len(resumed)))
        assert again.epoch == resumed.epoch + 1


def test_state_before_the_first_batch_needs_no_count():
    sampler = gf.StratifiedBatchSampler(strata_of(), 8)
    assert sampler.state_dict()["batches_done"] == 0
    sampler.load_state_dict({**sampler.state_dict(), "batches_done": 5})
    assert sampler.state_dict()["batches_done"] == 5
    next(iter(sampler))
    with pytest.raises(ValueError, match="batches_done is needed"):
        sampler.state_dict()


def test_new_strata_act_at_the_next_epoch():
    old, new = gf.Strata([0] * 30 + [1] * 10, 2), gf.Strata([0] * 10 + [1] * 30, 2)
    sampler = gf.StratifiedBatchSampler(old, 4)
    index = torch.tensor([0, 39])
    running = iter(sampler)
    next(running)
    sampler.set_strata(new)
    assert sampler.weights(index).tolist() == [1.5, 0.5]
    assert sum(i < 30 for i in next(running)) == 2
    state = sampler.state_dict(batches_done=2)
    following = list(sampler)
    assert sampler.weights(index).tolist() == [0.5, 1.5]
    assert all(sum(i < 10 for i in batch) == 2 for batch in following)
    resumed = gf.StratifiedBatchSampler(old, 4)
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == 8 and all(sum(i < 30 for i in batch) == 2 for batch in rest)
    assert list(resumed) == following


def test_a_sampler_keeps_its_strata_when_the_object_is_reloaded():
    strata = gf.Strata([0, 0, 0, 1], 2)
    sampler = gf.StratifiedBatchSampler(strata, 2)
    strata.load_state_dict(gf.Strata([0, 1, 1, 1], 2).state_dict())
    assert sampler.weights(torch.arange(4)).tolist() == [1.5, 1.5, 1.5, 0.5]
    assert sum(i < 3 for i in next(iter(sampler))) == 1


def test_the_state_of_another_data_set_is_refused():
    sampler = gf.StratifiedBatchSampler(gf.Strata([0, 0, 0, 1], 2), 2, seed=7)
    other = gf.StratifiedBatchSampler(gf.Strata([0, 0, 0, 1, 1], 2), 2)
    with pytest.raises(ValueError, match="saved sampler is of 5 examples, this one of 4"):
        sampler.load_state_dict(other.state_dict())
    assert sampler.seed == 7 and len(sampler.strata) == 4
    with pytest.raises(TypeError, match="batches_done must be an integer, got 'two'"):
        sampler.state_dict("two")


# --- ranks


@pytest.mark.parametrize("B", [2, 6])
def test_ranks_partition_one_global_batch(B):
    strata = strata_of()
    whole = gf.StratifiedBatchSampler(strata, 3 * B, seed=4)
    ranks = [gf.StratifiedBatchSampler(strata, B, seed=4, num_replicas=3, rank=r) for r in range(3)]
    assert {len(r) for r in ranks} == {len(whole)}
    values = torch.randn(60)
    for batch, *parts in zip(whole, *ranks):
        assert [len(p) for p in parts] == [B] * 3
        assert sorted(i for p in parts for i in p) == sorted(batch)
        # the mean of the ranks' means is the global estimate
        local = [(r.weights(torch.tensor(p)) * values[p]).mean() for r, p in zip(ranks, parts)]
        torch.testing.assert_close(
            torch.stack(local).mean(), (whole.weights(torch.tensor(batch)) * values[batch]).mean()
        )


def test_ranks_default_to_the_process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sampler = gf.StratifiedBatchSampler(strata_of(), 8)
        assert (sampler.num_replicas, sampler.rank) == (1, 0)
    finally:
        torch.distributed.destroy_process_group()


# --- weights


def test_weights_take_any_shape_and_follow_the_default_dtype():
    sampler = gf.StratifiedBatchSampler(gf.Strata([0, 0, 0, 1], 2), 2)
    assert sampler.weights(torch.tensor([[0, 3], [1, 2]], dtype=torch.int32)).tolist() == [[1.5, 0.5], [1.5, 1.5]]
    assert sampler.weights(3).item() == 0.5 and sampler.weights(torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert sampler.weights([0]).dtype == torch.float32


def test_weights_refuse_foreign_indices():
    sampler = gf.StratifiedBatchSampler(gf.Strata([0, 0, 0, 1], 2), 2)
    with pytest.raises(IndexError, match="index 4 is outside the 4 examples"):
        sampler.weights(torch.tensor([0, 4]))
    with pytest.raises(IndexError, match="index -1 is outside"):
        sampler.weights(torch.tensor([-1]))
    with pytest.raises(TypeError, match="index must be of integers"):
        sampler.weights(torch.tensor([0.0]))


# --- with_indices


class Fetching(Dataset):
    def __init__(self):
        self.calls = 0

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return {"x": float(i)}

    def __getitems__(self, indices):
        self.calls += 1
        return [self[i] for i in indices]


def test_with_indices_joins_tuples_dicts_and_anything_else():
    pairs = gf.with_indices([("a", 1), ("b", 2)])
    assert pairs[1] == (1, "b", 2) and pairs[-1] == (1, "b", 2) and len(pairs) == 2 and pairs.dataset[0] == ("a", 1)
    assert gf.with_indices([3.5])[0] == (0, 3.5)
    assert gf.with_indices([[1, 2]])[0] == (0, [1, 2])
    assert gf.with_indices([{"x": 3}])[0] == {"index": 0, "x": 3}


def test_with_indices_collates_and_keeps_batched_fetching():
    data = Fetching()
    batches = list(DataLoader(gf.with_indices(data), batch_size=3))
    assert batches[1]["index"].tolist() == [3, 4] and batches[1]["x"].tolist() == [3.0, 4.0]
    assert data.calls == 2
    tensors = torch.utils.data.TensorDataset(torch.arange(4.0), torch.arange(4))
    index, x, y = next(iter(DataLoader(gf.with_indices(tensors), batch_size=4)))
    assert index.tolist() == y.tolist() == x.tolist()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: gf.with_indices(Stream()), TypeError, "map-style"),
        (lambda: gf.with_indices(iter([1])), TypeError, "map-style"),
        (lambda: gf.with_indices([{"index": 1}])[0], ValueError, "already has a key 'index'"),
        (lambda: gf.with_indices([1, 2])[2], IndexError, "index 2 is outside"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 0), ValueError, "batch_size must be at least 1, got 0"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 2.0), TypeError, "batch_size must be an integer"),
        (lambda: gf.StratifiedBatchSampler([0, 1, 2], 2), TypeError, "strata must be gf.Strata, got list"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8).set_strata(None), TypeError, "strata must be gf.Strata"),
        (
            lambda: gf.StratifiedBatchSampler(strata_of(), 8).load_state_dict({}),
            ValueError,
            "state has no .*batch_size",
        ),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8, num_replicas=2.0), TypeError, "num_replicas must be an int"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 61), ValueError, "at most N=60 without replacement"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8, "optimal"), ValueError, "allocation must be one of"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8, "neyman"), ValueError, "needs the strata's variances"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8, seed=-1), ValueError, "seed must be at least 0"),
        (
            lambda: gf.StratifiedBatchSampler(strata_of(), 8, num_replicas=2, rank=2),
            ValueError,
            r"rank must be in 0\.\.1",
        ),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8).predicted_variance(), ValueError, "carry no variances"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8).set_strata(strata_of(9)), ValueError, "same 60 examples"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8).set_epoch(-1), ValueError, "epoch must be at least 0"),
        (lambda: gf.StratifiedBatchSampler(strata_of(), 8).state_dict(9), ValueError, r"must be in 0\.\.8"),
        (
            lambda: gf.StratifiedBatchSampler(strata_of(), 8).load_state_dict(
                gf.StratifiedBatchSampler(strata_of(), 4).state_dict()
            ),
            ValueError,
            "the saved sampler has batch_size=4, this one 8",
        ),
        (
            lambda: gf.StratifiedBatchSampler(gf.Strata([0, 1, 2], 3, variance=[0.0] * 3), 2).predicted_variance(),
            ValueError,
            "depends on the strata's means",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sizes_may_come_from_numpy():
    labels = np.arange(60, dtype=np.int32) % 5
    strata = gf.Strata(labels, labels.max() + 1)
    assert strata.num_clusters == 5 and type(strata.num_clusters) is int
    sampler = gf.StratifiedBatchSampler(strata, np.int64(8), seed=np.int64(3))
    assert list(sampler) == list(gf.StratifiedBatchSampler(strata, 8, seed=3))
    assert {type(value) for value in (sampler.batch_size, sampler.seed)} == {int}
    found = gf.cluster_points(np.random.default_rng(0).normal(size=(30, 2)), np.int64(4), seed=np.int64(1))
    assert found.labels.bincount(minlength=4).sum() == 30


def test_more_examples_than_the_data_set_needs_replacement():
    sampler = gf.StratifiedBatchSampler(strata_of(), 64, replacement=True)
    assert [len(b) for b in sampler] == [64]
