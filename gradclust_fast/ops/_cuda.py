"""What the CUDA kernels of all ops share: when they run, and on which device and stream."""

from __future__ import annotations

from typing import Any

import torch

from .. import _native


def refuses(main: torch.Tensor) -> str | None:
    """Why a CUDA kernel cannot run on a tensor, or None."""
    if main.device.type != "cuda":
        return f"the CUDA kernel needs CUDA tensors, got {main.device}"
    return _native.cuda_unavailable()


def native() -> Any:
    """The native module, for what its launchers tell without a device."""
    return _native._C


def launch(name: str, device: torch.device, *args: Any) -> None:
    """Calls a native launcher with its device made current and that device's current stream as the last argument.

    Raises:
        RuntimeError: what CUDA reported, with the kernel's name and sizes.
    """
    with torch.cuda.device(device):
        getattr(native(), name)(*args, torch.cuda.current_stream().cuda_stream)


def capturing(tensor: torch.Tensor) -> bool:
    """Whether the current stream records a CUDA graph, where nothing may wait for the device."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
