"""``norm_grads``: every example's gradient of a normalisation layer's weight and bias."""

from __future__ import annotations

import math

import torch

from .. import _native, reference
from .._dispatch import Op
from . import _cuda
from ._checks import accumulator, as_rows, check_floats, shape
from ._triton import triton_loses, triton_refuses


def norm_grads(
    input: torch.Tensor,
    grad: torch.Tensor,
    *,
    groups: int | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-example gradients of the weight and the bias of ``y = x̂∘weight + bias``, from the layer's input.

    They are as small as the parameters, so they are returned as they are: ``Σ_t grad∘x̂`` and ``Σ_t grad``. x̂, the
    normalised input, is made again from the input and never stored.

    Args:
        input: the layer's input, [B, *, D]; with ``groups`` [B, C, *]. ``*`` is any number of position dimensions.
        grad: gradient of the loss with respect to the layer's output, of the same shape, dtype and device.
        groups: None normalises over the last dimension, as LayerNorm and RMSNorm do (flatten a longer
            ``normalized_shape`` first); a number normalises over so many groups of channels and all positions, as
            GroupNorm does, and InstanceNorm without running statistics with ``groups=C``.
        eps: what the layer adds to the variance.
        rms: RMSNorm: divide by the root mean square, without taking the mean off.

    Returns:
        weight and bias [B, D] ([B, C] with ``groups``), float64 for float64 inputs, else float32, in the units of the
        gradient. A NaN stays in its own row.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.

    Source:
        The chain rule; x̂ as in Ba et al. 2016, arXiv:1607.06450, Wu and He 2018, arXiv:1803.08494, and Zhang and
        Sennrich 2019, arXiv:1910.07467.

    Example:
        >>> weight, bias = gf.ops.norm_grads(torch.randn(8, 5, 16), torch.ones(8, 5, 16))
        >>> weight.shape, bias[0, 0].item()
        (torch.Size([8, 16]), 5.0)
    """
    return _op.call(*_prepare(input, grad, groups, eps, rms))


def _prepare(
    input: torch.Tensor, grad: torch.Tensor, groups: int | None, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor, int, float, bool]:
    """The op's groups is 0 for none, so that a 0 of the user must be something else that is wrong."""
    return input, grad, 0 if groups is None else groups or -1, eps, rms


def _check(input: torch.Tensor, grad: torch.Tensor, groups: int, eps: float, rms: bool) -> None:
    for name, tensor in (("input", input), ("grad", grad)):
        check_floats(name, tensor)
    if input.dim() < 2:
        raise ValueError(
            f"input must be [B, *, D], or [B, C, *] with groups, got {shape(input)}; add the batch dimension with "
            f"unsqueeze(0)"
        )
    if grad.shape != input.shape:
        raise ValueError(
            f"grad must be {shape(input)} like input, got {shape(grad)}; pass the gradient of the layer's output"
        )
    if grad.dtype != input.dtype:
        raise TypeError(f"grad must be {input.dtype} like input, got {grad.dtype}; cast one of them")
    if grad.device != input.device:
        raise ValueError(f"grad must be on {input.device} like input, got {grad.device}; move one of them")
    if groups < 0 or (groups and input.shape[1] % groups):
        raise ValueError(
            f"groups must be at least 1 and divide the {input.shape[1]} channels of input, got {max(groups, 0)}; pass "
            f"the layer's num_groups, or None to normalise over the last dimension"
        )
    if groups and rms:
        raise ValueError("rms=True normalises over the last dimension and takes no groups; leave one of them out")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}; pass the layer's own eps")


def _fake(
    input: torch.Tensor, grad: torch.Tensor, groups: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    size, dtype = (input.shape[0], input.shape[1 if groups else -1]), accumulator(input.dtype)
    return input.new_empty(size, dtype=dtype), input.new_empty(size, dtype=dtype)  # [B, D] or [B, C] each


_op = Op(
    "norm_grads(Tensor input, Tensor grad, SymInt groups, float eps, bool rms) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=reference.norm_grads.norm_grads,
    prepare=_prepare,
)


def _cpu_refuses(input: torch.Tensor, *_: object) -> str | None:
    if input.device.type != "cpu":
        return f"the C++ kernel needs CPU tensors, got {input.device}"
    return _native.cpu_unavailable()


def _as_rows(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, T, D], or [B, C, S] with groups, with last stride 1."""
    return as_rows(tensor.reshape(*tensor.shape[:2], tensor.shape[2:].numel()) if groups else tensor)


@_op.kernel(
    "cpu", refuses=_cpu_refuses, route=lambda *_: "a row or a group at a time, normalised and added up in cache"
)
def norm_grads_cpu(
    input: torch.Tensor, grad: torch.Tensor, groups: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = _fake(input, grad, groups, eps, rms)
    if groups and input.shape[2:].numel() == 0:
        return weight.zero_(), bias.zero_()
    input, grad = _as_rows(input, groups), _as_rows(grad, groups)
    factors = _native.norm(input, grad, groups)
    _native._C.norm_grads_cpu(factors, eps, rms, weight.data_ptr(), bias.data_ptr(), _native.num_threads())
    return weight, bias


@_op.kernel(
    "triton",
    refuses=lambda input, *_: triton_refuses(input),
    loses=lambda input, *_: triton_loses(input),
    route=lambda *_: "means and deviations, then the sums; x̂ in registers",
)
def norm_grads_triton(
    input: torch.Tensor, grad: torch.Tensor, groups: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    from ..triton_kernels.norm_grads import norm_grads as fill

    weight, bias = _fake(input, grad, groups, eps, rms)
    if input.numel() == 0:
        return weight.zero_(), bias.zero_()
    fill(_as_rows(input, groups), _as_rows(grad, groups), groups, eps, rms, weight, bias)
    return weight, bias


def _cuda_refuses(input: torch.Tensor, *_: object) -> str | None:
    if input.numel() >= 2**40:
        return "the CUDA kernel takes fewer than 2⁴⁰ numbers"
    return _cuda.refuses(input)


def _cuda_loses(input: torch.Tensor, *_: object) -> str | None:
    """Counted, not measured: a row that does not stay in cache is read three times here, by Triton's kernel twice."""
    if triton_refuses(input) or triton_loses(input):
        return None
    return "the Triton kernel reads the input less often"


@_op.kernel(
    "cuda",
    refuses=_cuda_refuses,
    loses=_cuda_loses,
    route=lambda *_: "means and deviations first, then sums in registers, in order",
)
def norm_grads_cuda(
    input: torch.Tensor, grad: torch.Tensor, groups: int, eps: float, rms: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = _fake(input, grad, groups, eps, rms)
    if input.numel() == 0:
        return weight.zero_(), bias.zero_()
    input, grad = _as_rows(input, groups), _as_rows(grad, groups)
    B, T, D = input.shape
    slices = 1 if groups else max(1, min(T // 8, 528 // B))  # parts of an example, so that few examples fill the device
    stats = weight.new_empty(B * (groups or T), 2)
    partial = weight.new_empty(0 if groups else slices, 2, B, D)
    _cuda.launch(
        "norm_grads_cuda", input.device, _native.norm(input, grad, groups), eps, rms, slices, stats.data_ptr(),
        partial.data_ptr(), weight.data_ptr(), bias.data_ptr(),
    )  # fmt: skip
    return weight, bias
