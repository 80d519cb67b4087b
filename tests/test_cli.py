from __future__ import annotations

import csv
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from test_data import write_mnist

import gradclust_fast as gf
from gradclust_fast import cli, demo
from gradclust_fast._files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
needs_demo = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("rich", "matplotlib", "sklearn")),
    reason="the demo needs rich, matplotlib and scikit-learn",
)


def gradclust(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gradclust_fast", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@needs_demo
def test_demo_runs_to_its_end_without_a_terminal(tmp_path, capsys):
    assert cli.main(["demo", "--steps", "6", "--limit", "150", "--out", str(tmp_path / "new" / "out")]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    folder = tmp_path / "new" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["variance.csv", "variance.png"]
    assert (folder / "variance.png").read_bytes().startswith(b"\x89PNG")
    rows = rows_of(folder / "variance.csv")
    assert [row["estimator"] for row in rows[:4]] == ["SG-B", "SG-2B", "SVRG", "GC"]
    assert {int(row["step"]) for row in rows} == set(range(7))
    ages = [(int(row["step"]), int(row["age"])) for row in rows[::4]]
    renewed = [(0, 0), (1, 1), (2, 2), (3, 3), (3, 0), (4, 1), (5, 2), (6, 3)]  # stale first, then renewed
    assert ages == renewed
    for row in rows:
        ratio = float(row["ratio_to_SG-B"])
        if row["estimator"] in ("SG-B", "SG-2B"):
            assert ratio == pytest.approx({"SG-B": 1, "SG-2B": 0.5}[row["estimator"]])
        if row["estimator"] == "SVRG" and row["age"] == "0":
            assert ratio < 1e-9
        assert math.isfinite(float(row["variance"])) and 0 <= float(row["normalized_variance"]) <= 1
    last = text.strip().splitlines()[-1]
    assert last.startswith("Gradient Clustering's batches of 64 had ") and last.endswith(" times.")


@needs_demo
def test_demo_is_a_function_of_its_seed(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        demo.demo(steps=2, limit=100, seed=seed, out=tmp_path / name)
    a, b, c = ((tmp_path / name / "variance.csv").read_text() for name in "abc")
    assert a == b != c


@needs_demo
def test_demo_reads_mnist_from_a_directory(tmp_path, capsys):
    for split in ("train", "test"):
        write_mnist(tmp_path / "MNIST" / "raw", split, count=300)
    assert cli.main(["demo", "--data", str(tmp_path), "--steps", "1", "--limit", "200", "--out", str(tmp_path)]) == 0
    assert rows_of(tmp_path / "variance.csv")[0]["batch_size"] == "128"
    assert "batches of 128" in capsys.readouterr().out


def test_demo_says_where_it_looked_for_data(tmp_path):
    with pytest.raises(SystemExit, match=r"gradclust demo: data: .*nowhere is not a directory"):
        cli.main(["demo", "--data", str(tmp_path / "nowhere")])


@needs_demo
def test_demo_names_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib, .*pip install 'gradclust_fast\[demo\]'"):
        cli.main(["demo", "--out", str(tmp_path)])


@needs_demo
@pytest.mark.skipif(os.name == "nt", reason="signals are sent as on Unix")
def test_an_interrupted_demo_leaves_whole_files(tmp_path):
    command = [sys.executable, "-m", "gradclust_fast", "demo", "--steps", "100000", "--limit", "100", "--out", tmp_path]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's children ignore it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "variance.csv").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["variance.csv"]
    assert len(rows_of(tmp_path / "variance.csv")) % 4 == 0


def point(step, age, name, ratio):
    return demo.Point(step, age, name, 64, 64, ratio, 0.5, ratio, 1.0, 0.9)


@pytest.mark.parametrize(
    "gc, words",
    [
        (0.25, "had 0.25 times .*less than the 0.50 that doubling the batch gives"),
        (0.75, "had 0.75 times .*not as good as the 0.50 that doubling the batch gives"),
        (1.5, r"had 1.50 times .*so it did not help here \(doubling the batch gives 0.50\)"),
    ],
    ids=["wins", "halfway", "loses"],
)
def test_the_conclusion_is_computed_also_when_clustering_loses(gc, words):
    ratios = {"SG-B": 1.0, "SG-2B": 0.5, "SVRG": 2.0, "GC": gc}
    points = [point(10, 10, name, ratio) for name, ratio in ratios.items()]
    points += [point(10, 0, name, ratio / 100) for name, ratio in ratios.items()]  # fresh ones do not count
    setting = demo.Setting("digits", None, None, 64, 0.1, 0.0, 10, 0)
    sentence = demo.conclusion(points, setting)
    assert re.search(words, sentence) and "SVRG, at two gradients per example, had 2.00 times." in sentence


def test_coverage_prints_a_table_and_fails_where_a_parameter_has_no_route(tmp_path, monkeypatch, capsys):
    (tmp_path / "users_models.py").write_text(
        textwrap.dedent(
            """
            import torch
            def build(): return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
            class Odd(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.scale = torch.nn.Parameter(torch.ones(3))
            def needs(width): return torch.nn.Linear(width, 2)
            number = 3
            """
        )
    )
    done = gradclust("coverage", "users_models:build", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "0.weight" in done.stdout and "2.bias" in done.stdout
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    assert cli.main(["coverage", "users_models:Odd"]) == (0 if gf.coverage(_odd()).complete else 1)
    assert "scale" in capsys.readouterr().out
    for spec, message in (
        ("users_models:needs", "users_models:needs must be callable without arguments .*'width'"),
        ("users_models:number", "must give a torch.nn.Module, got int"),
        ("users_models:nothing", "users_models has no 'nothing'"),
        ("no_such_module:x", "no module 'no_such_module' in "),
        ("users_models", "expected module:factory"),
    ):
        with pytest.raises(SystemExit, match=message):
            cli.main(["coverage", spec])
    monkeypatch.delitem(sys.modules, "users_models")


def _odd() -> torch.nn.Module:
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(torch.ones(3))
    return model


def test_wrong_arguments_are_named(capsys):
    for arguments, message in (
        (["demo", "--steps", "0"], "--steps: must be a whole number of at least 1, got '0'"),
        (["demo", "--step", "x"], "must be a whole number of at least 1, got 'x'"),
        (["demo", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["study"], "required: COMMAND"),
        (["study", "walk"], "invalid choice"),
        ([], "required: COMMAND"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"gradclust_fast {gf.__version__}"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "table.csv"
    write_atomically(target, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["table.csv"]
