"""Random features (R3) and duplicates (R5), scaled down: 300 hidden units, one seed, the rows' own criteria."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gradclust_fast.study import Options, Table, run_rows
from gradclust_fast.study import r03_random_features as r03
from gradclust_fast.study import r05_duplicates as r05


def measured(row, settings, out) -> tuple[Table, dict]:
    """(the row's table, {claim: check}) of these variants alone."""
    made = [r03.variant("small", tau, 0.01, copies, hidden=300, steps=600) for tau, copies in settings]
    made = [replace(v, run=replace(v.run, monte_carlo=0)) for v in made]
    assert run_rows([replace(row, variants=lambda scale: made)], Options(out=out), [0]) == 0
    table = Table.read(out / f"{row.stem}.csv")
    return table, {check.claim: check for check in row.checks(table)}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_features_have_less_variance_when_overparametrised_and_exact_moves_beat_the_papers_rule(tmp_path):
    table, checks = measured(r03.ROW, [(1, 0.0), (10, 0.0)], tmp_path)
    assert checks["V(τ=10) ÷ V(τ=1), SG-B, lr .01"].passed is not None
    for tau in (1, 10):
        own = table.where(tau=tau)
        exact, factored, svrg = (r03.ratios(own, name)[0] for name in ("GC exact", "GC factored", "SVRG"))
        assert exact < 0.55 and exact < factored < 0.75
        assert checks[f"GC exact ÷ SG-B at τ = {tau}, lr .01"].ours.startswith(f"{exact:.3g}")
        assert svrg < exact
        doubled = own.where(estimator="SG-2B").column("ratio")
        assert doubled == pytest.approx([0.5] * len(doubled))
    levels = [r03.levels(table.where(tau=tau), "SG-B")[0] for tau in (1, 10)]
    assert levels[1] < 0.1 * levels[0]
    assert r03.ratios(table.where(tau=10), "SVRG")[0] > r03.ratios(table.where(tau=1), "SVRG")[0]
    assert r03.ROW.draw(table) is not None


def test_duplicates_cost_stratified_batches_next_to_nothing(tmp_path):
    table, checks = measured(r05.ROW, [(1, 0.5), (1, 0.9)], tmp_path)
    for share in ("50%", "90%"):
        for method in ("exact", "factored"):
            found = checks[f"GC {method} ÷ SG-B, {share} copies, τ = 1"]
            assert found.passed, found
    assert checks["GC exact ÷ SG-B, 90% copies, τ = 10"].passed is None  # not measured: undecided, no pass
    assert r05.ROW.draw(table) is not None
