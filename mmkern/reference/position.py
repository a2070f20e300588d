"""Positional encodings by their definitions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern.reference.numerics import dropped, wide


def positional_encoding(encoding: str, positions: Tensor, dim: int) -> Tensor:
    """float64 encoding (..., dim) of `positions` (...); "sincos2d" takes (..., 2): row, column."""
    if encoding == "scalar":
        angle = positions.double() / 10000
        return (angle.sin() + angle.cos()).unsqueeze(-1).expand(*angle.shape, dim)
    if encoding == "sincos2d":
        column, row = positions[..., 1], positions[..., 0]
        return torch.cat([_sin_cos(column, dim / 4), _sin_cos(row, dim / 4)], -2).flatten(-2)
    pairs = _sin_cos(positions, dim / 2)
    return pairs.transpose(-1, -2).flatten(-2)[..., :dim]


def _sin_cos(positions: Tensor, n: float) -> Tensor:
    """(..., 2, ceil(n)): sine and cosine of position / 10000^(i / n)."""
    i = torch.arange(math.ceil(n), device=positions.device, dtype=torch.float64)
    angle = positions.double().unsqueeze(-1) * 10000.0 ** (-i / n)
    return torch.stack([angle.sin(), angle.cos()], -2)


def add_positional_encoding(
    x: Tensor,
    encoding: str,
    table: Tensor | None,
    offset: int,
    offsets: Tensor | None,
    scale: float,
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """dropout(scale * x + encoding at each position); float16 and bfloat16 are computed in float32."""
    length, dim = x.shape[-2:]
    out = scale * wide(x)
    if encoding == "sincos2d":
        row, column = torch.arange(x.shape[-3], device=x.device), torch.arange(length, device=x.device)
        out = out + positional_encoding(encoding, torch.cartesian_prod(row, column), dim).view(x.shape[-3:]).to(
            out.dtype
        )
    elif encoding != "none":
        positions = torch.arange(length, device=x.device) + offset
        if offsets is not None:  # (batch, 1..., length)
            positions = positions + offsets.view(-1, *[1] * (x.dim() - 2))
        if table is None:
            rows = positional_encoding(encoding, positions, dim)
        else:
            _check_range(
                positions, table.shape[0], f"offset: positions beyond max_length {table.shape[0]} of the table"
            )
            rows = F.embedding(positions, table)
        out = out + rows.to(out.dtype)
    return dropped(out, dropout_p, dropout_seed).to(x.dtype)


def position_table_gradient(
    grad: Tensor, max_length: int, offset: int, offsets: Tensor | None, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    """Gradient of the table (max_length, dim) whose rows `add_positional_encoding` added, from that of its result."""
    dtype, grad = grad.dtype, dropped(wide(grad), dropout_p, dropout_seed)
    positions = torch.arange(grad.shape[-2], device=grad.device) + offset
    if offsets is not None:
        positions = positions + offsets.view(-1, *[1] * (grad.dim() - 2))
    return _sum_rows(grad, positions.expand(grad.shape[:-1]), max_length).to(dtype)


def _sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, dim): the sum of the rows of each index; one outside [0, count) is of none."""
    there = (index >= 0) & (index < count)
    rows, index = torch.where(there[..., None], rows, 0.0), torch.where(there, index, 0)
    total = rows.new_zeros(count, rows.shape[-1])
    return total.index_add(0, index.flatten(), rows.flatten(0, -2)) if count else total


def embed_tokens(
    tokens: Tensor,
    weight: Tensor,
    encoding: str,
    table: Tensor | None,
    offset: int,
    offsets: Tensor | None,
    scale: float,
    dropout_p: float,
    padding_idx: int | None,
    dropout_seed: Tensor | None,
) -> Tensor:
    """add_positional_encoding(weight[tokens], ...); row `padding_idx` of weight gets no gradient."""
    _check_range(
        tokens, weight.shape[0], f"tokens: an id is outside the vocabulary of {weight.shape[0]} rows of weight"
    )
    x = F.embedding(tokens, weight, padding_idx)
    return add_positional_encoding(x, encoding, table, offset, offsets, scale, dropout_p, dropout_seed)


def embedding_gradient(
    grad: Tensor,
    tokens: Tensor,
    vocabulary: int,
    scale: float,
    dropout_p: float,
    padding_idx: int | None,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Gradient of the weight (vocabulary, dim) whose rows `embed_tokens` looked up, from that of its result.

    Tokens filled anew since then with ids outside the vocabulary add to no row, as in torch's own embedding.
    """
    rows = dropped(wide(grad), dropout_p, dropout_seed) * scale
    if padding_idx is not None:
        rows = torch.where((tokens == padding_idx)[..., None], 0.0, rows)
    return _sum_rows(rows, tokens, vocabulary).to(grad.dtype)


def _check_range(index: Tensor, end: int, message: str) -> None:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= end:
        raise IndexError(f"{message} ({int(low)}..{int(high)})")
