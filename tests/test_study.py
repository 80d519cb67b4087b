from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from test_data import write_mnist
from torch.utils.data import Subset, TensorDataset

from gradclust_fast._passes import batches
from gradclust_fast.study import Options, Row, Table, Trajectory, Unit, Variant, all_rows, check, run_rows
from gradclust_fast.study import r10_clusterability as r10
from gradclust_fast.study import r12_monte_carlo as r12
from gradclust_fast.study.command import main
from gradclust_fast.study.figures import trajectory_figure
from gradclust_fast.study.problems import (
    classifier,
    corrupted,
    duplicated,
    imbalanced,
    linear_regression,
    random_features,
)
from gradclust_fast.study.progress import display
from gradclust_fast.study.report import cross_check

needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn")
ROOT = Path(__file__).resolve().parents[1]


def tiny(lr: float = 1e-3, steps: int = 30, **changes) -> Variant:
    plan = Trajectory(
        problem=partial(random_features, N=60, hidden=20, dim=5, teacher=10), steps=steps, batch_size=4, lr=lr,
        snapshots=(0, 10, 20), measure=(5, 15), momentum=0.5, monte_carlo=4, monte_carlo_at=(0,), fit_batch=30,
    )  # fmt: skip
    return Variant("tiny", f"lr={lr}", {"lr": lr}, replace(plan, **changes))


def row_of(*variants: Variant, id: str = "R99") -> Row:
    return Row(
        id=id, title="tiny", shows="nothing", variants=lambda scale: list(variants), checks=lambda table: [],
        draw=lambda table: None, sizes={"small": "tiny", "paper": "tiny"}, paper="nothing",
    )  # fmt: skip


class Killed(BaseException):
    """Not an Exception, like a signal: nothing handles it."""


@pytest.mark.parametrize("at", [3, 10, 29])
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


def custom(name: str) -> Variant:
    """A small variant of a row that measures by itself."""
    if name == "R10":
        plan = r10.variants("small")[0].run.keywords["plan"]
        sizes = {"random": (1, 4), "exact": (1, 2, 4), "factored": ()}
        return Variant("tiny", name, {}, partial(r10.measure, plan=replace(plan, steps=20), sizes=sizes))
    plan = replace(r12.variant("small").run.keywords["plan"], steps=20)
    return Variant("tiny", name, {}, partial(r12.measure, plan=plan, draws=10, trials=3))


@needs_digits
@pytest.mark.parametrize("name", ["R10", "R12"])
def test_rows_that_measure_by_themselves_resume_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr("gradclust_fast.study.unit.SAVE_EVERY", 0.0)
    variant = custom(name)
    whole = Unit(variant, 0, Options(out=tmp_path / "whole")).execute()
    texts: list[str] = []

    def killed(fraction, text):
        texts.append(text)
        if len(texts) == 3:
            raise Killed

    options = Options(out=tmp_path / "parts")
    with pytest.raises(Killed):
        Unit(variant, 0, options, killed).execute()
    assert Unit(variant, 0, options).partial.is_file()
    again: list[str] = []
    parts = Unit(variant, 0, options, lambda fraction, text: again.append(text)).execute()
    assert texts[0] not in again  # what was recorded is not measured anew
    assert json.dumps(parts["records"]) == json.dumps(whole["records"])


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
    run_rows([row_of(tiny())], options, [1])
    assert Table.read(tmp_path / "r99.csv").seeds == [0, 1]  # seed 0 is not lost
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
    assert check("a", "b", [], below=1).verdict == "undecided"
    assert check("a", "b", [0.0] * 3, below=1).verdict == "pass" and check("a", "b", [], below=None).verdict == "–"
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


KILLABLE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import gradclust_fast.study.unit as unit
import gradclust_fast.study.runner as runner
from test_study import row_of, tiny
unit.SAVE_EVERY = 0.0
rows = {{"R99": row_of(tiny(steps=1000), tiny(lr=1e-2, steps=40))}}
runner.all_rows = lambda: rows
if __name__ == "__main__":
    runner.run_rows(list(rows.values()), unit.Options(out=Path({out!r})), [0], jobs=2)
