"""Rotary position embedding by its definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary(
    q: Tensor,
    positions: Tensor | None,
    base: float,
    layout: str,
    rotary_dim: int,
    grid: Sequence[int] | None,
    inverse: bool,
) -> Tensor:
    """Turn pair i of the first `rotary_dim` channels by position * base^(-2i / rotary_dim); back, if `inverse`.

    Pairs are channels (i, i + rotary_dim/2) for layout "half", (2i, 2i + 1) for "interleaved". With a grid, the
    first half of the pairs turns by the row, the second by the column, each with base^(-4i / rotary_dim).
    float16 and bfloat16 are computed in float32.
    """
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    if positions is None:
        positions = torch.arange(q.shape[-2], device=q.device)
    if positions.dim() == 2:  # (batch, 1..., length)
        positions = positions.view(positions.shape[0], *[1] * (q.dim() - 3), positions.shape[1])
    axes = (
        [positions] if grid is None else [positions.div(grid[1], rounding_mode="floor"), positions.remainder(grid[1])]
    )
    n = rotary_dim // 2 // len(axes)
    frequency = base ** (-torch.arange(n, device=q.device, dtype=torch.float64) / n)
    angle = torch.cat([axis.double().unsqueeze(-1) * frequency for axis in axes], -1)
    cos, sin = angle.cos().to(wide), angle.mul(-1 if inverse else 1).sin().to(wide)
    turned, rest = q[..., :rotary_dim].to(wide), q[..., rotary_dim:]
    if layout == "half":
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned.to(q.dtype), rest], -1)


def rotary_qk(
    q: Tensor,
    k: Tensor,
    positions: Tensor | None,
    base: float,
    layout: str,
    rotary_dim: int,
    grid: Sequence[int] | None,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`rotary` of both."""
    rest = (positions, base, layout, rotary_dim, grid, inverse)
    return rotary(q, *rest), rotary(k, *rest)
