"""Error of distances between sketches of per-example gradients, against the sketch's dimension and sides.

    python -m bench.study.sketch_error --data DIR [--pairs 2000] [--seeds 8] [--out bench/results/study]

Gradients of 500 MNIST digits under the MLP 784-128-128-10 after 500 steps (learning rate 0.02, momentum 0.5, batches of
128). For every setting the squared distances of random pairs are compared with the exact ones, over independent seeds:
``rms`` is the root mean square of the relative errors, ``worst`` the largest, ``bias`` the mean, ``bound`` the root
mean square that ``(1 + 2/P)(1 + 2/Q)(1 + 2/R) − 1`` allows (without the middle factors where no first stage is taken).
Writes ``sketch_error.csv`` and prints the guide's table.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import gradclust_fast as gf
from bench.study.mnist_mlp import mlp, per_example_loss, write_csv
from gradclust_fast.data import mnist
from gradclust_fast.watching import Watch

SETTINGS = [  # dim, side
    *((dim, 32) for dim in (16, 32, 64, 128, 256, 512, 1024)),
    *((256, side) for side in (4, 8, 16, 64)),
    (256, 1000),  # no first stage: one dense map
]


def trained(images: torch.Tensor, labels: torch.Tensor) -> torch.nn.Module:
    torch.manual_seed(0)
    model = mlp(784, 128, 128, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    for _ in range(500):
        index = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GRADCLUST_DATA"), help="directory with MNIST's IDX files")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("bench/results/study"))
    options = parser.parse_args()
    images, labels = mnist(data=options.data, limit=10_000).tensors
    model = trained(images, labels)
    index = torch.randperm(len(images))[:500]
    factors: dict = {}
    with Watch(model, factors.__setitem__) as watch:
        watch.backward(per_example_loss(model(images[index]), labels[index]))
    full = torch.cat([f.sketch(None, None).flatten(1) for f in factors.values()], 1).double()  # [500, parameters]
    one, other = torch.randint(len(index), (2, options.pairs))
    different = one != other
    one, other = one[different], other[different]
    exact = torch.stack([(full[i] - full[j]).square().sum() for i, j in zip(one, other)])
    rows = []
    for dim, side in SETTINGS:
        errors = []
        for seed in range(options.seeds):
            sketch = gf.Sketch(dim=dim, seed=seed, sides=(side, side))
            points = sum(sketch.apply(name, f) for name, f in factors.items()).double()
            errors.append((points[one] - points[other]).square().sum(1) / exact - 1)
        error = torch.stack(errors)
        first = (1 + 2 / side) ** 2 if side < 784 else 1.0
        rows.append(
            {
                "dim": dim,
                "side": side,
                "rms": float(error.square().mean().sqrt()),
                "worst": float(error.abs().max()),
                "bias": float(error.mean()),
                "bound": (first * (1 + 2 / dim) - 1) ** 0.5,
                "pairs": len(one),
                "seeds": options.seeds,
            }
        )
        row = rows[-1]
        sides = f"{side} × {side}" if side < 784 else "none"
        print(f"| {dim} | {sides} | {row['rms']:.3f} | {row['worst']:.2f} | {row['bias']:+.3f} | {row['bound']:.3f} |")
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.out / "sketch_error.csv")


if __name__ == "__main__":
    main()
