"""``StratifiedBatchSampler(refresh="auto")``: the estimate from recorded batches, the decisions, resuming."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import gradclust_fast as gf
from gradclust_fast.guard import Guard, one_stratum

WHOLE = gf.Sketch(sides=(1000, 1000), reduce=False)  # keeps every coordinate


def points_of(N=60, K=6, R=5, spread=0.5, seed=0):
    """[N, R] points around K centres, and the strata of the centres."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % K
    centres = torch.randn(K, R, generator=generator, dtype=torch.float64) + 1
    return centres[labels] + spread * torch.randn(N, R, generator=generator, dtype=torch.float64), labels


class Fixed(nn.Module):
    """A model whose per-example gradient is the example itself: the loss is linear in the weight."""

    def __init__(self, R=5):
        super().__init__()
        self.weight = nn.Linear(R, 1, bias=False).double()

    def forward(self, x):
        return self.weight(x).squeeze(1)


def observed(sampler, points, epochs=1, model=None):
    """Feeds every batch of some epochs; returns the ratios."""
    model = Fixed(points.shape[1]) if model is None else model
    ratios = []
    for _ in range(epochs):
        for index in sampler:
            index = torch.tensor(index)
            with gf.record(model, sketch=WHOLE) as rec:
                (sampler.weights(index).double() * model(points[index])).mean().backward()
            model.zero_grad()
            ratios.append(sampler.observe(rec, index))
    return ratios


def truth(points, labels, K, batch_size, **options):
    strata = gf.Strata.from_points(points, labels, K)
    stratified = gf.StratifiedBatchSampler(strata, batch_size, **options).predicted_variance()
    N = len(points)
    sigma2 = float((points - points.mean(0)).square().sum(1).mean())
    factor = 1 / batch_size if options.get("replacement") else (N - batch_size) / (N - 1) / batch_size
    return stratified, sigma2 * factor


@pytest.mark.parametrize(
    ("batch_size", "sizes", "options"),
    [
        (6, None, {}),  # one draw of every stratum: differences between batches
        (13, None, {}),  # two or three draws: sample variances within the batch
        (9, None, {"replacement": True}),
        (12, [30, 15, 8, 4, 2, 1], {"allocation": "proportional"}),  # both kinds, and a stratum of one
        (8, [30, 15, 8, 4, 2, 1], {}),
    ],
)
def test_both_variances_are_unbiased(batch_size, sizes, options):
    points, labels = points_of()
    if sizes:
        labels = torch.repeat_interleave(torch.arange(6), torch.tensor(sizes))
    strata = gf.Strata(labels, 6)
    expected = truth(points, labels, 6, batch_size, **options)
    sampler = gf.StratifiedBatchSampler(strata, batch_size, seed=3, **options)
    plan = sampler._plan
    found = []
    last = Guard(6)
    for epoch in range(300):
        sampler.set_epoch(epoch)
        index = torch.tensor(next(iter(sampler)))
        last.batches, last.stratified, last.uniform = 0, 0.0, 0.0  # one batch's own figures
        last.observe(plan, points[index], index, sampler.replacement)
        if last.batches:
            found.append((last.stratified, last.uniform))
    assert len(found) >= 299
    mean = torch.tensor(found).mean(0)
    error = torch.tensor(found).std(0) / len(found) ** 0.5
    for i in range(2):
        assert abs(float(mean[i]) - expected[i]) <= 4 * float(error[i]) + 1e-12
        assert float(error[i]) < 0.12 * expected[i]


def test_the_ratio_of_recorded_training_steps_is_the_true_one():
    points, labels = points_of(600, 6)
    sampler = gf.StratifiedBatchSampler(gf.Strata(labels, 6), 12, refresh="auto")
    ratios = observed(sampler, points, 2)
    stratified, uniform = truth(points, labels, 6, 12)
    assert all(math.isnan(r) for r in ratios[:4]) and math.isfinite(ratios[6])
    late = ratios[20:]
    assert sum(late) / len(late) == pytest.approx(stratified / uniform, rel=0.15)
    assert sampler.variance_ratio == ratios[-1] and not sampler.needs_snapshot and not sampler.uniform


def test_a_moving_stratum_mean_counts_as_variance():
    points, labels = points_of(spread=0.0)
    plan = gf.StratifiedBatchSampler(gf.Strata(labels, 6), 6)._plan
    guard = Guard(6)
    for t in range(8):
        guard.observe(plan, points[:6] * (1 + 0.1 * t), torch.arange(6), False)
    assert guard.ratio > 0


def test_old_strata_are_asked_for_anew_and_uniform_batches_come_in_time():
    points, labels = points_of(600, 6, spread=0.3)
    strata = gf.Strata.from_points(points, labels, 6)
    sampler = gf.StratifiedBatchSampler(strata, 12, refresh="auto")
    observed(sampler, points)
    assert not sampler.needs_snapshot
    old = points
    # the gradients of a third of the examples become those of others: strata are half as good
    mixed = old.clone()
    mixed[:200] = old[torch.randperm(200, generator=torch.Generator().manual_seed(1))]
    observed(sampler, mixed)
    assert sampler.needs_snapshot and not sampler.uniform
    # and now of all: strata are worth nothing
    shuffled = old[torch.randperm(600, generator=torch.Generator().manual_seed(2))]
    observed(sampler, shuffled)
    assert sampler.variance_ratio >= 0.8 and not sampler.uniform  # this epoch's batches stay what they are
    batch = next(iter(sampler))
    assert sampler.uniform and sampler.needs_snapshot and sampler.variance_ratio == 1.0
    assert sampler.weights(torch.tensor(batch)).tolist() == [1.0] * 12 and len(set(batch)) == 12
    sigma2 = float((points - points.mean(0)).square().sum(1).mean())  # of the strata's snapshot
    assert sampler.predicted_variance() == pytest.approx(sigma2 / 12 * (600 - 12) / 599)
    observed(sampler, shuffled)  # uniform batches are drawn and observed as well
    assert sampler.uniform
    fresh = gf.cluster_points(shuffled, 6).labels
    sampler.set_strata(gf.Strata.from_points(shuffled, fresh, 6))
    assert not sampler.needs_snapshot
    observed(sampler, shuffled)
    assert not sampler.uniform and sampler.variance_ratio < 0.5 and not sampler.needs_snapshot