"""


def test_a_killed_run_leaves_no_workers_and_resumes_to_the_same_table(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLABLE.format(tests=str(ROOT / "tests"), out=str(tmp_path / "out")))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.DEVNULL)
    options = Options(out=tmp_path / "out")
    long, short = tiny(steps=1000), tiny(lr=1e-2, steps=40)
    first, second = Unit(long, 0, options), Unit(short, 0, options)
    deadline = time.monotonic() + 120
    while not (first.partial.is_file() and second.path.is_file()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert first.partial.is_file() and not first.path.exists()
    still = [first.partial.stat().st_mtime_ns, -1]
    while still[-1] != still[-2] and time.monotonic() < deadline:  # its workers notice at their next sign of life
        time.sleep(1.0)
        still.append(first.partial.stat().st_mtime_ns)
    assert not first.path.exists()
    finished = second.path.stat().st_mtime_ns
    assert run_rows([row_of(long, short)], options, [0]) == 0
    assert second.path.stat().st_mtime_ns == finished
    run_rows([row_of(long, short)], Options(out=tmp_path / "whole"), [0])
    assert (tmp_path / "out" / "r99.csv").read_text() == (tmp_path / "whole" / "r99.csv").read_text()


def test_missing_or_damaged_data_is_named_with_where_and_how_to_get_it(tmp_path, capsys):
    assert main(["run", "R6", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "R6 is not run: MNIST: train-images-idx3-ubyte[.gz] was found neither in" in message
    assert "torchvision.datasets.MNIST" in message
    for split in ("train", "test"):
        write_mnist(tmp_path, split, count=20)
    damaged = next(tmp_path.glob("t10k-labels*"))
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert main(["run", "R6", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert damaged.name in message and ("damaged" in message or "promises" in message)
    assert main(["run", "R1", "--data", "nowhere:data", "--out", str(tmp_path / "out")]) == 1
    assert "R1 is not run: it has a model and data of its own" in capsys.readouterr().err


def test_a_model_and_data_of_ones_own_take_the_place_of_the_rows(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def data():\n"
        "    torch.manual_seed(0)\n"
        "    return [(torch.randn(3), i % 2) for i in range(40)], [(torch.randn(3), i % 2) for i in range(10)]\n"
        "def model():\n"
        "    return torch.nn.Linear(3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = Options(data="mine:data", model="mine:model", out=tmp_path / "out")
    variant = tiny()
    variant = replace(variant, run=replace(variant.run, problem=partial(classifier, name="mnist", model=None)))
    result = Unit(variant, 0, options).execute()
    assert result["status"] == "finished"
    assert all(0 <= r["accuracy"] <= 1 for r in result["records"])
    other = Unit(variant, 0, Options(data="mine:data", out=tmp_path / "out"))
    assert other.result() is None  # measured with another model
    with pytest.raises(ValueError, match="mine has no 'nothing'"):
        classifier(Unit(variant, 0, replace(options, model="mine:nothing")), "mnist", None)
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module"):
        classifier(Unit(variant, 0, replace(options, model="mine:data")), "mnist", None)


def test_the_report_holds_every_row_with_its_verdicts(tmp_path, capsys):
    from gradclust_fast.study.report import write_report

    def checks(table):
        return [check("low enough", "0.2", table.per_seed(lambda own: own.column("ratio")[1]), below=0.6)]

    run, idle = replace(row_of(tiny()), checks=checks), row_of(tiny(lr=1e-4), id="R98")
    run = replace(run, draw=lambda table: trajectory_figure(table, "tiny", by="lr"))
    run_rows([run], Options(out=tmp_path), [0, 1])
    texts = write_report({"R98": idle, "R99": run}, tmp_path, tmp_path / "guide" / "study.md")
    assert len(texts) == 1 and "R99  tiny: pass; fewer than 3 seeds" in texts[0]
    page = (tmp_path / "guide" / "study.md").read_text()
    assert "| low enough | 0.2 | 0.5 (0.5 to 0.5) | ≤ 0.6 | pass (2 of 3 seeds) |" in page
    assert "![R99: tiny](../r99.png)" in page and "Not run." in page and str(tmp_path) not in page
    assert (tmp_path / "r99.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "summary.csv").read_text().splitlines()[
        1
    ] == "R99,low enough,0.2,0.5 (0.5 to 0.5),≤ 0.6,pass (2 of 3 seeds)"


def test_the_report_counts_monte_carlo_values_that_are_far_off():
    lines = [
        {"variance": 1.0, "mc_variance": 1.0 + off * 0.1, "mc_variance_error": 0.1, "mc_draws": 30, "ratio": 0.5}
        for off in (0.5, -1.5, 2.5, -4.0)
    ]
    close, far = cross_check(Table(lines[:3])), cross_check(Table(lines))
    assert "2 of 3 variances within two standard errors, the furthest at 2.5." in close and "beyond" not in close
    assert "2 of 4" in far and "Of the 1 beyond three, 1 read too low" in far
    assert cross_check(Table([{"variance": 1.0}])) == ""


def test_progress_is_shown_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with display(2) as show:
        show("start", ("R1", 0, 0), "R1  tiny  seed 0")
        show("progress", ("R1", 0, 0), (0.5, "step 5 of 10"))
        show("done", ("R1", 0, 0), {"status": "diverged", "message": "the loss is nan", "seconds": 3.0})
        show("failed", ("R1", 0, 1), "Traceback")
    text = "".join(capsys.readouterr())
    assert "[1/2] R1  tiny  seed 0  3 s  DIVERGED: the loss is nan" in text and "FAILED" in text


def test_variations_of_data_sets():
    data = TensorDataset(torch.arange(100.0)[:, None], torch.arange(100) % 10)
    copies = duplicated(data, 5, 0.9).tensors[0].flatten()
    assert len(copies) == 100 and copies[:10].tolist() == list(range(10))
    assert torch.bincount(copies[10:].long()).tolist() == [18] * 5
    changed = corrupted(data, 0.2, seed=0).tensors[1]
    assert torch.equal(changed[20:], data.tensors[1][20:]) and not torch.equal(changed[:20], data.tensors[1][:20])
    kept = imbalanced(data, [0.1] + [1.0] * 9).tensors[1]
    assert torch.bincount(kept).tolist() == [1] + [10] * 9
