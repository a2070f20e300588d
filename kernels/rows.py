"""Tensors as rows to be reduced: what softmax and the losses share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels.launch import cdiv, power_of_2

# A row of up to so many elements stays on chip: with 32 warps, 32 registers of the 64 that a thread has.
ON_CHIP = 32768
# elements of a block up to -> warps
WARPS = {1024: 2, 4096: 4, 8192: 8, 16384: 16, 1 << 30: 32}
CHUNK = 4096  # of a row that does not stay, at a time
ROW_DIMS = 4


class Rows:
    """Row dims (three outer, one inner) and the reduced dim of tensors of one shape, dims merged where all allow.

    shape: (n0, n1, n2, inner, width). strides[t]: of tensor t, one for each of these; a tensor of None has zeros.
    """

    def __init__(self, tensors: list[Tensor | None], dim: int) -> None:
        given = [t for t in tensors if t is not None]
        shape = given[0].shape
        dims = [d for d in range(len(shape)) if d != dim and shape[d] != 1]
        groups: list[tuple[int, list[int]]] = []  # size, stride of each given tensor
        for d in dims:
            size, steps = shape[d], [t.stride(d) for t in given]
            if groups:
                before, outer = groups[-1]
                if all(a == b * size for a, b in zip(outer, steps, strict=True)):
                    groups[-1] = (before * size, steps)
                    continue
            groups.append((size, steps))
        self.fits = len(groups) <= ROW_DIMS
        groups = [(1, [0] * len(given))] * (ROW_DIMS - len(groups)) + groups
        self.width = shape[dim]
        self.shape = (*(size for size, _ in groups), self.width)
        found = iter(range(len(given)))
        zeros = (0,) * (ROW_DIMS + 1)
        self.strides = []
        for t in tensors:
            if t is None:
                self.strides.append(zeros)
            else:
                i = next(found)
                self.strides.append((*(steps[i] for _, steps in groups), t.stride(dim)))

    @property
    def all_strides(self) -> list[int]:
        return [step for strides in self.strides for step in strides]

    def blocks(self, tensors: int) -> tuple[int, int, int]:
        """Rows of a program, columns at a time, warps, where blocks of so many tensors are held at once."""
        most = ON_CHIP // power_of_2(tensors)
        columns = max(16, power_of_2(self.width)) if self.width <= most else CHUNK
        # Where the reduced dim is not the contiguous one, neighbours in memory are rows.
        across = self.strides[0][-1] != 1 and self.shape[3] > 1
        rows = max(32 if across else 1, 2048 // columns)
        rows = min(rows, power_of_2(self.shape[3]), max(most // columns, 1))
        return rows, columns, next(warps for size, warps in WARPS.items() if rows * columns <= size)

    def programs(self, rows: int) -> int:
        n0, n1, n2, inner, _ = self.shape
        return n0 * n1 * n2 * cdiv(inner, rows)


def collapsed(tensors: list[Tensor | None], dim: int) -> tuple[list[Tensor | None], Rows]:
    """Rows of these tensors of one shape; copied, where no four strides describe their rows."""
    found = Rows(tensors, dim)
    if not found.fits:
        tensors = [None if t is None else t.contiguous() for t in tensors]
        found = Rows(tensors, dim)
    return tensors, found


@triton.jit
def place(pid, n1, n2, inner, ROWS: tl.constexpr):
    """Outer indices of a program, its inner indices, and which of these exist."""
    blocks = tl.cdiv(inner, ROWS)
    i = pid % blocks * ROWS + tl.arange(0, ROWS)
    outer = pid // blocks
    a, b, c = outer // (n1 * n2), outer // n2 % n1, outer % n2
    return a.to(tl.int64), b.to(tl.int64), c.to(tl.int64), i.to(tl.int64), i < inner


@triton.jit
def at(a, b, c, i, s0, s1, s2, s3):
    """Offsets of rows, (ROWS, 1)."""
    return (a * s0 + b * s1 + c * s2 + i * s3)[:, None]


def like_input(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
