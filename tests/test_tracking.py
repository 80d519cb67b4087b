from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradclust_fast as gf
from gradclust_fast.watching import idle


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))


def batch(t, B=12):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(B, 5, generator=generator), torch.randint(0, 3, (B,), generator=generator)


def train(model, tracker, steps, inside=False, momentum=0.5):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    for t in range(steps):
        x, y = batch(t)
        optimizer.zero_grad()
        if tracker is None:
            F.cross_entropy(model(x), y).backward()
        elif inside:
            with tracker.step():
                F.cross_entropy(model(x), y).backward()
        else:
            loss = F.cross_entropy(model(x), y)
            with tracker.step():
                loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("inside", [False, True])
def test_tracked_steps_match_per_example_gradients_and_change_nothing(inside):
    model = make()
    tracker = gf.VarianceTracker(model, every=3)
    trained = train(model, tracker, 7, inside)
    plain = make()
    for t in range(7):
        if t % 3 == 0:
            x, y = batch(t)
            rows = []
            for i in range(12):
                grads = torch.autograd.grad(
                    F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]), list(plain.parameters())
                )
                rows.append(torch.cat([g.flatten() for g in grads]).double())
            G = torch.stack(rows)
            entry = tracker.history[t // 3]
            assert entry.step == t and entry.batch_size == 12
            assert entry.mean_sq_norm == pytest.approx(float(G.square().sum(1).mean()), rel=1e-4)
            trace = float((G - G.mean(0)).square().sum() / 11)
            assert entry.variance == pytest.approx(trace, rel=1e-4)
            assert entry.gradient_sqnorm == pytest.approx(float(G.mean(0).square().sum()) - trace / 12, rel=1e-3)
        fresh = make()
        train(fresh, None, t + 1)
        plain = fresh
    assert len(tracker.history) == 3 and tracker.steps == 7
    assert all(torch.equal(a, b) for a, b in zip(trained, plain.parameters()))


def test_numerator_and_denominator_are_averaged_separately():
    model = make()
    tracker = gf.VarianceTracker(model, every=1)
    assert math.isnan(tracker.noise_scale)
    train(model, tracker, 5)
    variance = sum(entry.variance for entry in tracker.history)
    assert tracker.noise_scale == pytest.approx(variance / sum(entry.gradient_sqnorm for entry in tracker.history))
    tracker.close()
    recent = gf.VarianceTracker(model, every=1, decay=0.0)
    train(model, recent, 3)
    assert recent.noise_scale == pytest.approx(recent.history[-1].noise_scale)


def test_untracked_steps_open_no_record():
    model = make()
    tracker = gf.VarianceTracker(model, every=2)
    seen = []
    for t in range(4):
        with tracker.step() as rec:
            F.cross_entropy(model(batch(t)[0]), batch(t)[1]).backward()
        seen.append(rec is not None)
        if t == 0:  # the next step is not measured, so nothing watches its forward
            model(batch(1)[0])
            with gf.record(model):
                F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    assert seen == [True, False, True, False]


def test_writers():
    class Board:
        def __init__(self):
            self.rows = []

        def add_scalar(self, tag, value, step):
            self.rows.append((tag, value, step))

    calls, board = [], Board()
    for writer, rows in ((board, board.rows), (lambda *row: calls.append(row), calls)):
        model = make()
        tracker = gf.VarianceTracker(model, every=2, writer=writer)
        train(model, tracker, 3)
        assert [(tag, step) for tag, _, step in rows] == [
            (f"gradient/{name}", step)
            for step in (0, 2)
            for name in ("mean_sq_norm", "variance", "sq_norm", "noise_scale")
        ]
        assert rows[1][1] == tracker.history[0].variance and rows[-1][1] == tracker.noise_scale


def test_copies_of_the_model_are_not_tracked():
    model = make()
    tracker = gf.VarianceTracker(model, every=1, writer=lambda *row: None)
    snapshot = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    for other in (snapshot, loaded):
        F.cross_entropy(other(batch(0)[0]), batch(0)[1]).backward()
    assert tracker._record is None and not tracker.history
    train(model, tracker, 1)
    assert len(tracker.history) == 1


def test_validation_and_measuring_between_steps():
    model = make()
    tracker = gf.VarianceTracker(model, every=1)
    data = torch.utils.data.TensorDataset(*batch(9, 20))
    for t in range(3):
        model.eval()
        with torch.no_grad():
            model(batch(5)[0])
        gf.gradient_stats(model, data, lambda o, y: F.cross_entropy(o, y, reduction="none"))
        model.train()
        train(model, tracker, 1)
        assert len(tracker.history) == t + 1


def test_a_failed_step_leaves_nothing_open():
    model = make()
    tracker = gf.VarianceTracker(model, every=1)
    with pytest.raises(ZeroDivisionError), tracker.step():
        model(batch(0)[0])
        raise ZeroDivisionError
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 99))  # the forward itself fails while it is watched
    assert not torch.overrides._get_current_function_mode_stack()
    train(model, tracker, 1)
    assert tracker.steps == 1 and len(tracker.history) == 1
    model(batch(0)[0])
    tracker.close()
    with gf.record(model):
        F.cross_entropy(model(batch(1)[0]), batch(1)[1]).backward()
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(not p._backward_hooks for p in model.parameters())


def test_single_examples_are_kept_out_of_the_average():
    model = make()
    tracker = gf.VarianceTracker(model, every=1)
    train(model, tracker, 1)
    before = tracker.noise_scale
    model.zero_grad()
    with tracker.step():
        F.cross_entropy(model(batch(3, 1)[0]), batch(3, 1)[1]).backward()
    assert math.isnan(tracker.history[1].variance) and tracker.history[1].mean_sq_norm > 0
    assert tracker.noise_scale == before


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.0}, TypeError, "every must be an integer"),
        ({"writer": 3}, TypeError, "writer must have add_scalar"),
        ({"decay": 1.0}, ValueError, "decay must be in"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction"),
        ({"parameters": "nothing.*"}, ValueError, "nothing"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    model = make()
    with pytest.raises(error, match=message):
        gf.VarianceTracker(model, **options)
    assert not model._forward_hooks


def test_a_backward_whose_forward_was_not_seen_raises():
    model = make()
    tracker = gf.VarianceTracker(model, every=1)
    loss = F.cross_entropy(nn.Sequential.forward(model, batch(0)[0]), batch(0)[1])  # not through model(...)
    with pytest.raises((RuntimeError, NotImplementedError), match="inside"), tracker.step():
        loss.backward()


def test_a_forward_that_no_step_follows_blocks_no_other_record_and_leaves_no_rows():
    model = make()
    tracker = gf.VarianceTracker(model, every=1)
    x, y = batch(0, B=6)
    F.cross_entropy(model(x), y).backward()  # ordinary training without step()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    assert rec.sq_norms.shape == (6,)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
    loss = F.cross_entropy(model(x), y)
    with tracker.step() as tracked:
        loss.backward()
    assert tracked.sq_norms.shape == (6,)  # of this step alone
    tracker.close()
    assert not idle
