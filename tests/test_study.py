from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from gradclust_fast._passes import batches
from gradclust_fast.study import Options, Row, Table, Trajectory, Unit, Variant, all_rows, check, run_rows
from gradclust_fast.study.command import main
from gradclust_fast.study.problems import linear_regression, random_features


def tiny(lr: float = 1e-3, steps: int = 30, **changes) -> Variant:
    plan = Trajectory(
        problem=partial(random_features, N=60, hidden=20, dim=5, teacher=10), steps=steps, batch_size=4, lr=lr,
        snapshots=(0, 10, 20), measure=(5, 15), momentum=0.5, monte_carlo=4, monte_carlo_at=(0,),
    )  # fmt: skip
    return Variant("tiny", f"lr={lr}", {"lr": lr}, replace(plan, **changes))


def row_of(*variants: Variant, id: str = "R99") -> Row:
    return Row(
        id=id, title="tiny", shows="nothing", variants=lambda scale: list(variants), checks=lambda table: [],
        draw=lambda table: None, sizes={"small": "tiny", "paper": "tiny"}, paper="nothing",
    )  # fmt: skip


class Killed(BaseException):
    """Not an Exception, like a signal: nothing handles it."""


@pytest.mark.parametrize("at", [3, 10, 17, 20, 29])
def test_an_interrupted_unit_resumes_to_identical_results(tmp_path, monkeypatch, at):
    monkeypatch.setattr("gradclust_fast.study.unit.SAVE_EVERY", 0.0)
    variant = tiny()
    whole = Unit(variant, 1, Options(out=tmp_path / "whole")).execute()
    options = Options(out=tmp_path / "parts")
    from gradclust_fast.study import trajectory

    original = trajectory.Run.train_step

    def killed(run):
        if run.step == at:
            run.unit.checkpoint(run._state)
            raise Killed
        return original(run)

    with monkeypatch.context() as patch:
        patch.setattr(trajectory.Run, "train_step", killed)
        with pytest.raises(Killed):
            Unit(variant, 1, options).execute()
    unit = Unit(variant, 1, options)
    assert unit.result() is None and unit.partial.is_file()
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(trajectory.Run, "train_step", lambda run: (steps.append(run.step), original(run))[1])
        parts = unit.execute()
    assert steps[0] == at  # it went on, rather than beginning anew
    assert parts["records"] == whole["records"]
    assert not unit.partial.exists()
    assert json.loads(unit.path.read_text())["records"] == json.loads(json.dumps(whole["records"]))


def test_a_snapshot_step_is_measured_with_the_old_strata_and_with_the_new_ones(tmp_path):
    result = Unit(tiny(), 0, Options(out=tmp_path)).execute()
    pairs = [(r["step"], r["age"]) for r in result["records"] if r["estimator"] == "GC exact"]
    assert pairs == [(0, 0), (5, 5), (10, 10), (10, 0), (15, 5), (20, 10), (20, 0), (30, 10)]
    svrg = [r["variance"] for r in result["records"] if r["estimator"] == "SVRG" and r["age"] == 0]
    assert max(svrg) < 1e-12
    drawn = [r for r in result["records"] if r["mc_variance"] is not None]
    assert {r["step"] for r in drawn} == {0}


def test_a_diverging_trajectory_is_reported_and_left_out(tmp_path, capsys):
    explosive = partial(linear_regression, N=40, dim=30, offset=6.0, scale=0.1)
    bad, good = tiny(lr=1e-3), tiny(lr=1e-4)
    bad = replace(bad, run=replace(bad.run, problem=explosive, lr=10.0, monte_carlo=0))
    row = row_of(bad, good)
    assert run_rows([row], Options(out=tmp_path), [0, 1]) == 0
    assert "DIVERGED: the training loss at step 5 is inf" in capsys.readouterr().out
    table = Table.read(tmp_path / "r99.csv")
    assert table.distinct("lr") == [1e-4]
    assert {r["lr"] for r in table.everything} == {1e-3, 1e-4}
    about = json.loads((tmp_path / "r99.json").read_text())
    assert [u["status"] for u in about["units"]] == ["diverged", "diverged", "finished", "finished"]


def test_finished_units_are_kept_and_changed_ones_measured_anew(tmp_path, capsys):
    options = Options(out=tmp_path)
    run_rows([row_of(tiny())], options, [0])
    path = Unit(tiny(), 0, options).path
    before = path.stat().st_mtime_ns
    run_rows([row_of(tiny()), row_of(tiny(), id="R98")], options, [0])  # another row shares the unit
    assert path.stat().st_mtime_ns == before
    assert (tmp_path / "r98.csv").read_text() == (tmp_path / "r99.csv").read_text()
    run_rows([row_of(tiny(momentum=0.9))], options, [0])
    assert path.stat().st_mtime_ns != before


def test_a_failing_unit_does_not_stop_the_others(tmp_path, capsys):
    def broken(unit):
        raise RuntimeError("no such thing")

    row = row_of(Variant("tiny", "broken", {"lr": 0}, broken), tiny())
    assert run_rows([row], Options(out=tmp_path), [0]) == 1
    assert "no such thing" in capsys.readouterr().out
    assert len(Table.read(tmp_path / "r99.csv")) > 0


def test_checks_need_finite_values_within_the_bounds():
    assert check("a", "b", [0.1, 0.2], below=0.16).passed is True
    assert check("a", "b", [0.1, 0.3], below=0.15).passed is False
    assert check("a", "b", [0.5], below=0.75, above=0.5, strict=True).passed is False
    assert check("a", "b", [float("nan")], below=1).passed is False
    assert check("a", "b", [], below=1).passed is None
    assert check("a", "b", [1.0]).passed is None


def test_rows_are_listed_with_both_scales(capsys):
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for row in all_rows().values():
        assert f"{row.id:4} {row.title}" in text
        for scale in ("small", "paper"):
            assert row.sizes[scale] in text
            names = [(v.family, v.name) for v in row.variants(scale)]
            assert len(set(names)) == len(names) > 0
    with pytest.raises(SystemExit, match="no row R77"):
        main(["run", "R77"])


@pytest.mark.parametrize("groups", [None, [[3, 1], [0], [4, 2, 5, 6]]])
def test_tensors_are_batched_as_a_loader_would(groups):
    whole = TensorDataset(torch.randn(7, 3), torch.arange(7))
    fast = list(batches(whole, batch_size=3, groups=groups))
    slow = list(batches(Subset(whole, range(7)), batch_size=3, groups=groups))
    assert len(fast) == len(slow)
    for (index, batch), (other, expected) in zip(fast, slow):
        assert type(batch) is type(expected) and torch.equal(index, other)
        assert all(map(torch.equal, batch, expected))
