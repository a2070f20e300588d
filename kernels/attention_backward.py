"""Attention backward, from the log-sum-exp: no weights are kept, no sum is atomic.

With p the weights, d a row's grad_out . out - grad_lse, ds = p (grad_out . v - d) for each score:
- sums:    what weights are relative to: lse, or where that is so large that it cannot hold the logarithm of the
           number of keys, the maximum and the sum of exponentials, found again
- rows:    d, and the gradient of a sink, -sum exp(sink - lse) d.          reads grad_out and out once
- queries: grad_query from all keys of a block of queries                   3 matmuls a tile
- keys:    grad_key and grad_value from all queries of a block of keys      4 matmuls a tile, all of it transposed:
           S^T = k q^T and dP^T = v grad_out^T are computed as such, since a dot's transposed result as an operand
           of the next costs a turn through shared memory and has been miscompiled
- mask:    ds summed over whatever the mask is broadcast over               2 matmuls a tile
Two kernels for queries and keys compute the scores twice; one would have to add to grad_query atomically.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels import check
from mmkern.kernels.attention import Inputs, Table, flat, tiles
from mmkern.kernels.attention_scores import (
    COSINE,
    DOT,
    EUCLIDEAN,
    NO_MASK,
    inverse_norm,
    key_length,
    phases,
    products,
    query_key,
    scores,
    similarity,
    tile,
)
from mmkern.kernels.attention_scores import exp as _exp
from mmkern.kernels.launch import cdiv, launch
from mmkern.kernels.numerics import add, dot, keep_tile, narrow, wide

# As FORWARD: capability -> bytes -> head dim up to -> (plain, busy): rows that stay, rows that pass, warps, stages.
_SINGLE = {
    64: ((32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((32, 16, 8, 1), (16, 16, 8, 1)),
    256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    1024: ((16, 16, 16, 1), (16, 16, 16, 1)),
}
_WIDE = ((16, 16, 8, 1), (16, 16, 8, 1))
_SMALL = {
    64: ((64, 64, 8, 2), (32, 32, 4, 1)),
    128: ((64, 32, 8, 2), (64, 32, 8, 1)),
    256: ((32, 16, 8, 1), (32, 16, 8, 1)),
    1024: _WIDE,
}
_OLD = {64: ((64, 32, 4, 1),) * 2, 128: ((32, 16, 4, 1),) * 2, 1024: _WIDE}
BACKWARD: Table = {
    75: {2: _OLD, 4: _OLD},
    80: {
        2: {
            64: ((64, 64, 8, 2), (32, 32, 4, 1)),
            128: ((64, 64, 8, 2), (64, 32, 8, 2)),
            256: ((64, 32, 8, 1), (32, 16, 8, 1)),
            1024: _WIDE,
        },
        4: _SINGLE,
    },
    86: {2: _SMALL, 4: _SINGLE},
    90: {
        2: {
            64: ((128, 64, 8, 2), (64, 32, 8, 2)),
            128: ((64, 64, 8, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 1), (32, 16, 8, 1)),
            1024: _WIDE,
        },
        4: _SINGLE,
    },
    100: {
        2: {
            64: ((64, 64, 4, 2), (64, 32, 8, 2)),
            128: ((128, 64, 8, 2), (64, 64, 8, 2)),
            256: ((64, 32, 8, 1), (64, 32, 8, 1)),
            1024: _WIDE,
        },
        4: _SINGLE,
    },
    120: {2: _SMALL, 4: _SINGLE},
}


@triton.jit(do_not_specialize=["q_len", "k_len", "m_blocks", "left", "right", "lower_right"])
def _sums_kernel(
    lse_ptr, top_ptr, inverse_ptr, q_ptr, k_ptr, mask_ptr, temperature_ptr, slopes_ptr, lengths_ptr, sinks_ptr,
    q_square_ptr, k_square_ptr, scale, softcap, left, right, lower_right, heads, kv_heads, q_len, k_len, head_dim,
    m_blocks, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_mb, stride_mh, stride_mi,
    stride_mj, stride_th, stride_ab, stride_ah, stride_nb, stride_sh,
    NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the weights of a block of queries are relative to: weight = exp(score - top) * inverse, in the scores' unit.

    That is lse and 1 up to a |lse| of 128, whose rounding all weights of a row share: 4e-6. Beyond, one more look at
    the keys, by the products that the gradients take: TRANSPOSED for those of keys. Where products are 1e9, the last
    bit of one decides.
    """
    UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
    SLOPED: tl.constexpr = slopes_ptr is not None
    pid = tl.program_id(0)
    m_block = pid % m_blocks
    batch, head = (pid // m_blocks) // heads, (pid // m_blocks) % heads
    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < q_len
    b64, h64, kv64, row64 = (
        batch.to(tl.int64),
        head.to(tl.int64),
        (head // (heads // kv_heads)).to(tl.int64),
        row.to(tl.int64),
    )
    stats = (b64 * heads + h64) * q_len + row64
    lse = tl.load(lse_ptr + stats, mask=row_ok, other=0.0)
    near = (tl.abs(lse) < 128.0) | (lse == -float("inf"))
    top = tl.where(lse == -float("inf"), float("inf"), lse * UNIT)
    inverse = tl.full([BLOCK_M], 1.0, tl.float32)
    if tl.max(tl.where(near, 0, 1)) > 0:
        length = key_length(lengths_ptr, stride_nb, b64, k_len)
        offset = lower_right * (length - q_len)
        i = row + offset
        i_first, i_last = m_block * BLOCK_M + offset, tl.minimum(m_block * BLOCK_M + BLOCK_M, q_len) - 1 + offset
        factor = scale
        if temperature_ptr is not None:
            factor = scale * tl.load(temperature_ptr + h64 * stride_th)
        slope = 0.0
        if SLOPED:
            slope = tl.load(slopes_ptr + b64 * stride_ab + h64 * stride_ah) * UNIT
        d = tl.arange(0, BLOCK_D)
        q_rows = b64 * stride_qb + h64 * stride_qh + row64 * stride_ql
        q = tile(q_ptr, q_rows, row_ok, d, head_dim)
        q_square, k_square = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_N], tl.float32)
        if SIMILARITY != DOT and not EXACT:
            q_square = tl.load(q_square_ptr + stats, mask=row_ok, other=0.0)
        mask_rows = row64
        if MASK != NO_MASK:
            mask_rows = b64 * stride_mb + h64 * stride_mh + row64 * stride_mi
        highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        first = tl.maximum(i_first - left, 0) // BLOCK_N
        for block in tl.range(first, tl.cdiv(tl.minimum(i_last + right + 1, length), BLOCK_N), num_stages=1):
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            j_ok = n < length
            k_rows = b64 * stride_kb + kv64 * stride_kh + n.to(tl.int64) * stride_kl
            k = tile(k_ptr, k_rows, j_ok, d, head_dim)
            if SIMILARITY != DOT and not EXACT:
                at = (b64 * kv_heads + kv64) * k_len + n
                k_square = tl.load(k_square_ptr + at, mask=j_ok, other=0.0)
            qk = query_key(q, q_ptr, q_rows, row_ok, k, k_ptr, k_rows, j_ok, head_dim, EXACT, TRANSPOSED, PRECISION)
            if TRANSPOSED:
                at_i, at_j, i_ok = i[None, :], n[:, None], row_ok[None, :]
                mask_offsets = mask_rows[None, :] + n.to(tl.int64)[:, None] * stride_mj
                q_side, k_side = q_square[None, :], k_square[:, None]
            else:
                at_i, at_j, i_ok = i[:, None], n[None, :], row_ok[:, None]
                mask_offsets = mask_rows[:, None] + n.to(tl.int64)[None, :] * stride_mj
                q_side, k_side = q_square[:, None], k_square[None, :]
            s, _, _ = scores(
                similarity(qk, q_side, k_side, SIMILARITY, EXACT), at_i, at_j, i_ok, length, left, right, factor * UNIT,
                softcap * UNIT, slope, mask_ptr, mask_offsets, True, MASK, CAPPED, SLOPED,
            )  # fmt: skip
            if TRANSPOSED:
                s = tl.trans(s)
            before, highest = highest, tl.maximum(highest, tl.max(s, 1))
            base = tl.where(highest == -float("inf"), 0.0, highest)
            total = total * _exp(before - base, NATURAL) + tl.sum(_exp(s - base[:, None], NATURAL), 1)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + h64 * stride_sh) * UNIT
            before, highest = highest, tl.maximum(highest, sink)
            base = tl.where(highest == -float("inf"), 0.0, highest)
            total = total * _exp(before - base, NATURAL) + _exp(sink - base, NATURAL)
        top = tl.where(near, top, highest)
        inverse = tl.where(near, 1.0, tl.where(total == 0.0, 0.0, 1.0 / total))
    tl.store(top_ptr + stats, top, mask=row_ok)
    tl.store(inverse_ptr + stats, inverse, mask=row_ok)


