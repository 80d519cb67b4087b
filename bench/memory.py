"""Peak tensor memory of a call, from the allocator's own events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensors that a call had allocated at once, beyond what was there before it.

    Temporaries inside torch's operators count. On the CPU the scratch of the C++ kernels does not: a few tiles a
    thread, kept between calls, which torch's allocator never sees.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    found = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most
