"""What the C++ kernels of the linear ops share: when they run, and which route they take."""

from __future__ import annotations

import torch

from .. import _native


def cpu_refuses(act: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on these factors, or None."""
    if act.device.type != "cpu":
        return f"the C++ kernel needs CPU tensors, got {act.device}"
    return _native.cpu_unavailable()


def sequence_route(T: int, I: int, O: int) -> tuple[bool, str]:
    """Whether the Gram sum beats the direct product for one example of T positions, and why as a sentence.

    The Gram triangle costs T²(I+O) FLOPs plus what its diagonal blocks waste, about half a block per position; the
    direct product 2TIO.
    """
    gram, direct = T * (T + 16) * (I + O), 2 * T * I * O
    name = "centred Gram sum over the lower triangle" if gram < direct else "direct product, tile by tile"
    return gram < direct, f"{name}: {gram:.3g} FLOPs an example as Gram sum, {direct:.3g} direct"
