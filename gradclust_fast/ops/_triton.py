"""What the ops share about their Triton kernels: when they run.

An op registers its kernel beside the others, and imports the kernel's file, and with it Triton, when it is called::

    @_op.kernel("triton", refuses=_triton_refuses, loses=_triton_loses)
    def grad_sqnorm_triton(act, grad, bias):
        from ..triton_kernels.grad_sqnorm import grad_sqnorm as fill

        out = _fake(act, grad, bias)
        fill(as_rows(act), as_rows(grad), bias, out)
        return out
"""

from __future__ import annotations

import warnings

import torch

from ..triton_kernels import _support

_said: set[str] = set()


def triton_refuses(tensor: torch.Tensor, float64: bool = False) -> str | None:
    """Why the Triton kernels cannot run on these tensors (one of the op's), or None; ``float64``: the op's can take it.

    A GPU that they do not support, or a GPU without Triton, is warned of once: ``auto`` goes on without them.
    """
    reason = _support.unavailable(tensor.device)
    if reason is not None:
        if tensor.device.type == "cuda" and reason not in _said:
            _said.add(reason)
            warnings.warn(f"gradclust_fast goes on without its Triton kernels: {reason}", RuntimeWarning, stacklevel=3)
        return reason
    if tensor.dtype == torch.float64 and not float64:
        return "the Triton kernels accumulate in float32, and float64 factors need float64; use gf.backend('reference')"
    return None


def triton_loses(tensor: torch.Tensor) -> str | None:
    """Why ``auto`` passes the Triton kernels over, or None."""
    return "Triton is in its interpreter (TRITON_INTERPRET), which is for tests" if _support.interpreted() else None
