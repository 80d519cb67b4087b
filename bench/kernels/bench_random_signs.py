"""The random matrices of sketches, stored, against torch's own generator (another stream of bits)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import Case, on_gpu
from gradclust_fast.sketching import scaled_signs


def cases() -> Iterator[Case]:
    rows, cols = (65_536, 4096) if on_gpu() else (1024, 1024)
    device = torch.empty(0).device
    for transposed in (False, True):
        yield Case(
            "random_signs",
            f"{rows}×{cols} float32{' transposed' * transposed}",
            lambda transposed=transposed: scaled_signs(rows, cols, (1, 2), 0.5, torch.float32, device, transposed),
            {"torch.randn": lambda: torch.randn(rows, cols)},
            bytes=4 * rows * cols,
        )
