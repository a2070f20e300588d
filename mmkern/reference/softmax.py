"""Softmax by its definition."""

from __future__ import annotations

from torch import Tensor


def softmax(input: Tensor, dim: int) -> Tensor:
    """exp(x_i - max x) / sum_j exp(x_j - max x) along `dim`."""
    if input.numel() == 0:
        return input.clone()
    e = (input - input.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)
