"""The benchmark suite's promises: it times tested ops only, survives its peers, and keeps every finished row."""

from __future__ import annotations

import csv
import json
import math
import sys
import types

import pytest
import torch

from bench import compare, gate, gpu_bars, gpu_works, run, scaling
from bench.gpu_meter import Figure
from bench.harness import Case, Ceilings, Timing, measure
from gradclust_fast import _native


@pytest.fixture
def fake_op(tmp_path, monkeypatch):
    """A benchmark module of an op that does not exist, with quick cases; returns a function that sets its cases."""
    module = types.ModuleType("bench.kernels.bench_fake_op")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(run, "available_ops", lambda: ["fake_op"])

    def set_cases(*cases: Case) -> None:
        module.cases = lambda: iter(cases)  # type: ignore[attr-defined]

    return set_cases


def rows(folder):
    return json.loads((folder / "kernels.json").read_text())["rows"]


def go(folder, **options):
    return run.run(["fake_op"], folder, 0.001, quick=True, tested=options.pop("tested", False), **options)


def test_a_native_module_older_than_its_sources_times_nothing(monkeypatch):
    monkeypatch.setattr(_native, "unavailable", _native.STALE)
    with pytest.raises(SystemExit, match=r"nothing was timed: .* built from other sources"):
        run.main(["--op", "assign", "--untested"])


def test_a_peer_that_raises_or_is_missing_costs_its_own_row_only(fake_op, tmp_path, capsys):
    def broken():
        raise RuntimeError("out of luck")

    case = Case(
        "fake_op", "B=1", lambda: 0, {"good": lambda: 0, "broken": broken}, missing={"absent": "pip install it"}
    )
    fake_op(case)
    assert go(tmp_path) == 0
    (row,) = rows(tmp_path)
    assert set(row["ratios"]) == {"good"}
    assert row["failed"] == {"broken": "RuntimeError: out of luck", "absent": "not installed (pip install it)"}
    assert "pip install it" in capsys.readouterr().out
    assert "absent" in (tmp_path / "kernels.csv").read_text()


def test_ours_raising_fails_the_run_but_not_the_next_case(fake_op, tmp_path):
    def broken():
        raise ValueError("wrong")

    fake_op(Case("fake_op", "B=1", broken, {}), Case("fake_op", "B=2", lambda: 0, {"good": lambda: 0}))
    assert go(tmp_path) == 1
    assert [row.get("error") for row in rows(tmp_path)] == ["ValueError: wrong", None]


