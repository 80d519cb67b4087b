"""Variance of Gradient Clustering's mini-batches beside SG-B's along one training run on 10,000 MNIST digits.

    python -m bench.study.mnist_mlp --data DIR [--seeds 3] [--out bench/results/study]

MLP 784-128-128-10 trained with SG-B (learning rate 0.02, momentum 0.5, B = K = 128). At steps 500, 1500 and 3000 both
clusterings are fitted and the variance of their mini-batches is computed exactly, over all 10,000 examples. Writes
``mnist_mlp.csv`` (one row a seed, step and method), ``mnist_mlp.png``, and prints the criteria.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gradclust_fast as gf
from gradclust_fast.data import mnist

STEPS = (500, 1500, 3000)
BATCH = 128
# upper bound for exact moves; the paper's rule is expected within 25 % of the second figure
CRITERIA = {500: (0.14, 0.25), 1500: (0.10, 0.23), 3000: (0.07, 0.21)}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def per_example_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output, target, reduction="none")


def run(dataset: torch.utils.data.TensorDataset, seed: int) -> list[dict]:
    """One trajectory: a row a step and method."""
    torch.manual_seed(seed)
    model = mlp(784, 128, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    images, labels = dataset.tensors
    rows = []
    for step in range(1, max(STEPS) + 1):
        index = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        if step not in STEPS:
            continue
        for method in ("exact", "factored"):
            clustering = gf.GradientClustering(model, num_clusters=BATCH, method=method, seed=seed)
            strata = clustering.fit(dataset, per_example_loss)
            report = gf.compare_estimators(
                model, dataset, per_example_loss, [gf.Uniform(BATCH), gf.Stratified(strata, BATCH)]
            )
            uniform, stratified = report.rows
            rows.append(
                {
                    "seed": seed,
                    "step": step,
                    "method": method,
                    "variance_sgb": uniform.variance,
                    "variance_gc": stratified.variance,
                    "ratio": stratified.variance / uniform.variance,
                }
            )
            print(f"seed {seed}  step {step:5d}  {method:8s}  GC/SG-B = {rows[-1]['ratio']:.3f}")
    return rows


def write_csv(rows: list[dict], path: Path) -> None:
    partial = path.with_suffix(".csv.part")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    os.replace(partial, path)


def ratios(rows: list[dict], step: int, method: str) -> list[float]:
    return [row["ratio"] for row in rows if row["step"] == step and row["method"] == method]


def draw(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    labels = {"factored": "GC, the paper's rule", "exact": "GC, exact moves"}
    for method, color in (("factored", "tab:orange"), ("exact", "tab:blue")):
        values = [ratios(rows, step, method) for step in STEPS]
        axis.plot(STEPS, [statistics.median(v) for v in values], "o-", color=color, label=labels[method])
        axis.fill_between(STEPS, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.25)
    axis.axhline(1, color="0.3", linestyle="-", linewidth=1)
    axis.text(STEPS[-1], 1.04, "SG-B", ha="right", color="0.3")
    axis.axhline(0.5, color="0.3", linestyle="--", linewidth=1)
    axis.text(STEPS[-1], 0.52, "SG-2B (twice the batch)", ha="right", color="0.3")
    axis.set(yscale="log", xlabel="training step", ylabel="gradient variance ÷ SG-B's", xticks=STEPS, ylim=(0.03, 1.5))
    axis.set_title("MNIST 10k, MLP 784-128-128-10, B = K = 128")
    axis.legend(loc="lower left")
    partial = path.with_suffix(".part.png")
    figure.savefig(partial, dpi=150)
    os.replace(partial, path)


def check(rows: list[dict]) -> bool:
    good = True
    for step in STEPS:
        bar, expected = CRITERIA[step]
        exact, factored = (statistics.median(ratios(rows, step, m)) for m in ("exact", "factored"))
        exact_ok, factored_ok = exact <= bar, abs(factored / expected - 1) <= 0.25
        good &= exact_ok and factored_ok
        print(
            f"step {step:5d}: exact {exact:.3f} (bar {bar}: {'pass' if exact_ok else 'FAIL'}), factored "
            f"{factored:.3f} (expected {expected} ± 25 %: {'pass' if factored_ok else 'FAIL'})"
        )
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GRADCLUST_DATA"), help="directory with MNIST's IDX files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"))
    options = parser.parse_args()
    dataset = mnist(data=options.data, limit=10_000)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed in range(options.seeds):
        rows += run(dataset, seed)
        write_csv(rows, options.out / "mnist_mlp.csv")
    draw(rows, options.out / "mnist_mlp.png")
    raise SystemExit(0 if check(rows) else 1)


if __name__ == "__main__":
    main()
