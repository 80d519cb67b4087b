"""What a snapshot of the strata costs: ``GradientClustering.fit`` beside one plain pass over the same data.

    python -m bench.study.snapshot_cost --data DIR [--repeats 5] [--out bench/results/study]

The plain pass is one epoch of ordinary training without the optimizer's step: forward, mean loss, backward, in batches
of 256. Both are timed in turn on 10,000 MNIST digits; the ratio's median and quartiles go to ``snapshot_cost.csv``.
The criterion for the MLP 784-1024-1024-10 is a ratio of at most 2.5 (the paper's clustering makes 20 passes).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import gradclust_fast as gf
from bench.harness import summarise
from bench.study.mnist_mlp import mlp, per_example_loss, write_csv
from gradclust_fast.data import mnist

BATCH = 256
WARM_STEPS = 200
BAR = 2.5


def plain_pass(model: torch.nn.Module, dataset: torch.utils.data.TensorDataset) -> None:
    for images, labels in torch.utils.data.DataLoader(dataset, BATCH):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()


def train(model: torch.nn.Module, dataset: torch.utils.data.TensorDataset) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    images, labels = dataset.tensors
    for _ in range(WARM_STEPS):
        index = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()


def seconds(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GRADCLUST_DATA"), help="directory with MNIST's IDX files")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"))
    options = parser.parse_args()
    dataset = mnist(data=options.data, limit=10_000)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for widths in ((784, 1024, 1024, 10), (784, 128, 128, 10)):
        torch.manual_seed(0)
        model = mlp(*widths)
        train(model, dataset)
        plain_pass(model, dataset)
        plain, snapshot = [], []
        for repeat in range(options.repeats):
            clustering = gf.GradientClustering(model, num_clusters=128, seed=repeat)
            plain.append(seconds(lambda model=model: plain_pass(model, dataset)))
            snapshot.append(
                seconds(lambda fit=clustering.fit: fit(dataset, per_example_loss, batch_size=BATCH, progress=False))
            )
        ratio = summarise([s / p for s, p in zip(snapshot, plain)])
        name = "-".join(map(str, widths))
        rows.append(
            {
                "model": name,
                "plain_seconds": summarise(plain).median,
                "snapshot_seconds": summarise(snapshot).median,
                "ratio": ratio.median,
                "ratio_low": ratio.low,
                "ratio_high": ratio.high,
                "threads": torch.get_num_threads(),
            }
        )
        print(f"MLP {name}: snapshot / plain pass = {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    write_csv(rows, options.out / "snapshot_cost.csv")
    print(f"criterion (large MLP) <= {BAR}: {'pass' if rows[0]['ratio'] <= BAR else 'FAIL'}")
    raise SystemExit(0 if rows[0]["ratio"] <= BAR else 1)


if __name__ == "__main__":
    main()
