"""The command ``gradclust``: a demo, the coverage of a user's model, the study, and the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import __version__


def positive_int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def build_model(spec: str) -> torch.nn.Module:
    """``module:factory`` → a model; the factory is called, a class without arguments, a model is taken as it is."""
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise SystemExit(f"gradclust coverage: expected module:factory, as in my_models:build, got {spec!r}")
    sys.path.insert(0, os.getcwd())  # a command installed elsewhere does not see the user's own modules
    try:
        target = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # the user's module was found, and something that it imports was not
        raise SystemExit(
            f"gradclust coverage: no module {name!r} in {os.getcwd()} or among the installed packages"
        ) from None
    finally:
        sys.path.remove(os.getcwd())
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise SystemExit(f"gradclust coverage: {name} has no {attribute!r}")
        target = getattr(target, part)
    model = target
    if callable(target) and not isinstance(target, torch.nn.Module):
        try:
            inspect.signature(target).bind()
        except TypeError as error:
            raise SystemExit(
                f"gradclust coverage: {spec} must be callable without arguments ({error}); name a function that builds "
                f"the model"
            ) from None
        model = target()
    if not isinstance(model, torch.nn.Module):
        raise SystemExit(f"gradclust coverage: {spec} must give a torch.nn.Module, got {type(model).__name__}")
    return model


def run_coverage(arguments: argparse.Namespace) -> int:
    from .coverage import coverage

    table = coverage(build_model(arguments.model))
    print(table)
    if not table.complete:
        print("\ngf.record would refuse this model: see the parameters with route 'none'", file=sys.stderr)
    return 0 if table.complete else 1


def run_demo(arguments: argparse.Namespace) -> int:
    from .demo import demo

    try:
        demo(data=arguments.data, steps=arguments.steps, out=arguments.out, seed=arguments.seed, limit=arguments.limit)
    except KeyboardInterrupt:
        print("\ninterrupted; what was measured so far is in the CSV file, if anything was", file=sys.stderr)
        return 130
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise SystemExit(f"gradclust demo: {error}") from None
    return 0


def run_bench(arguments: Sequence[str]) -> int:
    """The benchmarks are no part of the installed package: they need the source tree, with its tests beside them."""
    for root in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (root / "bench" / "run.py").is_file() and (root / "bench" / "harness.py").is_file():
            sys.path.insert(0, str(root))
            return importlib.import_module("bench.run").main(arguments)
    raise SystemExit(
        "gradclust bench: the benchmarks are in the source tree; run this inside a clone of gradclust_fast"
    )


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="gradclust", description="Gradient variance, and mini-batches with less of it, for PyTorch models."
    )
    top.add_argument("--version", action="version", version=f"gradclust_fast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = commands.add_parser(
        "demo",
        help="train a small network on handwritten digits and compare gradient estimators as it goes",
        description="Trains a small convolutional network along one trajectory of plain SGD and measures, along it, "
        "the gradient variance of SGD, SGD with twice the batch, SVRG and Gradient Clustering.",
    )
    command.add_argument("--data", metavar="DIR", help="directory with MNIST's files; default: scikit-learn's digits")
    command.add_argument(
        "--limit", type=positive_int, default=10000, metavar="N", help="use the first N examples (%(default)s)"
    )
    command.add_argument("--steps", type=positive_int, default=600, metavar="N", help="training steps (%(default)s)")
    command.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (%(default)s)")
    command.set_defaults(run=run_demo)

    command = commands.add_parser(
        "coverage",
        help="which parameters of a model can be recorded, by which route, at which cost",
        description="Prints gf.coverage of a model; exits with 1 when some parameter has no route.",
    )
    command.add_argument("model", metavar="module:factory", help="a function or class that returns the model")
    command.set_defaults(run=run_coverage)

    # their arguments are their own modules', --help included
    commands.add_parser("study", help="the paper's measurements, row by row: list, run, report", add_help=False)
    commands.add_parser("bench", help="kernel benchmarks of this machine (inside a clone)", add_help=False)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    top = parser()
    parsed, rest = top.parse_known_args(arguments)
    if parsed.command == "bench":
        return run_bench(rest)
    if parsed.command == "study":
        from .study.command import main as study

        return study(rest)
    if rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return parsed.run(parsed)
