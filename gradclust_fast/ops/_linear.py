"""What the C++ kernels of the linear ops share: when they run, and which route they take."""

from __future__ import annotations

import torch

from .. import _native
from ._checks import accumulator, as_rows


def cpu_refuses(act: torch.Tensor) -> str | None:
    """Why the C++ kernels cannot run on these factors, or None."""
    if act.device.type != "cpu":
        return f"the C++ kernel needs CPU tensors, got {act.device}"
    return _native.cpu_unavailable()


ROUTES = ("direct", "gram", "gram_of_pairs")  # csrc/grad_sqnorm.h: SequenceRoute


def sequence_route(T: int, I: int, O: int, dtype: torch.dtype) -> tuple[int, str]:
    """The code of the route for one example of T positions, and why as a sentence.

    The Gram triangle costs T²(I+O) FLOPs plus what its diagonal blocks waste, about half a block per position; the
    direct product 2TIO. Processors with AVX-512 BF16 do two of a bf16 Gram sum's multiply-adds at once.
    """
    pairs = dtype == torch.bfloat16 and _native.bf16_dots()
    gram, direct = T * (T + 16) * (I + O), 2 * T * I * O
    costs = f"{gram:.3g} FLOPs an example as Gram sum{', two at once' * pairs}, {direct:.3g} direct"
    if gram / (1 + pairs) >= direct:
        return ROUTES.index("direct"), f"direct product, tile by tile: {costs}"
    return ROUTES.index("gram_of_pairs" if pairs else "gram"), f"Gram sum over the lower triangle: {costs}"


def quantities_cpu(
    act: torch.Tensor,
    grad: torch.Tensor,
    bias: bool,
    *,
    sqnorm: torch.Tensor | None = None,
    sketch: torch.Tensor | None = None,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    dot: torch.Tensor | None = None,
    center_grad: torch.Tensor | None = None,
    center_act: torch.Tensor | None = None,
) -> None:
    """Fills the outputs that are given: sqnorm [B], sketch [B, P, Q], dot [B, K]."""
    act, grad = as_rows(act), as_rows(grad)
    dtype = accumulator(act.dtype)
    sides = [None if side is None else side.to(dtype).contiguous() for side in (left, right, center_grad, center_act)]
    address = [0 if tensor is None else tensor.data_ptr() for tensor in (sqnorm, sketch, dot, *sides)]
    P, Q = (0, 0) if sketch is None else sketch.shape[1:]
    K = 0 if dot is None else dot.shape[1]
    rank = center_grad.shape[1] if center_grad is not None and center_grad.dim() == 3 else 1
    route, _ = sequence_route(act.shape[1], act.shape[2], grad.shape[2], act.dtype)
    questions = (
        address[0], route, address[1], address[3], address[4], P, Q, address[2], address[5], address[6], K, rank,
    )  # fmt: skip
    _native._C.grad_quantities_cpu(_native.linear(act, grad, bias), questions, _native.num_threads())
