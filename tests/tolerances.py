"""One table: how far a kernel may be from the float64 oracle, and why.

The rule is relative to what eager PyTorch itself gets wrong in the same dtype on the same inputs:
``err(kernel) <= 2 * err(eager) + atol * scale``, where err is the largest absolute difference over the output
and scale the largest magnitude of the oracle's output.
"""

from __future__ import annotations

import torch

# Unit round-off times the square root of a typical sum's length (about 2^10), rounded up; half inputs are exact in
# float32 and accumulate there, so they get float32's allowance.
ATOL = {
    torch.float64: 1e-13,
    torch.float32: 4e-6,
    torch.bfloat16: 4e-6,
    torch.float16: 4e-6,
}


def assert_close_to_oracle(kernel, oracle, eager, dtype: torch.dtype) -> None:
    """kernel, eager: outputs in the op's dtype; oracle: float64. NaN and Inf must match the oracle's exactly."""
    kernel, eager, oracle = kernel.double().cpu(), eager.double().cpu(), oracle.double().cpu()
    assert kernel.shape == oracle.shape, f"shape {list(kernel.shape)}, expected {list(oracle.shape)}"
    finite = oracle.isfinite()
    assert torch.equal(kernel.isfinite(), finite), "non-finite entries differ from the oracle's"
    if not finite.any():
        return
    scale = oracle[finite].abs().max()
    bound = 2 * (eager - oracle)[finite].abs().nan_to_num(0).max() + ATOL[dtype] * scale
    error = (kernel - oracle)[finite].abs().max()
    assert error <= bound, f"error {error:.3e} exceeds {bound:.3e} (scale {scale:.3e}, {dtype})"
