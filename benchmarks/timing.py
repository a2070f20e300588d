"""How long calls take: elapsed time, and the processor time that all threads spent in it."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from mmkern.benchmarks.records import Call

SAMPLE_SECONDS = 2e-3  # shortest timed stretch: a clock read and loop entry of 0.2 us are then 0.01%


class Stretch(NamedTuple):
    """Seconds a call, processor seconds of the whole stretch, and what the last call gave."""

    seconds: float
    busy: float
    output: Any


def stretch(call: Call, loops: int = 1, device: str = "cpu") -> Stretch:
    if device != "cpu":
        torch.cuda.synchronize(device)
    output = None
    busy, start = time.process_time(), time.perf_counter()
    for _ in range(loops):
        output = None  # freed before the next one is made, as in a model
        output = call()
    if device != "cpu":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return Stretch(seconds / loops, time.process_time() - busy, output)


def seconds_per_call(call: Call, loops: int = 1, device: str = "cpu") -> float:
    return stretch(call, loops, device).seconds


def loops_for(call: Call, device: str = "cpu") -> int:
    """How many calls fill a sample; the first call, which may allocate or compile, is not counted."""
    if seconds_per_call(call, 1, device) > 10 * SAMPLE_SECONDS:
        return 1
    loops = 1
    while (spent := seconds_per_call(call, loops, device) * loops) < SAMPLE_SECONDS and loops < 1 << 20:
        loops = max(loops + 1, min(loops * 16, math.ceil(loops * 1.2 * SAMPLE_SECONDS / max(spent, 1e-9))))
    return loops
