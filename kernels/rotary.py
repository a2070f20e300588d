"""Rotary position embedding of queries and keys in one launch: one read and one write of each.

A program takes a block of positions of one batch entry and up to HEADS heads, of q first, then of k, so that sine
and cosine, some 30 operations, are computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels import check
from mmkern.kernels.launch import cdiv, launch, power_of_2
from mmkern.kernels.numerics import narrow, sincos, wide
from mmkern.kernels.position import empty_rows, rows_of
from mmkern.kernels.turns import turns

HEADS = 8
ELEMENTS = 2048  # pairs of a block of positions


@triton.jit
def _turn(
    x_ptr, out_ptr, base_x, base_out, stride_xl, stride_ol, row, row_ok, sine, cosine, pairs, dim,
    INTERLEAVED: tl.constexpr, REST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One head: its pairs turned, the channels behind them copied."""
    x_rows, out_rows = (base_x + row * stride_xl)[:, None], (base_out + row * stride_ol)[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_P)[None, :]
        ok = row_ok[:, None] & (column < 2 * pairs)
        x = wide(tl.load(x_ptr + x_rows + column, mask=ok, other=0.0))
        a, b = tl.split(tl.reshape(x, [row.shape[0], BLOCK_P, 2]))
        turned = tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), [row.shape[0], 2 * BLOCK_P])
        tl.store(out_ptr + out_rows + column, narrow(turned, out_ptr.dtype.element_ty), mask=ok)
    else:
        column = tl.arange(0, BLOCK_P)[None, :]
        ok = row_ok[:, None] & (column < pairs)
        a = wide(tl.load(x_ptr + x_rows + column, mask=ok, other=0.0))
        b = wide(tl.load(x_ptr + x_rows + column + pairs, mask=ok, other=0.0))
        first, second = a * cosine - b * sine, b * cosine + a * sine
        tl.store(out_ptr + out_rows + column, narrow(first, out_ptr.dtype.element_ty), mask=ok)
        tl.store(out_ptr + out_rows + column + pairs, narrow(second, out_ptr.dtype.element_ty), mask=ok)
    if REST:
        column = 2 * pairs + tl.arange(0, BLOCK_REST)[None, :]
        ok = row_ok[:, None] & (column < dim)
        tl.store(out_ptr + out_rows + column, tl.load(x_ptr + x_rows + column, mask=ok), mask=ok)


@triton.jit(do_not_specialize=["length", "width", "blocks", "chunks"])
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, positions_ptr, turns_ptr, length, width, blocks, chunks, q_heads, k_heads,
    pairs, frequencies, dim, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_pb, stride_pl,
    stride_yb, stride_yh, stride_yl, stride_zb, stride_zh, stride_zl,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, GRID: tl.constexpr, REST: tl.constexpr, PER: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid % blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    chunk = (pid // blocks) % chunks
    batch = (pid // (blocks * chunks)).to(tl.int64)
    row_ok = row < length
    position = row
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * stride_pb + row * stride_pl, mask=row_ok, other=0)
    pair = tl.arange(0, BLOCK_P)[None, :]
    position = position[:, None] + tl.zeros([1, BLOCK_P], tl.int64)
    if GRID:  # the first half of the pairs by the row, the second by the column; both floor, as Python does
        line = position // width
        line = tl.where(position - line * width < 0, line - 1, line)
        position = tl.where(pair < frequencies, line, position - line * width)
    turn = tl.load(turns_ptr + pair % frequencies, mask=pair < pairs, other=0)
    sine, cosine = sincos(turn, position)
    if INVERSE:
        sine = -sine
    first, zero = chunk * PER, tl.full([], 0, tl.int64)  # the interpreter's loops run over plain numbers
    last = tl.minimum(first + PER, q_heads + k_heads)
    for head in tl.range(first, tl.minimum(last, q_heads)):
        h = head + zero
        _turn(
            q_ptr, q_out_ptr, batch * stride_qb + h * stride_qh, batch * stride_yb + h * stride_yh, stride_ql,
            stride_yl, row, row_ok, sine, cosine, pairs, dim, INTERLEAVED, REST, BLOCK_P, BLOCK_REST,
        )  # fmt: skip
    if k_ptr is not None:
        for head in tl.range(tl.maximum(first, q_heads), last):
            h = head - q_heads + zero
            _turn(
                k_ptr, k_out_ptr, batch * stride_kb + h * stride_kh, batch * stride_zb + h * stride_zh, stride_kl,
                stride_zl, row, row_ok, sine, cosine, pairs, dim, INTERLEAVED, REST, BLOCK_P, BLOCK_REST,
            )  # fmt: skip


def rotary_fwd(
    q: Tensor, positions: Tensor | None, base: float, layout: str, rotary_dim: int, grid: Sequence[int] | None,
    inverse: bool,
) -> Tensor:  # fmt: skip
    """`mmkern::rotary_fwd`: q (..., length, dim) turned."""
    check.rotary(q, None, positions, base, layout, rotary_dim, grid)
    return _rotary([q], positions, base, layout, rotary_dim, grid, inverse)[0]


def rotary_qk_fwd(
    q: Tensor, k: Tensor, positions: Tensor | None, base: float, layout: str, rotary_dim: int,
    grid: Sequence[int] | None, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`mmkern::rotary_qk_fwd`: q and k (..., length, dim) turned."""
    check.rotary(q, k, positions, base, layout, rotary_dim, grid)
    q_out, k_out = _rotary([q, k], positions, base, layout, rotary_dim, grid, inverse)
    return q_out, k_out


def _rotary(
    tensors: list[Tensor], positions: Tensor | None, base: float, layout: str, rotary_dim: int,
    grid: Sequence[int] | None, inverse: bool,
) -> list[Tensor]:  # fmt: skip
    outs = [empty_rows(t) for t in tensors]
    entries = positions is not None and positions.dim() == 2  # else three dims are heads of one entry
    views = [rows_of(t.unsqueeze(0) if t.dim() == 3 and not entries else t) for t in (*tensors, *outs)]
    batch, _, length, dim = views[0].shape
    if views[0].numel() == 0 and views[len(tensors) - 1].numel() == 0:
        return outs
    heads = [view.shape[1] for view in views[: len(tensors)]]
    if len(tensors) == 1:
        views, heads = [views[0], views[0], views[1], views[1]], [heads[0], 0]
    pairs = rotary_dim // 2
    frequencies = pairs // (1 if grid is None else 2)
    width = power_of_2(pairs)
    block_l = max(1, min(power_of_2(length), ELEMENTS // width))
    blocks, chunks = cdiv(length, block_l), cdiv(sum(heads), HEADS)
    where = (0, 0)
    if positions is not None:
        where = (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1))
    launch(
        _rotary_kernel, blocks * chunks * batch, outs[0], views[0], views[1] if heads[1] else None, views[2], views[3],
        positions, turns(frequencies, base, 1 / frequencies, outs[0].device), length, 1 if grid is None else grid[1],
        blocks, chunks, *heads, pairs, frequencies, dim, *views[0].stride()[:3], *views[1].stride()[:3], *where,
        *views[2].stride()[:3], *views[3].stride()[:3], INTERLEAVED=layout == "interleaved", INVERSE=inverse,
        GRID=grid is not None, REST=dim > rotary_dim, PER=HEADS, BLOCK_L=block_l, BLOCK_P=width,
        BLOCK_REST=power_of_2(max(dim - rotary_dim, 1)), num_warps=4,
    )  # fmt: skip
    return outs
