"""How much memory a call needs at its worst moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes of tensor memory alive at once during `call` that were not before it, its result included.

    On CUDA the caching allocator counts them. Elsewhere the profiler reports each allocation and each release of
    torch's allocator, whichever thread, operator or extension makes it, and their running sum is followed: unlike the
    size of the process, this does not depend on what ran before or on what the C library keeps. What neither sees is
    scratch that a library takes past torch's allocator, as MKL, oneDNN and mmkern's kernels do for packed blocks.
    """
    if device != "cpu":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Kineto writes two lines to stderr for each profile at any lower level, which it reads when first used.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        kept = call()
    found: Any = profiled.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak
