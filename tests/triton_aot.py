"""Run by test_triton_aot.py in a process without the interpreter; prints one JSON object a line."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

import gradclust_fast as gf
from bench.aot_check import check, key_of, launches_of

HALF = {"dtype": torch.bfloat16, "device": "meta"}


def factors(B, T, I=96, O=64):
    return torch.empty(B, T, I, **HALF), torch.empty(B, T, O, **HALF)


SHAPES = {  # calls that must share one compilation of each kernel: only B, T, N and K differ
    "grad_sqnorm, one position": lambda: [
        gf.ops.grad_sqnorm(torch.empty(B, 96, **HALF), torch.empty(B, 64, **HALF)) for B in (1, 7, 16, 70000)
    ],
    "grad_sqnorm, short": lambda: [
        gf.ops.grad_sqnorm(*factors(B, T, 1024, 2048)) for B, T in ((1, 9), (400, 32), (7, 16))
    ],
    "grad_sqnorm, direct": lambda: [gf.ops.grad_sqnorm(*factors(B, T)) for B, T in ((132, 200), (999, 256))],
    "grad_sqnorm, long": lambda: [
        gf.ops.grad_sqnorm(*factors(B, T, 1024, 2048)) for B, T in ((132, 129), (400, 512), (133, 200))
    ],
}


def main() -> None:
    for arch, limit in ((90, 2), (80, 1)):
        for each in check(None, [arch], limit):
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
