"""Run by test_triton_aot.py in a process without the interpreter; prints one JSON object a line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

import gradclust_fast as gf
from bench.aot_check import check, compile_launch, key_of, launches_of

HALF = {"dtype": torch.bfloat16, "device": "meta"}


def points(N, R, dtype=torch.float16):
    return torch.empty(N, R, dtype=dtype, device="meta")


def labels(N):
    return torch.empty(N, dtype=torch.int64, device="meta")


def looked_up(B, T):
    return torch.empty(B, T, dtype=torch.int64, device="meta")


def factors(B, T, I=96, O=64):
    return torch.empty(B, T, I, **HALF), torch.empty(B, T, O, **HALF)


SHAPES = {  # calls that must share one compilation of each kernel: only B, T, N and K differ
    "grad_sqnorm, one position": lambda: [
        gf.ops.grad_sqnorm(torch.empty(B, 96, **HALF), torch.empty(B, 64, **HALF)) for B in (1, 7, 16, 70000)
    ],
    "grad_sqnorm, short": lambda: [
        gf.ops.grad_sqnorm(*factors(B, T, 1024, 2048)) for B, T in ((1, 9), (400, 32), (7, 16))
    ],
    "grad_dot, long": lambda: [
        gf.ops.grad_dot(*factors(B, T), torch.empty(K, 64, **HALF), torch.empty(K, 96, **HALF))
        for B, T, K in ((132, 129, 65), (400, 512, 1000), (133, 200, 100))
    ],
    "grad_dot, short": lambda: [
        gf.ops.grad_dot(*factors(B, T), torch.empty(K, 64, **HALF), torch.empty(K, 96, **HALF))
        for B, T, K in ((3000, 9, 3), (5000, 32, 16), (9999, 7, 5))
    ],
    "grad_sketch, one position": lambda: [
        gf.ops.grad_sketch(
            torch.empty(B, 96, **HALF),
            torch.empty(B, 64, **HALF),
            torch.empty(64, P, **HALF),
            torch.empty(96, Q, **HALF),
        )
        for B, P, Q in ((20000, 16, 16), (16897, 16, 16), (30001, 16, 16))
    ],
    "grad_moments, long": lambda: [gf.ops.grad_moments(*factors(B, T)) for B, T in ((1, 17), (400, 512), (33, 200))],
    "grad_weight_sqnorm": lambda: [
        gf.ops.grad_weight_sqnorm(*factors(B, T, 256, 512)) for B, T in ((1, 64), (400, 512), (33, 1000))
    ],
    "grad_gram, long": lambda: [gf.ops.grad_gram(*factors(B, T)) for B, T in ((132, 129), (140, 512), (150, 200))],
    "grad_sqnorm, direct": lambda: [gf.ops.grad_sqnorm(*factors(B, T)) for B, T in ((132, 200), (999, 256))],
    "assign": lambda: [
        gf.ops.assign(points(B, K), points(K, 1)[:, 0], points(B, 1)[:, 0]) for B, K in ((1, 512), (7, 1024), (9, 2000))
    ],
    "assign_points, one block of features": lambda: [
        gf.ops.assign_points(points(B, 128), points(K, 128)) for B, K in ((20_000, 100), (70_001, 129), (16, 7000))
    ],
    "assign_points, one tile of centres": lambda: [
        gf.ops.assign_points(points(B, 1024), points(K, 1024)) for B, K in ((20_000, 64), (70_000, 33))
    ],
    "norm_grads, rows": lambda: [
        gf.ops.norm_grads(torch.empty(B, T, 768, **HALF), torch.empty(B, T, 768, **HALF))
        for B, T in ((1, 1), (7, 512), (16, 100))
    ],
    "norm_grads, groups": lambda: [
        gf.ops.norm_grads(torch.empty(B, C, 256, **HALF), torch.empty(B, C, 256, **HALF), groups=4)
        for B, C in ((1, 4), (16, 64), (33, 24))
    ],
    "embedding_sqnorm": lambda: [
        gf.ops.embedding_sqnorm(looked_up(B, T), torch.empty(B, T, 256, **HALF), num_embeddings=V)
        for B, T, V in ((1, 1, 1), (16, 512, 50_000), (33, 70, 2**40))
    ],
    "embedding_gram, short": lambda: [
        gf.ops.embedding_gram(looked_up(B, T), factors(B, T)[0], num_embeddings=V)
        for B, T, V in ((1, 2, 1), (400, 32, 50_000), (33, 7, 2**40))
    ],
    "embedding_gram, long": lambda: [
        gf.ops.embedding_gram(looked_up(B, T), factors(B, T)[0], num_embeddings=V)
        for B, T, V in ((1, 33, 1), (16, 512, 50_000), (33, 70, 2**40))
    ],
    "embedding_moments": lambda: [
        gf.ops.embedding_moments(looked_up(B, T), factors(B, T)[0], num_embeddings=V)
        for B, T, V in ((1, 1, 1), (16, 512, 5000), (33, 70, 7))
    ],
    "embedding_dot": lambda: [
        gf.ops.embedding_dot(
            looked_up(B, T), factors(B, T)[0], torch.empty(K, V, **HALF), torch.empty(K, 96, **HALF), num_embeddings=V
        )
        for B, T, K, V in ((1, 33, 60, 1), (16, 512, 1000, 50_000), (33, 70, 64, 7001))
    ],
    "embedding_sketch": lambda: [
        gf.ops.embedding_sketch(
            looked_up(B, T), factors(B, T)[0], torch.empty(V, P, **HALF), torch.empty(96, 16, **HALF), num_embeddings=V
        )
        for B, T, P, V in ((1, 2, 10, 2), (16, 32, 16, 50_000), (33, 7, 12, 7001))
    ],
    "cluster_sums": lambda: [
        gf.ops.cluster_sums(points(N, 256), labels(N), K) for N, K in ((1, 1), (16, 2), (70_000, 129))
    ],
    "exact_moves": lambda: [
        gf.ops.exact_moves(points(N, 256), labels(N), K, seed)
        for N, K, seed in ((60_000, 128, 0), (70_001, 101, 1), (50_003, 143, 2**40))
    ],
    "grad_sqnorm, long": lambda: [
        gf.ops.grad_sqnorm(*factors(B, T, 1024, 2048)) for B, T in ((132, 129), (400, 512), (133, 200))
    ],
}


FLOATS = {"dtype": torch.float32, "device": "meta"}
CROWDED = {  # no benchmark's shapes, for sm_80: rows that are not aligned, wide sketches of short examples
    "grad_sqnorm": lambda: gf.ops.grad_sqnorm(torch.empty(1000, 95, **HALF), torch.empty(1000, 63, **HALF), bias=True),
    "grad_sketch": lambda: gf.ops.grad_sketch(
        *factors(500, 8), torch.empty(64, 64, **HALF), torch.empty(96, 64, **HALF)
    ),
    "grad_dot": lambda: gf.ops.grad_dot(
        torch.empty(300, 95, **FLOATS), torch.empty(300, 63, **FLOATS), torch.empty(64, 63, **FLOATS),
        torch.empty(64, 95, **FLOATS),
    ),
    "embedding_dot": lambda: gf.ops.embedding_dot(
        looked_up(64, 128), torch.empty(64, 128, 255, dtype=torch.float16, device="meta"),
        torch.empty(64, 5001, **FLOATS), torch.empty(64, 255, **FLOATS), num_embeddings=5001,
    ),
}  # fmt: skip


def main() -> None:
    for arch, limit in ((90, 2), (80, 1)):
        for each in check(None, [arch], limit):
            print(json.dumps(asdict(each) | {"fault": each.fault}))
    for name, call in CROWDED.items():
        with launches_of(80) as launches:
            call()
        for launch in launches:
            each = compile_launch(launch, 80, f"{name}: crowded")
            print(json.dumps(asdict(each) | {"fault": each.fault}))
    for name, calls in SHAPES.items():
        with launches_of(90) as launches:
            calls()
        keys: dict[str, set[str]] = {}
        for launch in launches:
            constants = [value for value in launch.args if isinstance(value, bool)]  # the launches of one call differ
            keys.setdefault(f"{launch.kernel.__name__} {constants}", set()).add(key_of(launch, 90))
        print(json.dumps({"calls": name, "keys": {kernel: len(found) for kernel, found in keys.items()}}))


if __name__ == "__main__":
    sys.exit(main())
