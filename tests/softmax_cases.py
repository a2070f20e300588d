"""What the softmax family is tested on: shapes, masks and biases, and masked softmax in torch's own ops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern.testing import randn

OPS = {"softmax": (mmkern.softmax, torch.softmax), "log_softmax": (mmkern.log_softmax, torch.log_softmax)}
LARGE = pytest.mark.large
# Shape and dim: one row, short and ragged ones, the last dim and others, dims that merge and six that do not, rows that
# stay on chip and longer ones, none.
SHAPES = [
    ((), 0), ((5,), 0), ((7,), 0), ((40,), 0), ((1, 1), -1), ((3, 1), 1), ((3, 1), 0), ((7, 33), 1), ((7, 33), 0),
    ((5, 33), 1), ((64, 3), 0), ((2, 5, 200), 1), ((3, 130, 17), 1), ((4, 1000), 1), ((2, 3, 17, 5), 0),
    ((2, 3, 70, 5), 2), ((2, 6, 7, 13), 1), ((4, 9, 2, 64), 1), ((2, 5, 4, 70), -2), ((2, 3, 2, 3, 2, 9), 2),
    ((4, 21, 18), 0), ((4, 21, 18), 1), ((4, 21, 18), 2), ((5, 49, 49), 2), ((3, 1200, 4), 1), ((1100, 7), 0),
    ((2, 40001), 1), ((0, 4), 1), ((4, 0), 1),
    *(pytest.param(*row, marks=LARGE) for row in (((1100, 70), 0), ((2100, 40), 0), ((1, 70000), 1), ((2, 70001), 1))),
]  # fmt: skip

# (mask, bias) on rows of (3, 4, 9, 50); float masks and biases get gradients.
BIAS = randn(3, 4, 9, 50, seed=4)
HOLES = BIAS.masked_fill(BIAS < -0.8, -math.inf)
TERMS: dict[str, tuple[Tensor | None, Tensor | None]] = {
    "nothing": (None, None),
    "bool mask": (BIAS > -0.5, None),
    "bool mask of columns": (BIAS[:, :1, :1] > -0.5, None),
    "bool mask, rows that see nothing": ((BIAS > -0.5) & (BIAS[..., :1] > 0), None),
    "float mask": (BIAS, None),
    "float mask with holes": (HOLES, None),
    "mask and bias": (BIAS[:, :, :1], HOLES[:1]),
    "bias for the batch": (None, BIAS[0]),
    "bias of columns": (None, BIAS[:1, :1, :1]),
    "bias of rows": (None, BIAS[:1, :, :, :1]),
    "a number": (None, BIAS[0, 0, 0, :1]),
    "bias, transposed": (None, BIAS.mT.contiguous().mT),
    "bool mask and bias of heads": (BIAS[0, 0] > -0.5, BIAS[:1, :, :1, :1]),
}


def masked(
    x: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, dim: int = -1, factor: Tensor | float = 1.0
) -> Tensor:
    """Masked softmax as the sum of its definition, a row that sees nothing being 0; factor: of dropout."""
    scores = x * scale
    hidden = torch.zeros(x.shape, dtype=torch.bool)
    for term in (mask, bias):
        if term is not None and term.dtype == torch.bool:
            hidden = hidden | ~term
        elif term is not None:
            hidden = hidden | (term == -math.inf)
            scores = scores + term.masked_fill(term == -math.inf, 0.0)
    scores = scores.masked_fill(hidden, -math.inf)
    e = (scores - scores.detach().amax(dim, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = e.sum(dim, keepdim=True)
    return e / torch.where(total == 0, 1.0, total) * factor


# Shapes of masked rows and their dim; of 9,000 and more they come in several blocks, whatever the number of terms.
MASKED_SHAPES = [
    ((40,), 0), ((2, 3, 9, 21), -1), ((2, 3, 9, 5), 1), ((3, 9000), 1), pytest.param((3, 40000), 1, marks=LARGE)
]  # fmt: skip


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A number in [0, 1) for each element, for each column, for each row; and the first, every other in memory."""
    draw = torch.Generator().manual_seed(1)
    full, last = torch.rand(shape, generator=draw), torch.rand(shape[-1:], generator=draw)
    return full, last, torch.rand((*shape[:-1], 1), generator=draw), torch.stack([full, full], -1).flatten(-2)[..., ::2]


def terms(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor | None]]:
    """Masks and biases of every kind, shape and layout that broadcast to `shape`."""
    full, last, column, strided = drawn(shape)
    holes = torch.where(full > 0.3, full, -torch.inf)
    return [
        (None, None), (full > 0.3, None), (last > 0.3, full.to(dtype)), (column > 0.3, last), (strided > 0.3, column),
        (full, None), ((last - 0.5).to(dtype), holes), (holes.to(dtype), None), (full > 2, None),
    ]  # fmt: skip


def pairs(shape: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor | None, Tensor | None]]:
    """Every mask beside every bias."""
    full, last, column, strided = drawn(shape)
    masks = [None, full > 0.3, last > 0.3, column > 0.3, strided > 0.3, full, (last - 0.5).to(dtype)]
    masks.append(torch.where(full > 0.3, 0.0, -torch.inf))
    return [(mask, bias) for mask in masks for bias in (None, last, column.to(dtype))]