@triton.jit(do_not_specialize=["rows", "q_len"])
def _rows_kernel(
    grad_ptr, grad_lse_ptr, out_ptr, top_ptr, inverse_ptr, sinks_ptr, delta_ptr, sink_parts_ptr, rows, heads, q_len,
    value_dim, stride_gb, stride_gh, stride_gl, stride_gv, stride_ob, stride_oh, stride_ol, stride_rb, stride_rh,
    stride_rl, stride_sh,
    NATURAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """delta of each row, and its share of its sink's gradient."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ok = row < rows
    i, h, b = row % q_len, (row // q_len) % heads, row // (q_len * heads)
    columns = tl.arange(0, BLOCK_V)
    inside = ok[:, None] & (columns[None, :] < value_dim)
    at = b * stride_gb + h * stride_gh + i * stride_gl
    grad = wide(tl.load(grad_ptr + at[:, None] + columns[None, :] * stride_gv, mask=inside, other=0.0))
    out = wide(tile(out_ptr, b * stride_ob + h * stride_oh + i * stride_ol, ok, columns, value_dim))
    delta = tl.sum(grad * out, 1)
    if grad_lse_ptr is not None:
        at = b * stride_rb + h * stride_rh + i * stride_rl
        delta -= wide(tl.load(grad_lse_ptr + at, mask=ok, other=0.0))
    tl.store(delta_ptr + row, delta, mask=ok)
    if sink_parts_ptr is not None:
        UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
        top = tl.load(top_ptr + row, mask=ok, other=0.0)
        sink = tl.load(sinks_ptr + h * stride_sh, mask=ok, other=0.0)
        weight = _exp(sink * UNIT - top, NATURAL) * tl.load(inverse_ptr + row, mask=ok, other=0.0)
        weight = tl.where((sink == -float("inf")) | (top == float("inf")), 0.0, weight)
        tl.store(sink_parts_ptr + row, -weight * delta, mask=ok)


@triton.jit
def _score_gradients(
    q, k, v, grad, q_ptr, q_rows, q_ok, k_ptr, k_rows, k_ok, v_ptr, v_rows, grad_ptr, grad_rows, i, j, h, row, top,
    inverse, delta, q_square, k_square, length, left, right, factor, softcap, slope, mask_ptr, mask_offsets, seed,
    threshold, keep_scale, batch_number, start, head_dim, value_dim,
    EDGE: tl.constexpr, NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
    DROPOUT: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a tile: gradients of its scores and, where capped, of what came before; similarities; the weights that met v.

    Weights are exp(score - top) * inverse; top: plus infinity where a row sees nothing. All one-dimensional arguments
    come shaped to broadcast; q (M, D), k (N, D), v (N, V), grad (M, V).
    """
    qk = query_key(q, q_ptr, q_rows, q_ok, k, k_ptr, k_rows, k_ok, head_dim, EXACT, TRANSPOSED, PRECISION)
    sim = similarity(qk, q_square, k_square, SIMILARITY, EXACT)
    grad_weight = products(grad, grad_ptr, grad_rows, q_ok, v, v_ptr, v_rows, k_ok, value_dim, TRANSPOSED, PRECISION)
    if TRANSPOSED:
        i_ok = q_ok[None, :]
    else:
        i_ok = q_ok[:, None]
    s, visible, capped = scores(
        sim, i, j, i_ok, length, left, right, factor, softcap, slope, mask_ptr, mask_offsets, EDGE, MASK, CAPPED, SLOPED
    )
    p = _exp(s - top, NATURAL) * inverse
    if EDGE or MASK != NO_MASK:
        visible = visible & i_ok
        p = tl.where(visible, p, 0.0)
    dropped = p
    if DROPOUT:
        keep = keep_tile(seed, threshold, (row * 0 + batch_number)[:, None], h[:, None], row[:, None], start, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep.to(tl.int8)) != 0
        dropped = tl.where(keep, p * keep_scale, 0.0)
        grad_weight = tl.where(keep, grad_weight * keep_scale, 0.0)
    ds = p * (grad_weight - delta)
    if EDGE or MASK != NO_MASK:  # a NaN in a hidden key or value ends here
        ds = tl.where(visible, ds, 0.0)
    before_cap = ds
    if CAPPED:
        before_cap = ds * (1.0 - capped * capped)
    return ds, before_cap, sim, dropped


@triton.jit
def _row_stats(top_ptr, inverse_ptr, delta_ptr, stats, row_ok):
    """What weights are relative to, and delta."""
    top = tl.load(top_ptr + stats, mask=row_ok, other=float("inf"))
    inverse = tl.load(inverse_ptr + stats, mask=row_ok, other=0.0)
    return top, inverse, tl.load(delta_ptr + stats, mask=row_ok, other=0.0)


@triton.jit
def _pull(ds, sim, SIMILARITY: tl.constexpr, k_inverse, dtype: tl.constexpr):
    """Gradients of similarities -> what q and k are weighted by, rounded as their dot product takes it."""
    if SIMILARITY == DOT:
        w = ds
    elif SIMILARITY == COSINE:
        w = tl.where(ds == 0.0, 0.0, ds * k_inverse)
    elif SIMILARITY == EUCLIDEAN:  # the gradient of a distance of 0 is 0
        w = tl.where((ds == 0.0) | (sim == 0.0), 0.0, -ds / sim)
    else:
        w = 2.0 * ds
    return narrow(w, dtype)


@triton.jit
def _finish(acc, x, x_square, weights, SIMILARITY: tl.constexpr):
    """acc = sum of w y over the other side's vectors y -> gradient of x."""
    if SIMILARITY == DOT:
        return acc
    else:
        nothing = (tl.sum(tl.where(acc == 0.0, 0, 1), 1) == 0)[:, None] & (weights == 0.0)  # x may be padding, and NaN
        if SIMILARITY == COSINE:  # through the division by the norm, which is constant where clamped
            inverse = inverse_norm(x_square)
            unit = x * inverse
            along = tl.sum(acc * unit, 1)[:, None]
            found = inverse * (acc - tl.where(inverse < 1e12, unit * along, 0.0))
        else:
            found = acc - weights * x
        return tl.where(nothing, 0.0, found)


@triton.jit
def _query_step(
    acc, weights, grad_temperature, grad_slope, n_block, q, grad, q_ptr, q_rows, grad_ptr, grad_rows, row_ok, i, head,
    row, top, inverse, delta, q_square, k_ptr, v_ptr, k_base, v_base, k_stride, v_stride, k_square_ptr, k_square_base,
    length, left, right, factor, softcap, slope, mask_ptr, mask_rows, mask_stride, seed, threshold, keep_scale,
    batch_number, k_len, head_dim, value_dim,
    EDGE: tl.constexpr, CLEAN: tl.constexpr, TEMPERATURE: tl.constexpr, SLOPE: tl.constexpr, NATURAL: tl.constexpr,
    MASK: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr, DROPOUT: tl.constexpr, SIMILARITY: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of keys for a block of queries. CLEAN: keys that none of them sees count as 0."""
    UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
    start = n_block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    j, j_ok = n[None, :], n < length
    k_rows, v_rows = k_base + n.to(tl.int64) * k_stride, v_base + n.to(tl.int64) * v_stride
    k = tile(k_ptr, k_rows, j_ok, tl.arange(0, BLOCK_D), head_dim)
    v = tile(v_ptr, v_rows, j_ok, tl.arange(0, BLOCK_V), value_dim)
    k_square, k_inverse = 0.0, 1.0
    if SIMILARITY != DOT and not EXACT:
        k_square = tl.load(k_square_ptr + k_square_base + n, mask=j_ok, other=0.0)[None, :]
    ds, before_cap, sim, _ = _score_gradients(
        q, k, v, grad, q_ptr, q_rows, row_ok, k_ptr, k_rows, j_ok, v_ptr, v_rows, grad_ptr, grad_rows, i, j, row * 0 +
        head, row, top, inverse, delta, q_square, k_square, length, left, right, factor * UNIT, softcap * UNIT, slope,
        mask_ptr, mask_rows[:, None] + n.to(tl.int64)[None, :] * mask_stride, seed, threshold, keep_scale, batch_number,
        start, head_dim, value_dim, EDGE, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, False, PRECISION,
        BLOCK_N,
    )  # fmt: skip
    if SIMILARITY == COSINE:
        k_inverse = inverse_norm(k_square)
    w = _pull(before_cap * factor, sim, SIMILARITY, k_inverse, k.dtype)
    if SIMILARITY > COSINE:
        weights += tl.sum(wide(w), 1)
    if CLEAN:
        seen = tl.max((ds != 0.0).to(tl.int32), 0) > 0
        k = tl.where(seen[:, None], k, 0.0)
    acc = dot(w, k, acc, PRECISION)
    if TEMPERATURE:
        grad_temperature += tl.sum(tl.where(before_cap == 0.0, 0.0, before_cap * sim), 1)
    if SLOPE:
        grad_slope += tl.sum(ds * tl.abs(i - j).to(tl.float32), 1)
    return acc, weights, grad_temperature, grad_slope


@triton.jit(do_not_specialize=["q_len", "k_len", "m_blocks", "left", "right", "lower_right"])
def _queries_kernel(
    grad_ptr, top_ptr, inverse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, temperature_ptr, slopes_ptr, lengths_ptr,
    seed_ptr, q_square_ptr, k_square_ptr, grad_q_ptr, temperature_parts_ptr, slope_parts_ptr, scale, softcap, threshold,
    keep_scale, left, right, lower_right, heads, kv_heads, q_len, k_len, head_dim, value_dim, m_blocks, stride_gb,
    stride_gh, stride_gl, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh,
    stride_vl, stride_xb, stride_xh, stride_xl, stride_mb, stride_mh, stride_mi, stride_mj, stride_th, stride_ab,
    stride_ah, stride_nb,
    NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr,
    SEEDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad_query of a block of queries; and its sums for the gradients of temperature and slopes."""
    UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
    SLOPED: tl.constexpr = slopes_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    pid = tl.program_id(0)
    m_block = m_blocks - 1 - pid % m_blocks
    batch, head = (pid // m_blocks) // heads, (pid // m_blocks) % heads
    kv_head = head // (heads // kv_heads)
    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < q_len
    b64, h64, kv64, row64 = batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64), row.to(tl.int64)
    length = key_length(lengths_ptr, stride_nb, b64, k_len)
    offset = lower_right * (length - q_len)
    i = (row + offset)[:, None]
    i_first, i_last = m_block * BLOCK_M + offset, tl.minimum(m_block * BLOCK_M + BLOCK_M, q_len) - 1 + offset
    factor = scale
    if temperature_ptr is not None:
        factor = scale * tl.load(temperature_ptr + h64 * stride_th)
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes_ptr + b64 * stride_ab + h64 * stride_ah) * UNIT
    seed, batch_number = 0, batch
    if DROPOUT:
        seed = tl.load(seed_ptr)
        if SEEDS > 1:
            batch_number = batch + tl.load(seed_ptr + 1).to(tl.int32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_rows = b64 * stride_qb + h64 * stride_qh + row64 * stride_ql
    q = tile(q_ptr, q_rows, row_ok, d, head_dim)
    grad_rows = b64 * stride_gb + h64 * stride_gh + row64 * stride_gl
    grad = tile(grad_ptr, grad_rows, row_ok, e, value_dim)
    stats = (b64 * heads + h64) * q_len + row64
    top, inverse, delta = _row_stats(top_ptr, inverse_ptr, delta_ptr, stats, row_ok)
    top, inverse, delta = top[:, None], inverse[:, None], delta[:, None]
    q_square = 0.0
    if SIMILARITY != DOT and not EXACT:
        q_square = tl.load(q_square_ptr + stats, mask=row_ok, other=0.0)[:, None]
    mask_rows = row64
    if MASK != NO_MASK:
        mask_rows = b64 * stride_mb + h64 * stride_mh + row64 * stride_mi
    k_base, v_base = b64 * stride_kb + kv64 * stride_kh, b64 * stride_vb + kv64 * stride_vh
    k_square_base = (b64 * kv_heads + kv64) * k_len

    lo, hi = tl.maximum(i_first - left, 0), tl.minimum(i_last + right + 1, length)
    first, inner_first, inner_last, last = phases(
        lo, hi, tl.maximum(i_last - left, 0), tl.minimum(i_first + right + 1, length), BLOCK_N
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    grad_temperature = tl.zeros([BLOCK_M], tl.float32)
    grad_slope = tl.zeros([BLOCK_M], tl.float32)
    for n_block in tl.range(inner_first, inner_last):
        acc, weights, grad_temperature, grad_slope = _query_step(
            acc, weights, grad_temperature, grad_slope, n_block, q, grad, q_ptr, q_rows, grad_ptr, grad_rows, row_ok, i,
            head, row, top, inverse, delta, q_square, k_ptr, v_ptr, k_base, v_base, stride_kl, stride_vl, k_square_ptr,
            k_square_base, length, left, right, factor, softcap, slope, mask_ptr, mask_rows, stride_mj, seed, threshold,
            keep_scale, batch_number, k_len, head_dim, value_dim, False, False, temperature_parts_ptr is not None,
            slope_parts_ptr is not None, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, PRECISION, BLOCK_N,
            BLOCK_D, BLOCK_V,
        )  # fmt: skip
    for edge in tl.range(first, last - (inner_last - inner_first)):
        n_block = tl.where(edge < inner_first, edge, edge + (inner_last - inner_first))
        acc, weights, grad_temperature, grad_slope = _query_step(
            acc, weights, grad_temperature, grad_slope, n_block, q, grad, q_ptr, q_rows, grad_ptr, grad_rows, row_ok, i,
            head, row, top, inverse, delta, q_square, k_ptr, v_ptr, k_base, v_base, stride_kl, stride_vl, k_square_ptr,
            k_square_base, length, left, right, factor, softcap, slope, mask_ptr, mask_rows, stride_mj, seed, threshold,
            keep_scale, batch_number, k_len, head_dim, value_dim, True, False, temperature_parts_ptr is not None,
            slope_parts_ptr is not None, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, PRECISION, BLOCK_N,
            BLOCK_D, BLOCK_V,
        )  # fmt: skip
    # A NaN in a key that no query of the block sees meets its weight of 0. Then again, with such keys as 0,
    # in narrow blocks, which cost the loops above no registers.
    if tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1)) > 0:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        weights = tl.zeros([BLOCK_M], tl.float32)
        grad_temperature = tl.zeros([BLOCK_M], tl.float32)
        grad_slope = tl.zeros([BLOCK_M], tl.float32)
        for n_block in tl.range(first * (BLOCK_N // 16), last * (BLOCK_N // 16), num_stages=1):
            acc, weights, grad_temperature, grad_slope = _query_step(
                acc, weights, grad_temperature, grad_slope, n_block, q, grad, q_ptr, q_rows, grad_ptr, grad_rows,
                row_ok, i, head, row, top, inverse, delta, q_square, k_ptr, v_ptr, k_base, v_base, stride_kl, stride_vl,
                k_square_ptr, k_square_base, length, left, right, factor, softcap, slope, mask_ptr, mask_rows,
                stride_mj, seed, threshold, keep_scale, batch_number, k_len, head_dim, value_dim, True, True,
                temperature_parts_ptr is not None, slope_parts_ptr is not None, NATURAL, MASK, CAPPED, SLOPED, DROPOUT,
                SIMILARITY, EXACT, PRECISION, 16, BLOCK_D, BLOCK_V,
            )  # fmt: skip
    if temperature_parts_ptr is not None:
        tl.store(temperature_parts_ptr + stats, grad_temperature * scale, mask=row_ok)
    if slope_parts_ptr is not None:
        tl.store(slope_parts_ptr + stats, -grad_slope, mask=row_ok)
    if grad_q_ptr is not None:
        acc = _finish(acc, wide(q), q_square, weights[:, None], SIMILARITY)
        at = b64 * stride_xb + h64 * stride_xh + row64 * stride_xl
        inside = row_ok[:, None] & (d[None, :] < head_dim)
        tl.store(grad_q_ptr + at[:, None] + d[None, :], narrow(acc, grad_q_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _key_step(
    grad_k, grad_v, weights, m_block, head, k, v, k_ptr, k_rows, v_ptr, v_rows, j, j_ok, n64, k_square, grad_ptr,
    top_ptr, inverse_ptr, delta_ptr, q_ptr, mask_ptr, temperature_ptr, slopes_ptr, q_square_ptr, scale, softcap, seed,
    threshold, keep_scale, batch_number, length, left, right, offset, b64, heads, q_len, head_dim, value_dim, start,
    stride_gb, stride_gh, stride_gl, stride_qb, stride_qh, stride_ql, stride_mb, stride_mh, stride_mi, stride_mj,
    stride_th, stride_ab, stride_ah,
    EDGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED:
    tl.constexpr, SLOPED: tl.constexpr, DROPOUT: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr, PRECISION:
    tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head for a block of keys."""
    UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
    h64 = head.to(tl.int64)
    factor = scale
    if temperature_ptr is not None:
        factor = scale * tl.load(temperature_ptr + h64 * stride_th)
    slope = 0.0
    if SLOPED:
        slope = tl.load(slopes_ptr + b64 * stride_ab + h64 * stride_ah) * UNIT
    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok, row64 = row < q_len, row.to(tl.int64)
    q_rows = b64 * stride_qb + h64 * stride_qh + row64 * stride_ql
    q = tile(q_ptr, q_rows, row_ok, tl.arange(0, BLOCK_D), head_dim)
    grad_rows = b64 * stride_gb + h64 * stride_gh + row64 * stride_gl
    grad = tile(grad_ptr, grad_rows, row_ok, tl.arange(0, BLOCK_V), value_dim)
    stats = (b64 * heads + h64) * q_len + row64
    top, inverse, delta = _row_stats(top_ptr, inverse_ptr, delta_ptr, stats, row_ok)
    q_square, q_inverse = 0.0, 1.0
    if SIMILARITY != DOT and not EXACT:
        q_square = tl.load(q_square_ptr + stats, mask=row_ok, other=0.0)[None, :]
    mask_rows = row64
    if MASK != NO_MASK:
        mask_rows = b64 * stride_mb + h64 * stride_mh + row64 * stride_mi
    _, before_cap, sim, dropped = _score_gradients(
        q, k, v, grad, q_ptr, q_rows, row_ok, k_ptr, k_rows, j_ok, v_ptr, v_rows, grad_ptr, grad_rows, (row +
        offset)[None, :], j, row * 0 + head, row, top[None, :], inverse[None, :], delta[None, :], q_square, k_square,
        length, left, right, factor * UNIT, softcap * UNIT, slope, mask_ptr, mask_rows[None, :] + n64[:, None] *
        stride_mj, seed, threshold, keep_scale, batch_number, start, head_dim, value_dim, EDGE, NATURAL, MASK, CAPPED,
        SLOPED, DROPOUT, SIMILARITY, EXACT, True, PRECISION, BLOCK_N,
    )  # fmt: skip
    if VALUE:
        grad_v = dot(narrow(dropped, grad.dtype), grad, grad_v, PRECISION)
    if KEY:
        if SIMILARITY == COSINE:
            q_inverse = inverse_norm(q_square)
        w = _pull(before_cap * factor, sim, SIMILARITY, q_inverse, q.dtype)
        if SIMILARITY > COSINE:
            weights += tl.sum(wide(w), 1)
        grad_k = dot(w, q, grad_k, PRECISION)
    return grad_k, grad_v, weights


@triton.jit(do_not_specialize=["q_len", "k_len", "n_blocks", "left", "right", "lower_right"])
def _keys_kernel(
    grad_ptr, top_ptr, inverse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, temperature_ptr, slopes_ptr, lengths_ptr,
    seed_ptr, q_square_ptr, k_square_ptr, grad_k_ptr, grad_v_ptr, scale, softcap, threshold, keep_scale, left, right,
    lower_right, heads, kv_heads, q_len, k_len, head_dim, value_dim, n_blocks, stride_gb, stride_gh, stride_gl,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_xb,
    stride_xh, stride_xl, stride_yb, stride_yh, stride_yl, stride_mb, stride_mh, stride_mi, stride_mj, stride_th,
    stride_ab, stride_ah, stride_nb,
    NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr,
    SEEDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad_key and grad_value of a block of keys, from the queries of every head of its group."""
    SLOPED: tl.constexpr = slopes_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    pid = tl.program_id(0)
    n_block = pid % n_blocks  # of a causal mask, the first keys have the most queries
    batch, kv_head = (pid // n_blocks) // kv_heads, (pid // n_blocks) % kv_heads
    group = heads // kv_heads
    start = n_block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    j = n[:, None]
    b64, kv64, n64 = batch.to(tl.int64), kv_head.to(tl.int64), n.to(tl.int64)
    length = key_length(lengths_ptr, stride_nb, b64, k_len)
    offset = lower_right * (length - q_len)
    j_ok = n < length
    seed, batch_number = 0, batch
    if DROPOUT:
        seed = tl.load(seed_ptr)
        if SEEDS > 1:
            batch_number = batch + tl.load(seed_ptr + 1).to(tl.int32)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k_rows = b64 * stride_kb + kv64 * stride_kh + n64 * stride_kl
    k = tile(k_ptr, k_rows, j_ok, d, head_dim)
    v_rows = b64 * stride_vb + kv64 * stride_vh + n64 * stride_vl
    v = tile(v_ptr, v_rows, j_ok, e, value_dim)
    k_square = 0.0
    if SIMILARITY != DOT and not EXACT:
        k_square = tl.load(k_square_ptr + (b64 * kv_heads + kv64) * k_len + n, mask=j_ok, other=0.0)[:, None]

    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    weights = tl.zeros([BLOCK_N], tl.float32)
    last_key = tl.minimum(start + BLOCK_N, length) - 1
    lo = tl.maximum(start - offset - right, 0)
    hi = tl.where(start < length, tl.minimum(last_key - offset + left + 1, q_len), 0)
    whole = start + BLOCK_N <= length
    first, inner_first, inner_last, last = phases(
        lo, hi, last_key - offset - right, tl.where(whole, tl.minimum(start - offset + left + 1, q_len), 0), BLOCK_M
    )
    inner = inner_last - inner_first
    edges = last - first - inner
    for step in tl.range(0, group * inner):
        head, m_block = kv_head * group + step // inner, inner_first + step % inner
        grad_k, grad_v, weights = _key_step(
            grad_k, grad_v, weights, m_block, head, k, v, k_ptr, k_rows, v_ptr, v_rows, j, j_ok, n64, k_square,
            grad_ptr, top_ptr, inverse_ptr, delta_ptr, q_ptr, mask_ptr, temperature_ptr, slopes_ptr, q_square_ptr,
            scale, softcap, seed, threshold, keep_scale, batch_number, length, left, right, offset, b64, heads, q_len,
            head_dim, value_dim, start, stride_gb, stride_gh, stride_gl, stride_qb, stride_qh, stride_ql, stride_mb,
            stride_mh, stride_mi, stride_mj, stride_th, stride_ab, stride_ah, False, grad_k_ptr is not None, grad_v_ptr
            is not None, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_V,
        )  # fmt: skip
    for step in tl.range(0, group * edges):
        head, edge = kv_head * group + step // edges, first + step % edges
        m_block = tl.where(edge < inner_first, edge, edge + inner)
        grad_k, grad_v, weights = _key_step(
            grad_k, grad_v, weights, m_block, head, k, v, k_ptr, k_rows, v_ptr, v_rows, j, j_ok, n64, k_square,
            grad_ptr, top_ptr, inverse_ptr, delta_ptr, q_ptr, mask_ptr, temperature_ptr, slopes_ptr, q_square_ptr,
            scale, softcap, seed, threshold, keep_scale, batch_number, length, left, right, offset, b64, heads, q_len,
            head_dim, value_dim, start, stride_gb, stride_gh, stride_gl, stride_qb, stride_qh, stride_ql, stride_mb,
            stride_mh, stride_mi, stride_mj, stride_th, stride_ab, stride_ah, True, grad_k_ptr is not None, grad_v_ptr
            is not None, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, PRECISION, BLOCK_M, BLOCK_N,
            BLOCK_D, BLOCK_V,
        )  # fmt: skip
    if grad_v_ptr is not None:
        at = b64 * stride_yb + kv64 * stride_yh + n64 * stride_yl
        inside = (n < k_len)[:, None] & (e[None, :] < value_dim)
        tl.store(grad_v_ptr + at[:, None] + e[None, :], narrow(grad_v, grad_v_ptr.dtype.element_ty), mask=inside)
    if grad_k_ptr is not None:
        grad_k = _finish(grad_k, wide(k), k_square, weights[:, None], SIMILARITY)
        at = b64 * stride_xb + kv64 * stride_xh + n64 * stride_xl
        inside = (n < k_len)[:, None] & (d[None, :] < head_dim)
        tl.store(grad_k_ptr + at[:, None] + d[None, :], narrow(grad_k, grad_k_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_len", "k_len", "left", "right", "lower_right", "rows", "columns", "chunk", "chunks"])
def _mask_kernel(
    grad_ptr, top_ptr, inverse_ptr, delta_ptr, q_ptr, k_ptr, v_ptr, mask_ptr, temperature_ptr, slopes_ptr, lengths_ptr,
    seed_ptr, q_square_ptr, k_square_ptr, parts_ptr, scale, softcap, threshold, keep_scale,
    left, right, lower_right, heads, kv_heads, q_len, k_len, head_dim, value_dim, rows, columns, own_batch, own_heads,
    rest_heads, pairs, chunk, chunks, stride_gb, stride_gh, stride_gl,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_mb, stride_mh, stride_mi, stride_mj, stride_th, stride_ab, stride_ah, stride_nb,
    NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr,
    SEEDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of the mask, of (own_batch, own_heads, rows, columns), each 1 where broadcast: its gradient summed over a
    chunk of the (batch, head) pairs that share it, and over all rows or columns that do."""
    SLOPED: tl.constexpr = slopes_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    pid = tl.program_id(0)
    n_tiles, m_tiles = tl.cdiv(columns, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    n_tile, pid = pid % n_tiles, pid // n_tiles
    m_tile, pid = pid % m_tiles, pid // m_tiles
    part, pid = pid % chunks, pid // chunks
    own_head, own_b = pid % own_heads, pid // own_heads
    m_all = tl.where(rows == q_len, 1, tl.cdiv(q_len, BLOCK_M))  # blocks that a broadcast row or column stands for
    n_all = tl.where(columns == k_len, 1, tl.cdiv(k_len, BLOCK_N))
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    acc, rest = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    pair_first, pair_last = part * chunk, tl.minimum(part * chunk + chunk, pairs)
    for step in tl.range(pair_first * m_all * n_all, pair_last * m_all * n_all):
        n_step, m_step, pair = step % n_all, (step // n_all) % m_all, step // (n_all * m_all)
        batch = tl.where(own_batch == 1, pair // rest_heads, own_b)
        head = tl.where(own_heads == 1, pair % rest_heads, own_head)
        b64, h64, kv64 = batch.to(tl.int64), head.to(tl.int64), (head // (heads // kv_heads)).to(tl.int64)
        length = key_length(lengths_ptr, stride_nb, b64, k_len)
        offset = lower_right * (length - q_len)
        factor = scale
        if temperature_ptr is not None:
            factor = scale * tl.load(temperature_ptr + h64 * stride_th)
        slope = 0.0
        if SLOPED:
            slope = tl.load(slopes_ptr + b64 * stride_ab + h64 * stride_ah)
        seed, batch_number = 0, batch
        if DROPOUT:
            seed = tl.load(seed_ptr)
            if SEEDS > 1:
                batch_number = batch + tl.load(seed_ptr + 1).to(tl.int32)
        row = (m_tile + m_step) * BLOCK_M + tl.arange(0, BLOCK_M)
        start = (n_tile + n_step) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        row_ok, j_ok, row64, n64 = row < q_len, n < length, row.to(tl.int64), n.to(tl.int64)
        q_rows = b64 * stride_qb + h64 * stride_qh + row64 * stride_ql
        k_rows = b64 * stride_kb + kv64 * stride_kh + n64 * stride_kl
        q, k = tile(q_ptr, q_rows, row_ok, d, head_dim), tile(k_ptr, k_rows, j_ok, d, head_dim)
        v_rows = b64 * stride_vb + kv64 * stride_vh + n64 * stride_vl
        grad_rows = b64 * stride_gb + h64 * stride_gh + row64 * stride_gl
        v, grad = tile(v_ptr, v_rows, j_ok, e, value_dim), tile(grad_ptr, grad_rows, row_ok, e, value_dim)
        stats = (b64 * heads + h64) * q_len + row64
        top, inverse, delta = _row_stats(top_ptr, inverse_ptr, delta_ptr, stats, row_ok)
        top, inverse, delta = top[:, None], inverse[:, None], delta[:, None]
        q_square, k_square = 0.0, 0.0
        if SIMILARITY != DOT and not EXACT:
            q_square = tl.load(q_square_ptr + stats, mask=row_ok, other=0.0)[:, None]
            k_square = tl.load(k_square_ptr + (b64 * kv_heads + kv64) * k_len + n, mask=j_ok, other=0.0)[None, :]
        mask_offsets = b64 * stride_mb + h64 * stride_mh + row64[:, None] * stride_mi + n64[None, :] * stride_mj
        ds, _, _, _ = _score_gradients(
            q, k, v, grad, q_ptr, q_rows, row_ok, k_ptr, k_rows, j_ok, v_ptr, v_rows, grad_ptr, grad_rows, (row +
            offset)[:, None], n[None, :], row * 0 + head, row, top, inverse, delta, q_square, k_square, length, left,
            right, factor, softcap, slope, mask_ptr, mask_offsets, seed, threshold, keep_scale, batch_number, start,
            head_dim, value_dim, True, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, False, PRECISION,
            BLOCK_N,
        )  # fmt: skip
        acc, rest = add(acc, rest, ds)
    m, n = m_tile * BLOCK_M + tl.arange(0, BLOCK_M), n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    base = parts_ptr + ((part.to(tl.int64) * own_batch + own_b) * own_heads + own_head) * rows * columns
    if rows != q_len:
        across = tl.sum(acc, 0)
        if columns != k_len:
            tl.store(base, tl.sum(across, 0))
        else:
            tl.store(base + n, across, mask=n < columns)
    elif columns != k_len:
        tl.store(base + m, tl.sum(acc, 1), mask=m < rows)
    else:
        at = m.to(tl.int64)[:, None] * columns + n[None, :]
        tl.store(base + at, acc, mask=(m < rows)[:, None] & (n < columns)[None, :])


def attention_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """`mmkern::attention_bwd`: gradients of query, key, value, attn_mask, temperature, alibi_slopes and sinks, in their
    shapes; empty where the last argument's bit is not set."""
    *args, wanted = query, *rest
    check.attention(*args)
    check.attention_gradients(grad_out, grad_lse, out, lse, args, wanted)
    leaves = (*args[:4], args[8], args[12], args[14])
    found = [
        query.new_empty(0) if not wanted >> bit & 1 else like(t) if bit < 3 else t.new_empty(t.shape)
        for bit, t in enumerate(leaves)
    ]
    x = Inputs.of(*args)
    _, heads, _, q_len, _, _, value_dim = x.sizes
    if not lse.numel():
        return tuple(f.zero_() for f in found)
    grad_out, out = (flat(t) for t in (grad_out, out))
    if value_dim > 1 and grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if out.stride(-1) != 1:
        out = out.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.reshape(-1, heads, q_len)
    return _backward(x, grad_out, grad_lse, out, lse, found, wanted, args[3])


def _backward(
    x: Inputs, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, found: list[Tensor], wanted: int,
    mask: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, heads, kv_heads, q_len, k_len, _, value_dim = x.sizes
    want = [bool(wanted >> bit & 1) for bit in range(7)]
    keep, move, warps, stages = tiles(BACKWARD, x)
    options = {**x.flags, "num_warps": warps, "num_stages": stages}
    per_row = (batch, heads, q_len)
    delta, temperature, slopes, sinks = (
        lse.new_empty(per_row, dtype=torch.float32) if needed else None for needed in (True, *want[4:])
    )
    m_blocks = cdiv(q_len, keep)
    top, inverse = _sums(x, lse, options, False, keep, move)
    rows = batch * heads * q_len
    block_r = max(4096 // x.flags["BLOCK_V"], 1)
    launch(
        _rows_kernel, cdiv(rows, block_r), lse, grad_out, grad_lse, out, top, inverse, x.sinks, delta, sinks, rows,
        heads, q_len, value_dim, *grad_out.stride(), *out.stride()[:3], *(grad_lse.stride() if grad_lse is not None else
        (0, 0, 0)), x.sinks.stride(0) if x.sinks is not None else 0, NATURAL=x.natural, BLOCK_R=block_r,
        BLOCK_V=x.flags["BLOCK_V"],
    )  # fmt: skip
    pointers = (
        grad_out, top, inverse, delta, x.query, x.key, x.value, x.mask, x.temperature, x.slopes, x.lengths, x.seed,
        x.query_squares, x.key_squares,
    )  # fmt: skip
    numbers = (x.scale, x.softcap, x.threshold, x.keep_scale, x.left, x.right, int(x.lower_right), *x.sizes[1:])
    strides = tuple(n for t in (grad_out, x.query, x.key, x.value) for n in t.stride()[:3])
    terms = x.terms[:-1]
    if want[0] or want[4] or want[5]:
        grad_q = flat(found[0]) if want[0] else None
        launch(
            _queries_kernel, m_blocks * batch * heads, lse, *pointers, grad_q, temperature, slopes, *numbers, m_blocks,
            *strides, *(grad_q.stride()[:3] if grad_q is not None else (0, 0, 0)), *terms, **options, BLOCK_M=keep,
            BLOCK_N=move,
        )  # fmt: skip
    if want[1] or want[2]:
        grad_k, grad_v = (flat(found[i]) if want[i] else None for i in (1, 2))
        n_blocks = cdiv(k_len, keep)
        sums = _sums(x, lse, options, True, move, keep)
        launch(
            _keys_kernel, n_blocks * batch * kv_heads, lse, grad_out, *sums, *pointers[3:], grad_k, grad_v, *numbers,
            n_blocks, *strides, *(n for t in (grad_k, grad_v) for n in (t.stride()[:3] if t is not None else (0, 0,
            0))), *terms, **options, BLOCK_M=move, BLOCK_N=keep,
        )  # fmt: skip
    if want[3]:
        assert mask is not None
        _mask_gradient(x, mask, found[3], pointers, numbers, (*strides, *terms), (keep, move), options)
    for i, parts in ((4, temperature), (5, slopes), (6, sinks)):
        if parts is not None:
            sums = parts.sum(-1, dtype=torch.float64) if i == 5 else parts.sum((0, 2), dtype=torch.float64)
            found[i].copy_(sums.view(found[i].shape))
    return tuple(found)


def _sums(
    x: Inputs, lse: Tensor, options: dict[str, Any], transposed: bool, block_m: int, block_n: int
) -> tuple[Tensor, Tensor]:
    batch, heads, _, q_len = x.sizes[:4]
    top, inverse = lse.new_empty((2, batch, heads, q_len)).unbind()
    options = {name: value for name, value in options.items() if name not in ("SEEDS", "BLOCK_V")}
    m_blocks = cdiv(q_len, block_m)
    launch(
        _sums_kernel, m_blocks * batch * heads, lse, lse, top, inverse, x.query, x.key, x.mask, x.temperature, x.slopes,
        x.lengths, x.sinks, x.query_squares, x.key_squares, x.scale, x.softcap, x.left, x.right, int(x.lower_right),
        *x.sizes[1:6], m_blocks, *x.query.stride()[:3], *x.key.stride()[:3], *x.terms, **options, TRANSPOSED=transposed,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return top, inverse


def _mask_gradient(
    x: Inputs, mask: Tensor, out: Tensor, pointers: tuple[Any, ...], numbers: tuple[Any, ...], strides: tuple[int, ...],
    block: tuple[int, int], options: dict[str, Any],
) -> None:  # fmt: skip
    batch, heads = x.sizes[:2]
    lead, own = mask.shape[:-3], mask.shape[-3:]
    # A mask shared by some of several leading dims: one gradient for each batch entry, summed afterwards.
    own_batch = 1 if lead.numel() == 1 else batch
    own_heads, rows, columns = own
    pairs = (batch if own_batch == 1 else 1) * (heads if own_heads == 1 else 1)
    n_tiles = own_batch * own_heads * cdiv(rows, block[0]) * cdiv(columns, block[1])
    chunk = cdiv(pairs, min(pairs, cdiv(512, max(n_tiles, 1))))  # enough programs, by shape alone
    chunks = cdiv(pairs, chunk)
    parts = out.new_empty((chunks, own_batch, *own), dtype=torch.float32)
    launch(
        _mask_kernel, n_tiles * chunks, out, *pointers, parts, *numbers, rows, columns, own_batch, own_heads,
        heads if own_heads == 1 else 1, pairs, chunk, chunks, *strides, **options, BLOCK_M=block[0], BLOCK_N=block[1],
    )  # fmt: skip
    total = parts.sum(0)
    full = total.view(*(x.lead if own_batch > 1 else lead), *own)
    out.copy_(full.sum_to_size(out.shape))


def like(t: Tensor) -> Tensor:
    """Memory for a gradient of t in its layout, the last dim contiguous."""
    unit = t.shape[-1] <= 1 or t.stride(-1) == 1
    out = torch.empty_like(t if unit else t.contiguous())
    return out if t.shape[-1] <= 1 or out.stride(-1) == 1 else t.new_empty(t.shape)
