"""The geometries on which every conv op is tested, each with its reason."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import pytest
import torch


@dataclass(eq=False)
class Case:
    B: int
    C: int
    O: int
    size: tuple[int, ...]
    geometry: dict = field(default_factory=dict)

    def factors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Random act and the grad that fits it."""
        act = torch.randn(self.B, self.C, *self.size).to(dtype)
        return act, torch.randn(self.B, self.O, *self.out_size()).to(dtype)

    def out_size(self) -> list[int]:
        geometry = {k: v for k, v in self.geometry.items() if k != "groups"}
        layer = [torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d][len(self.size) - 1](1, 1, **geometry)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Using padding='same'")
                return list(layer(torch.zeros(1, 1, *self.size)).shape[2:])
        except RuntimeError:  # the kernel does not fit: no positions
            return [0] * len(self.size)


def case(B, C, O, size, why, **geometry):
    return pytest.param(Case(B, C, O, size, geometry), id=why)


GRID = [
    case(3, 5, 7, (6, 9), "3x3-non-square-image", kernel_size=3, padding=1),
    case(0, 3, 2, (5, 5), "empty-batch", kernel_size=3),
    case(2, 3, 2, (2, 2), "kernel-does-not-fit", kernel_size=3),
    case(2, 3, 4, (2, 3), "kernel-larger-than-the-image", kernel_size=5, padding=2),
    case(2, 4, 6, (5, 5), "whole-image-one-position", kernel_size=5),
    case(3, 20, 18, (7, 6), "1x1", kernel_size=1),
    case(2, 6, 5, (9, 8), "1x1-strided", kernel_size=1, stride=2),
    case(2, 4, 17, (9, 11), "strided", kernel_size=3, stride=2, padding=1),
    case(2, 3, 4, (12, 10), "stride-beyond-the-kernel", kernel_size=(2, 3), stride=(3, 4)),
    case(2, 4, 3, (11, 9), "dilated", kernel_size=3, dilation=2, padding=2),
    case(2, 3, 5, (13, 12), "all-different", kernel_size=(2, 3), stride=(2, 1), padding=(1, 2), dilation=(3, 2)),
    case(2, 4, 3, (7, 6), "same-even-kernel", kernel_size=(4, 2), padding="same", dilation=(1, 2)),
    case(2, 6, 9, (6, 5), "grouped", kernel_size=3, padding=1, groups=3),
    case(2, 32, 64, (4, 4), "grouped-wide", kernel_size=3, padding=1, groups=2),
    case(3, 6, 6, (9, 7), "depthwise", kernel_size=3, padding=1, groups=6),
    case(2, 4, 8, (9, 18), "depthwise-strided-multiplier", kernel_size=(3, 5), stride=2, padding=2, groups=4),
    case(2, 40, 33, (3, 3), "few-positions-many-channels", kernel_size=3, padding=1),
    case(2, 3, 20, (24, 23), "many-positions-few-channels", kernel_size=3, padding=1),
    case(2, 24, 1, (8, 8), "one-output-channel", kernel_size=3),
    case(2, 5, 4, (6, 6), "circular", kernel_size=3, padding=1, padding_mode="circular"),
    case(2, 5, 4, (6, 6), "reflect-same", kernel_size=4, padding="same", padding_mode="reflect"),
    case(3, 5, 6, (17,), "1d", kernel_size=4, stride=2, padding=3, dilation=2),
    case(2, 4, 6, (5, 4, 6), "3d", kernel_size=(3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2), groups=2),
]

# Half types meet the bias only: their kernels differ from float32's in how numbers are read, nothing else.
DTYPE_AND_BIAS = [
    pytest.param(dtype, bias, id=f"{dtype}{'-bias' if bias else ''}".removeprefix("torch."))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for bias in ((False, True) if dtype in (torch.float32, torch.float64) else (True,))
]
