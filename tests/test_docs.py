"""What the documentation shows runs: every docstring example, and every Python block of the README and the guide."""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradclust_fast as gf

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(gf.__path__, "gradclust_fast.")
    if "_C" not in name and not name.endswith("__main__")
]


def examples(module_name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(module_name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    return [test for test in finder.find(module, module_name) if test.examples]


@pytest.mark.parametrize("module_name", MODULES)
def test_docstring_examples_run_and_print_what_they_say(module_name):
    for test in examples(module_name):
        test.globs.update(gf=gf, torch=torch, copy=copy)
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        runner.run(test, out=report.append)
        assert runner.failures == 0, "".join(report)


def test_every_public_callable_has_an_example():
    without = [
        name
        for owner, names in ((gf, gf.__all__), (gf.ops, gf.ops.__all__))
        for name in names
        if callable(getattr(owner, name)) and ">>>" not in (getattr(owner, name).__doc__ or "")
    ]
    assert without == []


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names():
    """The names that the README takes for granted: a model, its data, one batch, and factors of some layer."""
    x, y = torch.randn(96, 6), torch.randint(0, 3, (96,))
    return {
        "F": F,
        "torch": torch,
        "nn": nn,
        "copy": copy,
        "DataLoader": DataLoader,
        "gf": gf,
        "model": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        "loss_fn": nn.CrossEntropyLoss(),
        "x": x,
        "y": y,
        "dataset": TensorDataset(torch.randn(512, 6), torch.randint(0, 3, (512,))),
        "act": torch.randn(4, 9, 5),
        "grad": torch.randn(4, 9, 7),
        "tokens": torch.randint(50_000, (4, 9)),
        "image": torch.randn(4, 3, 8, 8),
        "points": torch.randn(50, 4),
        "centers": torch.randn(6, 4),
    }


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_of_the_pages_run(page, names, capsys):
    for block in python_blocks(page):
        if "conv_sqnorm(image" in block:
            block = block.replace("conv_sqnorm(image, grad", "conv_sqnorm(image, torch.randn(4, 5, 8, 8)")
        exec(compile(block, str(page), "exec"), names)


def test_links_between_the_pages_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
