"""The benchmark of whole training steps: right norms beside right baselines, and a peer's fault costs its row only."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn

from bench.run import main
from bench.training import run as training
from bench.training.models import TASKS, Task, classify, images
from bench.training.steps import WAYS


def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 10))


@pytest.fixture
def tasks(monkeypatch):
    def broken():
        raise RuntimeError("no such model")

    found = [
        Task("small", "a small network", small, images(3, 4), classify, 6),
        Task("broken", "cannot be built", broken, images(3, 4), classify, 6),
    ]
    monkeypatch.setattr(training, "TASKS", found)
    return found


def test_rows_are_written_and_faults_are_named(tasks, tmp_path, monkeypatch, capsys):
    def raises(task, model, batch):
        raise ValueError("a peer's fault")

    monkeypatch.setitem(training.WAYS, "Opacus ghost", raises)
    monkeypatch.setitem(training.PACKAGES, "Opacus ghost", "torch")
    monkeypatch.setitem(training.PACKAGES, "BackPACK", "no_such_package")
    assert main(["--training", "--quick", "--seconds", "0.01", "--out", str(tmp_path)]) == 1  # the broken model
    table = csv.DictReader((tmp_path / "training.csv").read_text().splitlines())
    rows = {(row["model"], row["method"]): row for row in table}
    assert "a peer's fault" in rows["small", "Opacus ghost"]["error"]
    assert "not installed (pip install" in rows["small", "BackPACK"]["error"]
    assert "no such model" in rows["broken", "gf.record"]["error"]
    for way in ("gf.record", "gf.record with a sketch", "torch.func"):
        row = rows["small", way]
        assert float(row["difference"]) < 1e-4 and float(row["memory_ratio"]) > 0.5 and row["B"] == "2"
        assert float(row["ratio_low"]) <= float(row["ratio"]) <= float(row["ratio_high"]) and not row["error"]
    kept = json.loads((tmp_path / "training.json").read_text())["rows"]
    assert len(kept) == len(rows) and "failed: ValueError: a peer's fault" in capsys.readouterr().out
    assert main(["--training", "small", "--quick", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    assert len(json.loads((tmp_path / "training.json").read_text())["rows"]) == len(rows)  # replaced, others kept
    with pytest.raises(SystemExit, match="no model nothing; there are small, broken"):
        main(["--training", "nothing", "--out", str(tmp_path)])


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("name", WAYS)
def test_every_way_gives_the_norms_and_the_gradient_of_the_mean(name):
    package = training.PACKAGES.get(name)
    if package:
        pytest.importorskip(package)
    task = Task("small", "", small, images(3, 4), classify, 6)
    model, twin = small(), small()
    twin.load_state_dict(model.state_dict())
    batch = task.batch(6)
    norms = WAYS[name](task, model, batch)()
    classify(twin, *batch).backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    for b in range(6):
        twin.zero_grad()
        classify(twin, *(t[b : b + 1] for t in batch)).backward()
        torch.testing.assert_close(norms[b].float(), sum(p.grad.square().sum() for p in twin.parameters()))


def test_the_models_are_those_named():
    sizes = {task.name: sum(p.numel() for p in task.build().parameters()) for task in TASKS if not task.requires}
    assert sizes["mlp"] == 1_863_690 and sizes["cnn"] == 431_080 and sizes["vgg"] == 2_193_226
    assert len(sizes) == 7
