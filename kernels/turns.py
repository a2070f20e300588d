"""Frequencies of positional encodings as 64-bit fixed-point turns, kept on the device."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def turns(count: int, base: float, step: float, device: torch.device) -> Tensor:
    """base^(-i * step) radians for i < count, where 2^64 is one whole turn: int64 (count,), wrapped.

    The error is that of a double: at position 2^20, 1e-9 radians. The first call copies to the device; later ones,
    captured in a graph perhaps, do not.
    """
    i = torch.arange(count, dtype=torch.float64)
    part = (base ** (-i * step) / (2 * math.pi)).remainder(1.0) * 2.0**32
    high = part.floor()
    low = ((part - high) * 2.0**32).round().clamp(max=2.0**32 - 1)
    return (high.long() << 32 | low.long()).to(device)