def test_strata_that_never_helped_are_not_asked_for_again():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(600, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(6, (600,), generator=generator)
    sampler = gf.StratifiedBatchSampler(gf.Strata(labels, 6), 12, refresh="auto", uniform_above=1.0)
    ratios = observed(sampler, points)
    assert 0.8 < sum(ratios[10:]) / len(ratios[10:]) < 1.25
    quiet = [r for r in ratios[10:] if r < 1.0]
    assert quiet  # near 1, above refresh_above, and not worth a snapshot
    sampler._guard.fresh = 0.9
    sampler._guard.stratified = 0.9 * sampler._guard.uniform
    assert not sampler.needs_snapshot


def test_batches_are_a_function_of_seed_epoch_and_batch_and_resume():
    points, labels = points_of(600, 6)
    strata = gf.Strata(labels, 6)
    plain = gf.StratifiedBatchSampler(strata, 12, seed=5)
    watched = gf.StratifiedBatchSampler(strata, 12, seed=5, refresh="auto")
    model = Fixed()

    def step(sampler, index, data):
        index = torch.tensor(index)
        with gf.record(model, sketch=WHOLE) as rec:
            (sampler.weights(index).double() * model(data[index])).mean().backward()
        model.zero_grad()
        return sampler.observe(rec, index)

    assert list(plain) == list(watched)
    shuffled = points[torch.randperm(600, generator=torch.Generator().manual_seed(2))]
    ratios, batches, state = [], [], None
    for epoch in range(3):  # uniform from the second one on
        for t, index in enumerate(watched):
            batches.append(index)
            ratios.append(step(watched, index, shuffled))
            if (epoch, t) in ((0, 17), (1, 30)):
                state = copy.deepcopy(watched.state_dict(batches_done=t + 1))
                resumed_from = len(batches)
                other = gf.StratifiedBatchSampler(strata, 12, refresh="auto")
                other.load_state_dict(state)
                rest = []
                for _ in range(2):
                    for again in other:
                        rest.append((again, step(other, again, shuffled)))
                saved = resumed_from, rest
                if epoch == 0:
                    first = saved
    assert watched.uniform
    for start, rest in (first, saved):
        for (index, ratio), true_index, true_ratio in zip(rest, batches[start:], ratios[start:]):
            assert index == true_index and (ratio == true_ratio or (math.isnan(ratio) and math.isnan(true_ratio)))


def test_one_stratum_has_the_total_variance():
    points, labels = points_of()
    whole = one_stratum(gf.Strata.from_points(points, labels, 6))
    direct = gf.Strata.from_points(points, torch.zeros(60, dtype=torch.int64), 1)
    torch.testing.assert_close(whole.variance, direct.variance)
    torch.testing.assert_close(whole.means, direct.means)
    assert one_stratum(gf.Strata(labels, 6)).variance is None


def test_bad_observations_are_named_and_change_nothing():
    points, labels = points_of()
    strata = gf.Strata(labels, 6)
    sampler = gf.StratifiedBatchSampler(strata, 6, refresh="auto")
    model, index = Fixed(), torch.arange(6)

    def record(x, **options):
        with gf.record(model, **options) as rec:
            model(x).mean().backward()
        model.zero_grad()
        return rec

    good = record(points[:6], sketch=WHOLE)
    with pytest.raises(ValueError, match="refresh='auto'"):
        gf.StratifiedBatchSampler(strata, 6).observe(good, index)
    with pytest.raises(ValueError, match="no sketches"):
        sampler.observe(record(points[:6]), index)
    with pytest.raises(ValueError, match=r"index must be \[6\]"):
        sampler.observe(good, index[:5])
    with pytest.raises(IndexError, match="index 60"):
        sampler.observe(good, index + 55)
    with pytest.raises(ValueError, match="no example of stratum 1"):
        sampler.observe(good, torch.tensor([0, 6, 12, 18, 24, 30]))  # all of stratum 0
    broken = points[:6].clone()
    broken[2] = float("inf")
    with pytest.raises(ValueError, match="index 2"):
        sampler.observe(record(broken, sketch=WHOLE), index)
    with pytest.raises(TypeError, match="rec must be"):
        sampler.observe(None, index)
    assert sampler._guard.batches == 0 and sampler._guard.last is None
    for options, message in [
        ({"refresh": "always"}, "'auto' or None"),
        ({"refresh": "auto", "batch_size": 3}, "meet every stratum"),
        ({"refresh": "auto", "uniform_above": 0}, "uniform_above"),
        ({"refresh": "auto", "refresh_above": True}, "refresh_above"),
        ({"refresh": "auto", "num_replicas": 2, "rank": 0}, ""),
    ]:
        if message:
            with pytest.raises(ValueError, match=message):
                gf.StratifiedBatchSampler(**{"strata": strata, "batch_size": 6, **options})
        else:
            with pytest.raises(ValueError, match="group="):
                gf.StratifiedBatchSampler(strata, 6, **options).observe(good, index)
    with pytest.raises(ValueError, match="refresh='auto'"):
        gf.StratifiedBatchSampler(strata, 6).load_state_dict(sampler.state_dict())
