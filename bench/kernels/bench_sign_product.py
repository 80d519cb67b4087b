"""sign_product against the product with a stored matrix of signs, and against making that matrix too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import gradclust_fast as gf
from bench.harness import Case, on_gpu
from gradclust_fast.sketching import scaled_signs

KEY = (1, 2)


def in_turn(vectors: torch.Tensor, stored: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Another matrix in every call, as in a model, where every parameter has its own."""
    state = [0]

    def product() -> torch.Tensor:
        state[0] = (state[0] + 1) % len(stored)
        return vectors @ stored[state[0]]

    return product


def cases() -> Iterator[Case]:
    """The default sketch's second stage (D = 32·32, R = 256), a bias's, and others."""
    sizes = [(1, 1024, 256), (8, 1024, 256), (32, 1024, 256), (128, 1024, 256), (512, 1024, 256), (4096, 1024, 256)]
    sizes += [(128, 10, 256), (128, 1024, 64), (128, 256, 1024)]
    if on_gpu():
        sizes += [(16_384, 4096, 2048)]
    for B, D, R in sizes:
        for dtype in (torch.float32, torch.float64) if (B, R) == (128, 256) else (torch.float32,):
            vectors = torch.randn(B, D, dtype=dtype)
            one = scaled_signs(R, D, KEY, R**-0.5, dtype, vectors.device, transposed=True)
            stored = [one.clone() for _ in range(16 if B < 512 else 2)]
            yield Case(
                "sign_product",
                f"B={B} D={D} R={R} {str(dtype).removeprefix('torch.')}",
                lambda vectors=vectors, R=R: gf.ops.sign_product(vectors, R, KEY, R**-0.5),
                {
                    "vectors @ stored": lambda vectors=vectors, one=one: vectors @ one,
                    "vectors @ stored, 16 in turn" if B < 512 else "vectors @ stored, 2 in turn": in_turn(
                        vectors, stored
                    ),
                },
                flops=2.0 * B * D * R,
                bytes=vectors.nbytes + B * R * one.element_size(),
                dtype=dtype,
            )
