from __future__ import annotations

import pytest
import torch
from torch import nn

import gradclust_fast as gf


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.rnn = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.RNN(2, 2, bias=False)
        self.linear, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.twin = nn.Linear(4, 4)
        self.twin.weight = self.linear.weight
        self.scale, self.table = nn.Parameter(torch.ones(3)), nn.Embedding(4, 2, scale_grad_by_freq=True)
        self.head.bias.requires_grad_(False)


def by_name(rows):
    return {row.parameter: row for row in rows}


def test_every_parameter_has_one_row_with_its_route():
    rows = gf.coverage(Model())
    assert [row.parameter for row in rows] == [name for name, _ in Model().named_parameters()]
    rows = by_name(rows)
    assert rows["conv.weight"].route == "factored" and rows["conv.bias"].route == "sum"
    assert rows["linear.weight"].module == "Linear" and "tied" in rows["linear.weight"].note
    assert rows["head.bias"].route == "frozen"
    assert rows["scale"].route == rows["rnn.weight_ih_l0"].route == "recomputed"
    assert "once more" in rows["scale"].cost and rows["scale"].module == "Model"
    assert rows["table.weight"].route == "none" and "parameters=" in rows["table.weight"].note


def test_coverage_and_record_agree():
    model = Model()
    assert not gf.coverage(model).complete
    with pytest.raises(NotImplementedError, match=r"table.weight \(Embedding\)"):
        gf.record(model).__enter__()
    chosen = ["conv.*", "linear.*", "twin.bias"]
    rows = gf.coverage(model, parameters=chosen)
    assert rows.complete and by_name(rows)["scale"].route == "filtered out"
    with pytest.raises(RuntimeError, match="received nothing"), gf.record(model, parameters=chosen) as rec:
        pass
    assert rec.names == [row.parameter for row in rows if row.route in ("factored", "sum")]


def test_batchnorm_in_train_mode_is_reported_as_batch_coupled():
    model = Model()
    assert "batch-coupled" in by_name(gf.coverage(model))["conv.weight"].note
    model.eval()
    assert "batch-coupled" not in by_name(gf.coverage(model))["conv.weight"].note
    model.norm = nn.BatchNorm2d(4, track_running_stats=False).eval()
    assert "batch-coupled" in by_name(gf.coverage(model))["conv.weight"].note


def test_names_lose_wrapper_prefixes_but_keep_real_modules():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    class Real(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    assert gf.coverage(Wrapper(nn.Linear(2, 2)))[0].parameter == "weight"
    assert gf.coverage(Real())[0].parameter == "module.weight"
    compiled = torch.compile(Wrapper(Real()), backend="eager")
    assert [row.parameter for row in gf.coverage(compiled)] == [n for n, _ in Real().named_parameters()]


def test_prints_as_an_aligned_table():
    lines = str(gf.coverage(nn.Sequential(nn.Linear(2, 3), nn.Embedding(4, 2)))).splitlines()
    assert lines[0].split() == ["parameter", "module", "route", "cost", "note"] and set(lines[1]) == {"-", " "}
    column = lines[0].index("route")
    assert [line[column:].split()[0] for line in lines[2:]][:2] == ["factored", "sum"]


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        gf.coverage(torch.ones(3))