def test_an_interruption_keeps_the_finished_rows(fake_op, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    fake_op(Case("fake_op", "B=1", lambda: 0, {"good": lambda: 0}), Case("fake_op", "B=2", interrupt, {}))
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    assert [row["label"] for row in rows(tmp_path)] == ["B=1"]


def test_an_op_whose_tests_fail_is_not_timed(fake_op, tmp_path, monkeypatch):
    tests = tmp_path / "tests"
    tests.mkdir()
    monkeypatch.setattr(gate, "TESTS", tests)
    fake_op(Case("fake_op", "B=1", lambda: pytest.fail("was timed"), {}))
    assert "no tests found for fake_op" in gate.refusal("fake_op")
    (tests / "test_fake_op.py").write_text("def test_wrong():\n    assert 1 == 2\n")
    assert "test_wrong" in gate.refusal("fake_op")
    assert go(tmp_path / "out", tested=True) == 1
    assert not (tmp_path / "out" / "kernels.json").exists()
    (tests / "test_fake_op.py").write_text("def test_right():\n    assert 1 == 1\n")
    assert gate.refusal("fake_op") is None


@pytest.mark.parametrize("op", run.available_ops())
def test_every_benchmarked_op_has_tests_to_pass_first(op):
    assert gate.test_selection(op)


def result(folder, ratio, low, high, label="B=1"):
    folder.mkdir()
    row = {"op": "assign", "label": label, "ratios": {"torch": {"median": ratio, "low": low, "high": high}}}
    (folder / "kernels.json").write_text(json.dumps({"machine": {"cpu": "x", "torch": "y"}, "rows": [row]}))
    return folder


def test_compare_tells_a_change_from_noise(tmp_path, capsys):
    a, b = result(tmp_path / "a", 0.50, 0.45, 0.55), result(tmp_path / "b", 0.25, 0.2, 0.3)
    c, d = result(tmp_path / "c", 0.52, 0.4, 0.6), result(tmp_path / "d", 0.5, 0.4, 0.6, label="B=2")
    assert run.main(["--compare", str(a), str(b)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[-4:] == ["0.500", "0.250", "0.50", "faster"]
    compare.compare(b, a)
    assert capsys.readouterr().out.rstrip().endswith("slower")
    compare.compare(a, c)
    assert not capsys.readouterr().out.rstrip().endswith(("slower", "faster"))
    compare.compare(a, d)
    out = capsys.readouterr().out
    assert "only in A" in out and "only in B" in out


def test_compare_names_what_it_cannot_read(tmp_path):
    with pytest.raises(SystemExit, match=r"--compare: no .*kernels.json; name a results directory"):
        compare.compare(tmp_path, tmp_path)
    (tmp_path / "kernels.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds no benchmark results"):
        compare.compare(tmp_path, tmp_path)


def test_the_exponent_is_the_slope_in_logarithms():
    assert scaling.exponent((1, 2, 4), [3.0, 12.0, 48.0]) == pytest.approx(2)
    assert scaling.exponent((1, 2), [4.0, 2.0]) == pytest.approx(-1)


def test_ratios_are_of_the_same_round():
    row = measure(Case("x", "y", lambda: 0, {"same": lambda: 0}), seconds=0.001)
    assert isinstance(row.ours, Timing) and row.ratios["same"].low <= row.ratios["same"].high


def test_the_floor_counts_the_multiply_add_peak(monkeypatch):
    ceilings = Ceilings(megabytes=1, size=64)
    monkeypatch.setattr(ceilings, "gemm_rate", lambda dtype=torch.float32: 100.0)
    monkeypatch.setattr(ceilings, "fma_peak", lambda: 400.0)
    monkeypatch.setattr(ceilings, "copy_bandwidth", lambda: math.inf)
    assert ceilings.floor(Case("x", "y", lambda: 0, {}, flops=800)) == (2.0, "compute")
    assert ceilings.floor(Case("x", "y", lambda: 0, {}, flops=800, dtype=torch.bfloat16)) == (8.0, "compute")


# --- the bars of a GPU --------------------------------------------------------------------------------------------


def test_a_bar_is_reached_missed_reported_or_not_measured():
    outcomes = [
        Figure("share", 0.5, least=0.45),
        Figure("share", 0.4, least=0.45),
        Figure("ratio", 1.3, most=1.25),
        Figure("ratio", math.nan, most=1.25),
        Figure("time", 3.0),
        Figure("share", None, least=0.45),
        Figure("peer", None, least=1.0, error="not installed"),
    ]
    expected = ["reached", "missed", "missed", "missed", "reported", "not measured", "not installed"]
    assert [figure.outcome for figure in outcomes] == expected


def test_without_a_gpu_every_bar_is_gone_through_and_reads_not_measured(tmp_path, monkeypatch, capsys):
    def broken(meter):
        yield Figure("first", 1.0, most=2.0)
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu_bars.WORKS, "broken", gpu_works.Work("a broken work", broken))
    monkeypatch.setattr(gpu_works, "PACKAGES", {})  # the peers' own steps
    assert gpu_bars.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    table = list(csv.DictReader((tmp_path / "bars.csv").read_text().splitlines()))
    assert {row["name"] for row in table} == set(gpu_bars.WORKS)
    own = [row for row in table if row["name"] != "broken"]
    assert all(row["value"] == "not measured" for row in own)
    assert {row["outcome"] for row in own if "flash-kmeans" not in row["measure"]} == {"not measured"}
    assert [row["outcome"] for row in table if row["name"] == "broken"] == ["reached", "RuntimeError: out of luck"]
    bars = {row["bar"] for row in own}
    assert {"≥ 0.45", "≥ 3", "≤ 0.01", "≥ 0.85", "≥ 0.7", "≥ 1", "≤ 1.25", "≤ 1.4", "≤ 1.1", "≤ 1.15"} <= bars


def test_works_that_were_not_run_are_in_the_table(tmp_path, capsys):
    assert gpu_bars.main(["--out", str(tmp_path), "--device", "cpu", "--bar", "weight-gradient"]) == 0
    assert gpu_bars.main(["--out", str(tmp_path), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "not run" in printed and all(work.work in printed for work in gpu_works.WORKS.values())
    assert gpu_bars.main(["--list"]) == 0 and capsys.readouterr().out.split() == list(gpu_works.WORKS)
