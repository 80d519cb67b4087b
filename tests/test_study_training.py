"""The guard, online strata and SVRG on strata along a trajectory; training with each estimator (R13); speed (R14)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import gradclust_fast as gf
from gradclust_fast.study import Options, Table, Trajectory, Unit, Variant
from gradclust_fast.study import r07_cifar as r07
from gradclust_fast.study import r09_corruption as r09
from gradclust_fast.study import r13_training as r13
from gradclust_fast.study import r14_speed as r14
from gradclust_fast.study import trajectory as along
from gradclust_fast.study.methods import Guarded
from gradclust_fast.study.problems import evaluate, random_features

FEATURES = partial(random_features, N=60, hidden=20, dim=5, teacher=10)


class Killed(BaseException):
    """Not an Exception, like a signal: nothing handles it."""


def tiny(**changes) -> Variant:
    plan = Trajectory(
        problem=FEATURES, steps=60, batch_size=6, lr=0.1, snapshots=(0,), measure=(20, 40), momentum=0.5,
        methods=("SG-B", "SG-2B", "GC exact", "GC online", "GC+SVRG", "GC guarded"),
        monte_carlo=300, monte_carlo_at=(60,), rare=("GC+SVRG",), rare_at=(40, 60),
    )  # fmt: skip
    return Variant("tiny", "guarded", {"data": "as it is", "drop": 30}, replace(plan, **changes))


def table_of(variant: Variant, result: dict) -> Table:
    return Table([{**variant.labels, "seed": 0, "status": result["status"], **r} for r in result["records"]])


def interrupted(monkeypatch, owner, name, variant, options, when):
    """Kills a unit in the call of ``owner.name`` for which ``when`` holds, after a checkpoint, and resumes it."""
    original = getattr(owner, name)

    def killed(run):
        if when(run):
            run.unit.checkpoint(run._state if hasattr(run, "_state") else run.state)
            raise Killed
        return original(run)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            Unit(variant, 0, options).execute()
    return Unit(variant, 0, options).execute()


@pytest.mark.parametrize("at", [7, 35, 50])
def test_guard_and_online_strata_resume_to_identical_results(tmp_path, monkeypatch, at):
    monkeypatch.setattr("gradclust_fast.study.unit.SAVE_EVERY", 0.0)
    monkeypatch.setattr(Guarded, "EVERY", 1)
    variant = tiny()
    whole = Unit(variant, 0, Options(out=tmp_path / "whole")).execute()
    parts = interrupted(
        monkeypatch, along.Run, "train_step", variant, Options(out=tmp_path / "parts"), lambda run: run.step == at
    )
    assert parts["records"] == whole["records"]
    table = table_of(variant, whole)
    assert any(r.get("guard") == "snapshot" for r in table) and r07.snapshots(table) >= 1
    assert {r["step"] for r in table.where(estimator="GC+SVRG")} == {40, 60}  # a rare method
    for r in table.where(lambda r: r.get("mc_variance") is not None):
        assert abs(r["mc_variance"] - r["variance"]) <= 4 * r["mc_variance_error"] + 1e-12
    assert table.where(estimator="GC exact", age=0).column("ratio")[0] < 0.9
    # the rows that show it evaluate and draw such a table
    assert {c.passed for c in r07.guarded_checks(table)} <= {True, False, None}
    assert r09.checks(table) and r09.draw(table) is not None


@pytest.mark.parametrize("estimator", r13.ESTIMATORS)
def test_training_resumes_to_identical_losses_and_counts_what_it_costs(tmp_path, monkeypatch, estimator):
    monkeypatch.setattr("gradclust_fast.study.unit.SAVE_EVERY", 0.0)
    plan = r13.Training(FEATURES, estimator, examples=240, batch_size=6, lr=0.5, momentum=0.5, every=120, look=60)
    variant = Variant("tiny", estimator, {"estimator": estimator}, plan)
    whole = Unit(variant, 0, Options(out=tmp_path / "whole")).execute()
    parts = interrupted(
        monkeypatch, r13.Session, "train_step", variant, Options(out=tmp_path / "parts"), lambda run: run.step == 15
    )
    without_time = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in each["records"]] for each in (whole, parts)
    ]
    assert without_time[0] == without_time[1]
    last = whole["records"][-1]
    snapshots = {"SVRG": 2 * 60, "GC exact": 2 * 60, "GC factored": 2 * 20 * 60}.get(estimator, 0)
    assert last["gradients"] == 240 * (2 if estimator == "SVRG" else 1) + snapshots
    assert last["examples"] == 240 and last["step"] == (20 if estimator == "SG-2B" else 40)
    assert last["train_loss"] < whole["records"][0]["train_loss"] and last["seconds"] > 0


def test_the_first_step_of_training_is_the_estimators_own():
    unit = Unit(Variant("tiny", "x", {}, lambda unit: None), 0, Options())

    def first(estimator):
        plan = r13.Training(FEATURES, estimator, examples=6, batch_size=6, lr=1.0, momentum=0.0, every=6, look=6)
        session = r13.Session(plan, unit)
        before = [p.detach().clone() for p in session.model.parameters()]
        session.snapshot()
        session.train_step()
        return session, [b - p.detach() for b, p in zip(before, session.model.parameters())]

    session, moved = first("SVRG")
    model = FEATURES(unit).model  # at its own snapshot SVRG's step is the full gradient
    x, y = session.problem.train.tensors
    full = torch.autograd.grad(session.problem.loss(model(x), y).mean(), list(model.parameters()))
    for a, b in zip(moved, full):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    session, moved = first("GC exact")
    session.sampler.set_epoch(0)
    index = torch.tensor(next(iter(session.sampler)))
    losses = session.problem.loss(model(x[index]), y[index])
    batch = torch.autograd.grad((session.sampler.weights(index) * losses).mean(), list(model.parameters()))
    for a, b in zip(moved, batch):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_losses_are_compared_at_equal_examples_and_equal_time():
    def run(name, seconds, loss):
        return [
            {"estimator": name, "seed": 0, "examples": 100 * i, "seconds": seconds * i, "train_loss": loss(i)}
            for i in range(5)
        ]

    table = Table(run("SG-B", 1.0, lambda i: 8.0 - i) + run("SVRG", 2.0, lambda i: 8.0 - 2 * i))
    assert r13.relative(table, "SVRG", "examples", "train_loss") == 0 / 4
    assert r13.relative(table, "SVRG", "seconds", "train_loss") == pytest.approx(4 / 4)  # SVRG after 4 s: step 2


def test_rank_correlations_and_their_interval():
    assert r14.rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert r14.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert r14.rank_correlation([1, 2, 2, 4], [1, 2, 2, 4]) == pytest.approx(1)
    assert r14.rank_correlation([1.0, 2, 3, 4, 5], [2.0, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert r14.rank_correlation([1, 2], [3, 3]) != r14.rank_correlation([1, 2], [3, 3])  # NaN
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(24, generator=generator).tolist()
    records = [
        {"examples": 100, "lr": i, "batch": 1, "seed": 0, "speed": i, "normalized_variance": -i, "variance": noise[i]}
        for i in range(24)
    ]
    nv, v = r14.correlations(records)
    assert nv == pytest.approx(-1) and abs(v) < 0.5
    low, high, _ = r14.interval(records, draws=200)
    assert 0 < low < 1 - abs(v) < high and r14.verdict(low, high) == "confirmed"
    swapped = [{**r, "variance": r["normalized_variance"], "normalized_variance": r["variance"]} for r in records]
    assert r14.verdict(*r14.interval(swapped, draws=200)[:2]) == "refuted"
    assert r14.verdict(-0.1, 0.1) == "inconclusive"


def test_speed_and_variances_are_those_of_the_run(tmp_path):
    plan = r14.Speed(FEATURES, lr=0.5, batch_size=4, momentum=0.0, at=(80, 200))
    unit = Unit(Variant("tiny", "speed", {}, plan), 0, Options(out=tmp_path))
    records = unit.execute()["records"]
    assert [r["examples"] for r in records] == [80, 200]
    # the same steps by hand
    problem = FEATURES(unit)
    optimizer = torch.optim.SGD(problem.model.parameters(), 0.5)
    x, y = problem.train.tensors
    losses, stats = {}, {}
    for step in range(1, 72):
        rng = np.random.Generator(np.random.PCG64([0, step - 1]))
        index = torch.from_numpy(rng.integers(60, size=4))
        optimizer.zero_grad()
        problem.loss(problem.model(x[index]), y[index]).mean().backward()
        optimizer.step()
        losses[step] = evaluate(problem.model, problem, problem.train, torch.device("cpu"))[0]
        if step in (20, 50):
            stats[step * 4] = gf.gradient_stats(problem.model, problem.train, problem.loss)
    for r, (before, after) in zip(records, ((14, 28), (35, 71))):
        expected = torch.log(torch.tensor(losses[before] / losses[after])) / torch.log(torch.tensor(after / before))
        assert r["speed"] == pytest.approx(float(expected), rel=1e-4)
        own = stats[r["examples"]]
        assert r["variance"] == pytest.approx(own.variance / 4, rel=1e-6)
        assert r["normalized_variance"] == pytest.approx(own.normalized_variance(4), rel=1e-6)


@pytest.mark.parametrize("row", ["R7", "R8", "R9", "R11", "R13", "R14"])
def test_rows_have_sizes_variants_and_data_of_their_own(row):
    from gradclust_fast.study import all_rows

    own = all_rows()[row]
    for scale in ("small", "paper"):
        variants = own.variants(scale)
        assert len({(v.family, v.name) for v in variants}) == len(variants) and own.sizes[scale]
        assert all(v.settings() for v in variants)
    assert {v.name for v in all_rows()["R7"].variants("small")} <= {v.name for v in all_rows()["R9"].variants("small")}
