"""Medians, their intervals, and means of ratios."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

RESAMPLES = 2000
CONFIDENCE = 0.95


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bootstrap confidence interval of the median: the same answer for the same values."""
    return _bootstrap(values, lambda picked: picked.quantile(0.5, dim=1), confidence)


def mean_interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bootstrap confidence interval of the geometric mean of `ratios`, as more such cases would give it."""
    low, high = _bootstrap([math.log(r) for r in ratios], lambda picked: picked.mean(dim=1), confidence)
    return math.exp(low), math.exp(high)


def _bootstrap(
    values: Sequence[float], statistic: Callable[[Tensor], Tensor], confidence: float
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(len(values))
    x = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    tail = (1 - confidence) / 2
    low, high = statistic(x[picks]).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high
