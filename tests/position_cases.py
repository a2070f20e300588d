"""What the positional encodings are tested on, and how torch users write them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkern import reference

LARGE = pytest.mark.large
# name -> shape of x, rows of a table, first position; with it, gradients
ADD = {
    "one row": ((1, 4), 1, 0),
    "two dims": ((5, 7), 9, 2),
    "batch": ((3, 20, 33), 20, 0),
    "wide": ((2, 3, 700), 5, 1),
    "many entries": ((19, 2, 5), 2, 0),
    "heads": ((2, 3, 17, 64), 30, 13),
    "five dims": ((2, 1, 3, 5, 16), 5, 0),
    "a start each": ((3, 2, 11, 40), 50, torch.tensor([0, 39, 7])),
    "no rows": ((2, 0, 8), 3, 0),
    "no batch": ((0, 5, 8), 6, 1),
    "no channels": ((2, 3, 0), 6, 1),
}
SHAPES = [(2, 37, 50), (3, 2, 9, 7), (4, 9, 1), (1, 1, 2), (70, 96), (2, 3, 2, 5, 18), (5, 0, 8), (0, 3, 8), (2, 3, 0)]
GRIDS = [(2, 5, 3, 44), (4, 9, 8), (2, 3, 2, 17, 64), (1, 1, 4)]
TOKENS = [(4,), (2, 65), (2, 3, 10), (3, 0), *(pytest.param(shape, marks=LARGE) for shape in ((2, 3, 40), (700,)))]

# name -> q shape, k shape, options
_ROTARY = {
    "grouped": ((2, 4, 35, 64), (2, 2, 35, 64), {}),
    "another base": ((1, 9, 20, 128), (1, 2, 20, 128), {"base": 500000.0}),
    "another base, longer": ((1, 8, 70, 128), (1, 2, 70, 128), {"base": 500000.0}),
    "half of the dim": ((2, 3, 9, 50), (2, 1, 9, 50), {"rotary_dim": 26}),
    "one pair": ((3, 2, 1, 6), (3, 2, 1, 6), {"rotary_dim": 2}),
    "a grid": ((2, 2, 35, 24), (2, 1, 35, 24), {"grid": (5, 7)}),
    "part of the dim on a grid": ((2, 2, 12, 44), (2, 2, 12, 44), {"grid": (3, 4), "rotary_dim": 36}),
    "positions": (
        (2, 2, 5, 8),
        (2, 1, 5, 8),
        {"positions": torch.tensor([[0, 1, -3, 70000, 2**20], [5, 4, 3, 2, 1]])},
    ),
    "positions on a grid": (
        (2, 2, 3, 16),
        (2, 1, 3, 16),
        {"positions": torch.tensor([-7, 3, 1999 * 1000 + 1]), "grid": (2000, 1000)},
    ),
    "two dims": ((5, 16), (5, 16), {}),
    "three dims": ((3, 7, 10), (2, 7, 10), {}),
    "five dims": ((2, 3, 2, 7, 34), (2, 1, 2, 7, 34), {}),
    "no rows": ((2, 3, 0, 8), (2, 1, 0, 8), {}),
    "no batch": ((0, 3, 4, 8), (0, 1, 4, 8), {}),
}
ROTARY = [pytest.param(*row, id=name, marks=[LARGE] * ("longer" in name)) for name, row in _ROTARY.items()]


def exact(x: Tensor, encoding: str | Tensor, offset: int | Tensor = 0, scale: float = 1.0) -> Tensor:
    """x * scale + encoding by the definition, in float64."""
    table = encoding.double() if isinstance(encoding, Tensor) else None
    offsets = offset if isinstance(offset, Tensor) else None
    name = "table" if table is not None else encoding
    start = 0 if offsets is not None else offset
    return reference.add_positional_encoding(x.double(), name, table, start, offsets, scale, 0.0, None)


def eager(x: Tensor, encoding: str | Tensor, offset: int | Tensor, scale: float) -> Tensor:
    """How torch users write it: the encoding's rows rounded to x's dtype, then scaled and added."""
    zero = torch.zeros(x.shape, dtype=torch.float64)
    return x * scale + exact(zero, encoding, offset).to(x.dtype)
