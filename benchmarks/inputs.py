"""Inputs of cases, made fast, and the seeded sample of an output that is held against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmkern.testing import randn

# A prime, so that rows of any usual width start at different numbers: no two rows of an input are the same.
DRAWN = 1_000_003
# Elements of an output that are compared, and scores that an attention sample may need: 0.05 s each in float64.
ELEMENTS = 1 << 18
SCORES = 1 << 21


def normal(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """As mmkern.testing.randn, but what is longer than DRAWN repeats: 16 times faster to make."""
    size = math.prod(shape)
    if size <= DRAWN:
        return randn(*shape, dtype=dtype, layout=layout, seed=seed, scale=scale)
    drawn = randn(DRAWN, dtype=dtype, seed=seed, scale=scale)
    x = drawn.repeat(-(-size // DRAWN))[:size]
    if layout == "transposed":
        *outer, rows, length, dim = shape
        return x.view(*outer, length, rows, dim).transpose(-3, -2)
    return x.view(shape)


def sample(total: int, count: int, seed: int = 0) -> Tensor:
    """At most `count` of range(total), ascending: the first, the last, and a seeded choice between them."""
    if count >= total:
        return torch.arange(total)
    draw = torch.Generator().manual_seed(seed)
    between = torch.randperm(total - 2, generator=draw)[: max(0, count - 2)] + 1
    return torch.cat([torch.tensor([0]), between, torch.tensor([total - 1])]).sort().values


class Rows:
    """Picks rows along `dim` of tensors that broadcast to `shape`: as many as have ELEMENTS elements, at least 4."""

    def __init__(self, shape: Sequence[int], dim: int = -1, seed: int = 0) -> None:
        self.dim = dim
        self.shape = torch.Size(shape)
        moved = torch.empty(self.shape, device="meta").movedim(dim, -1).shape
        rows = math.prod(moved[:-1])
        self.total = rows
        self.index = torch.unravel_index(sample(rows, max(4, ELEMENTS // moved[-1]), seed), moved[:-1])

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, size of dim) of what x is in `shape`."""
        return x.expand(self.shape).movedim(self.dim, -1)[self.index]
