"""The noise of a run: the same call against itself, which would show no difference on a quiet machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mmkern
from mmkern.benchmarks.inputs import normal
from mmkern.benchmarks.measure import time_pair
from mmkern.benchmarks.records import Baseline

SECONDS = 0.25  # for each of the calls below
UNSTABLE = 0.10  # a run whose calls differ from themselves by more gives no verdict


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """One of a few microseconds on one thread, one that memory limits, and one that arithmetic limits."""
    small, large = normal(8, 256).to(device), normal(1024, 4096).to(device)
    q, k, v = (normal(2, 8, 256, 64, seed=seed).to(device) for seed in range(3))
    return {
        "softmax 8x256": partial(mmkern.softmax, small, 1),
        "softmax 1024x4096": partial(mmkern.softmax, large, 1),
        "attention 2x8x256x64": partial(mmkern.scaled_dot_product_attention, q, k, v),
    }


def noise(device: str = "cpu") -> dict[str, Any]:
    """How far each call's interval against itself reaches from 1, the largest of them, and the threads' share."""
    found, busy = {}, 0.0
    for name, call in calls(device).items():
        pair, _ = time_pair(call, Baseline(name, call), SECONDS, device)
        found[name] = max(pair.high, 1 / pair.low) - 1
        busy = max(busy, *pair.busy)
    return {"calls": found, "floor": max(found.values()), "busy": busy, "threads": torch.get_num_threads()}
