"""Attention forward: a block of queries against all keys it sees, with the online softmax.

Memory: q and out once, k and v once for each block of queries (in L2 mostly). Arithmetic: 4 M N D per tile on the
tensor cores, one exponential a score. Few queries (decoding) share a program with all heads of their group, and their
keys are split over programs, whose parts a second kernel merges in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mmkern.kernels import check
from mmkern.kernels.attention_scores import (
    BOOL_MASK,
    COSINE,
    DOT,
    FLOAT_MASK,
    NO_MASK,
    key_length,
    phases,
    query_key,
    scores,
    similarity,
    squared_norms,
    tile,
)
from mmkern.kernels.attention_scores import exp as _exp
from mmkern.kernels.launch import cdiv, launch, pick, power_of_2
from mmkern.kernels.numerics import LN2, LOG2E, dot, keep_tile, narrow, wide

SPLIT = 256  # keys of one part in decoding: 8 heads of 4096 keys fill 128 processors
PACKED_ROWS = 16  # up to so many queries, the heads of a group share a program
# What fits without spilling differs once scores need more than a scale and positions: with a mask, dropout, a softcap,
# slopes or another similarity. compute capability -> bytes of an element -> head dim up to -> (plain, with those), each
# rows of queries, of keys, warps, stages, whether keys and values come by TMA.
_Tiles = tuple[int, int, int, int, bool]
Table = dict[int, dict[int, dict[int, tuple[Any, Any]]]]
_SINGLE = {  # float32: no tensor cores unless torch allows tf32
    64: ((64, 32, 8, 1, False), (32, 16, 8, 1, False)),
    128: ((64, 16, 8, 1, False), (32, 16, 8, 1, False)),
    256: ((32, 16, 8, 1, False), (32, 16, 8, 1, False)),
    1024: ((16, 16, 16, 1, False), (16, 16, 16, 1, False)),
}
_WIDE = ((16, 16, 8, 1, False), (16, 16, 8, 1, False))
_SMALL = {  # 99 KiB of shared memory
    64: ((128, 64, 4, 3, False), (128, 64, 8, 2, False)),
    128: ((128, 64, 8, 2, False), (128, 32, 8, 2, False)),
    256: ((64, 32, 8, 2, False), (32, 32, 4, 1, False)),
    1024: _WIDE,
}
_OLD = {64: ((64, 64, 4, 1, False),) * 2, 128: ((32, 16, 4, 1, False),) * 2, 1024: _WIDE}
FORWARD: Table = {
    75: {2: _OLD, 4: _OLD},
    80: {
        2: {
            64: ((128, 64, 4, 3, False), (128, 64, 8, 2, False)),
            128: ((128, 64, 8, 2, False), (128, 32, 8, 2, False)),
            256: ((64, 64, 8, 2, False), (32, 32, 4, 1, False)),
            1024: _WIDE,
        },
        4: _SINGLE,
    },
    86: {2: _SMALL, 4: _SINGLE},
    90: {
        2: {
            64: ((128, 128, 8, 3, True), (128, 64, 8, 3, True)),
            128: ((128, 128, 8, 2, True), (128, 64, 8, 3, True)),
            256: ((64, 64, 8, 2, True), (64, 32, 8, 2, True)),
            1024: _WIDE,
        },
        4: _SINGLE,
    },
    100: {
        2: {
            64: ((128, 128, 8, 3, True), (64, 64, 4, 3, True)),
            128: ((128, 128, 8, 2, True), (128, 64, 8, 3, True)),
            256: ((64, 64, 8, 2, True), (64, 32, 8, 2, True)),
            1024: _WIDE,
        },
        4: _SINGLE,
    },
    120: {2: _SMALL, 4: _SINGLE},
}


@triton.jit
def _load(
    ptr, descriptor, batch, head, start, rows, row_ok, columns, width, N: tl.constexpr, EDGE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + N of keys or values of one head, through their descriptor where TMA."""
    if TMA:
        found = tl.reshape(descriptor.load([batch, head, start, 0]), [N, columns.shape[0]])
        if EDGE:  # padding may hold a NaN
            found = tl.where(row_ok[:, None], found, 0.0)
        return found
    else:
        return tile(ptr, rows, row_ok, columns, width)


@triton.jit
def _part_of(v, part):
    """For part 0 the finite values; for 1 and 2 where a value is plus or minus infinity, or NaN, which is both."""
    x = wide(v)
    finite = tl.abs(x) < float("inf")
    sign = tl.where(part == 1, float("inf"), -float("inf"))
    there = tl.where((x == sign) | (x != x), 1.0, 0.0)
    return narrow(tl.where(part == 0, tl.where(finite, x, 0.0), there), v.dtype)


@triton.jit
def _attend(
    acc, total, top, q, block, part, q_ptr, q_rows, row_ok, i, h, row, batch, kv_head, k_ptr, v_ptr, k_descriptor,
    v_descriptor, k_base, v_base, k_stride, v_stride, q_square, k_square_ptr, k_square_base, length, left, right,
    factor, softcap, slope, mask_ptr, mask_rows, mask_stride, seed, threshold, batch_number, k_len, head_dim, value_dim,
    EDGE: tl.constexpr, SALVAGE: tl.constexpr, NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr,
    SLOPED: tl.constexpr, DROPOUT: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of keys. SALVAGE: with `top` and `total` known, only `acc`, of one part of the values (`_part_of`)."""
    start = block * BLOCK_N
    j = start + tl.arange(0, BLOCK_N)
    j_ok = j < length
    k_rows = k_base + j.to(tl.int64) * k_stride
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    k = _load(k_ptr, k_descriptor, batch, kv_head, start, k_rows, j_ok, d, head_dim, BLOCK_N, EDGE, TMA)
    qk = query_key(q, q_ptr, q_rows, row_ok, k, k_ptr, k_rows, j_ok, head_dim, EXACT, False, PRECISION)
    k_square = 0.0
    if SIMILARITY != DOT and not EXACT:
        k_square = tl.load(k_square_ptr + k_square_base + j, mask=j_ok, other=0.0)[None, :]
    sim = similarity(qk, q_square, k_square, SIMILARITY, EXACT)
    s, visible, _ = scores(
        sim, i[:, None], j[None, :], row_ok[:, None], length, left, right, factor, softcap, slope, mask_ptr,
        mask_rows[:, None] + j.to(tl.int64)[None, :] * mask_stride, EDGE, MASK, CAPPED, SLOPED,
    )  # fmt: skip
    v_rows = v_base + j.to(tl.int64) * v_stride
    v = _load(v_ptr, v_descriptor, batch, kv_head, start, v_rows, j_ok, e, value_dim, BLOCK_N, EDGE, TMA)
    if SALVAGE:
        weight = _exp(s - top[:, None], NATURAL) / total[:, None]
        weight = tl.where(part == 0, weight, tl.where(visible & (s != -float("inf")), 1.0, 0.0))
        v = _part_of(v, part)
    else:
        highest = tl.maximum(top, tl.max(s, 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        weight = _exp(s - base[:, None], NATURAL)
        rescale = _exp(top - base, NATURAL)
        total = total * rescale + tl.sum(weight, 1)
        acc = acc * rescale[:, None]
        top = highest
    if DROPOUT:
        keep = keep_tile(seed, threshold, (row * 0 + batch_number)[:, None], h[:, None], row[:, None], start, BLOCK_N)
        weight = tl.where(keep, weight, 0.0)
    return dot(narrow(weight, v.dtype), v, acc, PRECISION), total, top


@triton.jit(do_not_specialize=["q_len", "k_len", "m_blocks", "splits", "split_len", "left", "right", "lower_right"])
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, out_ptr, lse_ptr, total_ptr, mask_ptr, temperature_ptr, slopes_ptr,
    lengths_ptr, sinks_ptr, seed_ptr, k_square_ptr, scale, softcap, threshold, keep_scale, left, right, lower_right,
    heads, kv_heads, q_len, k_len, head_dim, value_dim, m_blocks, splits, split_len, stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_os, stride_ob, stride_oh, stride_ol,
    stride_ls, stride_mb, stride_mh, stride_mi, stride_mj, stride_th, stride_ab, stride_ah, stride_nb, stride_sh,
    NATURAL: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SIMILARITY: tl.constexpr, EXACT: tl.constexpr,
    PACKED: tl.constexpr, SEEDS: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = 1.0 if NATURAL else 1.4426950408889634
    SLOPED: tl.constexpr = slopes_ptr is not None
    DROPOUT: tl.constexpr = seed_ptr is not None
    pid = tl.program_id(0)
    m_block = m_blocks - 1 - pid % m_blocks  # the longest rows of a causal mask first
    part = (pid // m_blocks) % splits
    unit = pid // (m_blocks * splits)
    group = heads // kv_heads
    r = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    if PACKED:  # rows are the queries of every head of the group
        batch, kv_head = unit // kv_heads, unit % kv_heads
        rows = group * q_len
        h, row = kv_head * group + r // q_len, r % q_len
        row_first, row_last = 0, q_len - 1
    else:
        batch, head = unit // heads, unit % heads
        kv_head = head // group
        rows = q_len
        h, row = r * 0 + head, r
        row_first, row_last = m_block * BLOCK_M, tl.minimum(m_block * BLOCK_M + BLOCK_M, q_len) - 1
    row_ok = r < rows
    b64, h64, row64 = batch.to(tl.int64), h.to(tl.int64), row.to(tl.int64)
    length = key_length(lengths_ptr, stride_nb, b64, k_len)
    offset = lower_right * (length - q_len)
    i = row + offset
    i_first, i_last = row_first + offset, row_last + offset

    factor = tl.full([BLOCK_M, 1], 1.0, tl.float32) * (scale * UNIT)
    if temperature_ptr is not None:
        factor = factor * tl.load(temperature_ptr + h64 * stride_th, mask=row_ok, other=0.0)[:, None]
    slope = 0.0
    if SLOPED:
        at = b64 * stride_ab + h64 * stride_ah
        slope = tl.load(slopes_ptr + at, mask=row_ok, other=0.0)[:, None] * UNIT
    seed, batch_number = 0, batch
    if DROPOUT:
        seed = tl.load(seed_ptr)
        if SEEDS > 1:
            batch_number = batch + tl.load(seed_ptr + 1).to(tl.int32)
    q_rows = b64 * stride_qb + h64 * stride_qh + row64 * stride_ql
    q = tile(q_ptr, q_rows, row_ok, tl.arange(0, BLOCK_D), head_dim)
    q_square = 0.0
    if SIMILARITY != DOT and not EXACT:
        q_square = tl.sum(wide(q) * wide(q), 1)[:, None]
    mask_rows = row64
    if MASK != NO_MASK:
        mask_rows = b64 * stride_mb + h64 * stride_mh + row64 * stride_mi
    kv64 = kv_head.to(tl.int64)
    k_base, v_base = b64 * stride_kb + kv64 * stride_kh, b64 * stride_vb + kv64 * stride_vh
    k_square_base = (b64 * kv_heads + kv64) * k_len

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    lo = tl.maximum(tl.maximum(i_first - left, 0), part * split_len)
    hi = tl.minimum(tl.minimum(i_last + right + 1, length), (part + 1) * split_len)
    first, inner_first, inner_last, last = phases(
        lo, hi, tl.maximum(i_last - left, lo), tl.minimum(i_first + right + 1, hi), BLOCK_N
    )
    for block in tl.range(inner_first, inner_last):
        acc, total, top = _attend(
            acc, total, top, q, block, 0, q_ptr, q_rows, row_ok, i, h, row, batch, kv_head, k_ptr, v_ptr, k_descriptor,
            v_descriptor, k_base, v_base, stride_kl, stride_vl, q_square, k_square_ptr, k_square_base, length, left,
            right, factor, softcap * UNIT, slope, mask_ptr, mask_rows, stride_mj, seed, threshold, batch_number, k_len,
            head_dim, value_dim, False, False, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, TMA,
            PRECISION, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    for edge in tl.range(first, last - (inner_last - inner_first)):
        block = tl.where(edge < inner_first, edge, edge + (inner_last - inner_first))
        acc, total, top = _attend(
            acc, total, top, q, block, 0, q_ptr, q_rows, row_ok, i, h, row, batch, kv_head, k_ptr, v_ptr, k_descriptor,
            v_descriptor, k_base, v_base, stride_kl, stride_vl, q_square, k_square_ptr, k_square_base, length, left,
            right, factor, softcap * UNIT, slope, mask_ptr, mask_rows, stride_mj, seed, threshold, batch_number, k_len,
            head_dim, value_dim, True, False, NATURAL, MASK, CAPPED, SLOPED, DROPOUT, SIMILARITY, EXACT, TMA, PRECISION,
            BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip

    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h64 * stride_sh, mask=row_ok, other=0.0) * UNIT
        highest = tl.maximum(top, sink)
        base = tl.where(highest == -float("inf"), 0.0, highest)
        rescale = _exp(top - base, NATURAL)
        total = total * rescale + _exp(sink - base, NATURAL)
        acc = acc * rescale[:, None]
        top = highest
    empty = total == 0.0
    stats = part * stride_ls + (b64 * heads + h64) * q_len + row64
    if total_ptr is None:
        lse = tl.where(empty, -float("inf"), top * (1.0 if NATURAL else LN2) + tl.log2(total) * LN2)
        tl.store(lse_ptr + stats, lse, mask=row_ok)
    else:  # of one part: at 1e9 a logarithm of the total would be lost in the sum
        tl.store(lse_ptr + stats, tl.where(empty, -float("inf"), top * (1.0 if NATURAL else LN2)), mask=row_ok)
        tl.store(total_ptr + stats, total, mask=row_ok)
    top = tl.where(top == -float("inf"), 0.0, top)
    out_rows = part * stride_os + b64 * stride_ob + h64 * stride_oh + row64 * stride_ol
    columns = tl.arange(0, BLOCK_V)
    out_ptrs = out_ptr + out_rows[:, None] + columns[None, :]
    out_ok = row_ok[:, None] & (columns[None, :] < value_dim)
    out = acc * tl.where(empty, 0.0, keep_scale / total)[:, None]
    tl.store(out_ptrs, narrow(out, out_ptr.dtype.element_ty), mask=out_ok)

    # A NaN or an infinity among the values: times a weight of 0 it is NaN, and here in every row of the block. So are
    # sums that overflowed before they were divided. Then once more, slowly: finite values, then where infinities count.
    # In narrow blocks, so that this costs the loops above no registers.
    broken = tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1))
    if broken > 0:
        total = tl.where(empty, 1.0, total)
        for part_of_values in tl.range(0, 3):
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            for block in tl.range(first * (BLOCK_N // 16), last * (BLOCK_N // 16), num_stages=1):
                acc, total, top = _attend(
                    acc, total, top, q, block, part_of_values, q_ptr, q_rows, row_ok, i, h, row, batch, kv_head, k_ptr,
                    v_ptr, None, None, k_base, v_base, stride_kl, stride_vl, q_square, k_square_ptr, k_square_base,
                    length, left, right, factor, softcap * UNIT, slope, mask_ptr, mask_rows, stride_mj, seed, threshold,
                    batch_number, k_len, head_dim, value_dim, True, True, NATURAL, MASK, CAPPED, SLOPED, DROPOUT,
                    SIMILARITY, EXACT, False, PRECISION, 16, BLOCK_D, BLOCK_V,
                )  # fmt: skip
            if part_of_values == 0:
                out = acc * keep_scale
            else:
                sign = tl.where(part_of_values == 1, float("inf"), -float("inf"))
                out = wide(tl.load(out_ptrs, mask=out_ok, other=0.0)) + tl.where(acc > 0.0, sign, 0.0)
            tl.store(out_ptrs, narrow(out, out_ptr.dtype.element_ty), mask=out_ok)


@triton.jit(do_not_specialize=["rows", "q_len", "splits"])
def _merge_kernel(
    parts_ptr, top_ptr, total_ptr, out_ptr, lse_ptr, sinks_ptr, rows, heads, q_len, value_dim, splits, stride_ps,
    stride_ob, stride_oh, stride_ol, stride_sh, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row: its parts over the keys, (splits, rows, value_dim) float32, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    head, columns = (row // q_len) % heads, tl.arange(0, BLOCK_V)
    sink = -float("inf")
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head * stride_sh)
    top = sink
    for start in tl.range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        part_top = tl.load(top_ptr + s * rows + row, mask=s < splits, other=-float("inf"))
        top = tl.maximum(top, tl.max(part_top, 0))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.exp2((sink - base) * LOG2E)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in tl.range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        part_top = tl.load(top_ptr + s * rows + row, mask=s < splits, other=-float("inf"))
        weight = tl.exp2((part_top - base) * LOG2E) * tl.load(total_ptr + s * rows + row, mask=s < splits, other=0.0)
        total += tl.sum(weight, 0)
        ok = (s < splits)[:, None] & (columns < value_dim)[None, :]
        at = s.to(tl.int64)[:, None] * stride_ps + row * value_dim + columns[None, :]
        values = tl.load(parts_ptr + at, mask=ok, other=0.0)
        # An infinite value counts however small its weight is.
        acc += tl.sum(tl.where(tl.abs(values) < float("inf"), weight[:, None] * values, values), 0)
    empty = total == 0.0
    tl.store(lse_ptr + row, tl.where(empty, -float("inf"), base + tl.log2(total) * LN2))
    out = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total))
    at = (row // (heads * q_len)) * stride_ob + head * stride_oh + (row % q_len) * stride_ol
    tl.store(out_ptr + at + columns, narrow(out, out_ptr.dtype.element_ty), mask=columns < value_dim)


@dataclass(frozen=True)
class Inputs:
    """Arguments of attention as kernels take them: four dims, the last contiguous; terms are expanded by stride."""

    lead: torch.Size
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    temperature: Tensor | None
    slopes: Tensor | None
    lengths: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    dropout_p: float
    left: int
    right: int
    lower_right: bool
    scale: float
    softcap: float
    similarity: int

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
        scale: float, similarity: int, temperature: Tensor | None, window_left: int, window_right: int, softcap: float,
        alibi_slopes: Tensor | None, key_lengths: Tensor | None, sinks: Tensor | None, causal_lower_right: bool,
        dropout_seed: Tensor | None,
    ) -> Inputs:  # fmt: skip
        lead, far = query.shape[:-3], query.shape[-2] + key.shape[-2]  # beyond `far` a window hides nothing
        right = far if window_right < 0 else min(window_right, far)
        if attn_mask is not None:
            attn_mask = attn_mask.view(torch.uint8) if attn_mask.dtype == torch.bool else attn_mask
            full = (*query.shape[:-1], key.shape[-2])
            attn_mask = flat(attn_mask.expand(*lead, *attn_mask.shape[-3:])).expand(-1, *full[-3:])
        return cls(
            lead,
            *(_last_contiguous(flat(_led(t, lead))) for t in (query, key, value)),
            attn_mask,
            temperature,
            None if alibi_slopes is None else alibi_slopes.expand(*lead, query.shape[-3]).reshape(-1, query.shape[-3]),
            None if key_lengths is None else key_lengths.expand(lead).reshape(-1),
            sinks,
            dropout_seed,
            dropout_p,
            far if window_left < 0 else min(window_left, far),
            0 if is_causal else right,
            causal_lower_right,
            scale,
            softcap,
            similarity,
        )

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """batch, heads, kv_heads, q_len, k_len, head_dim, value_dim."""
        batch, heads, q_len, head_dim = self.query.shape
        return batch, heads, self.key.shape[1], q_len, self.key.shape[2], head_dim, self.value.shape[3]

    @property
    def threshold(self) -> int:
        return round(self.dropout_p * 2**32)

    @property
    def keep_scale(self) -> float:
        return 1.0 if self.seed is None else 0.0 if self.dropout_p >= 1 else 1 / (1 - self.dropout_p)

    @property
    def mask_kind(self) -> int:
        kind = NO_MASK if self.mask is None else BOOL_MASK if self.mask.dtype == torch.uint8 else FLOAT_MASK
        return kind.value

    @property
    def natural(self) -> bool:
        """Whether scores stay in natural units: times log2(e), what a term, a cap or a large scale gives overflows."""
        terms = (self.temperature, self.slopes, self.sinks)
        base_2 = self.mask_kind != FLOAT_MASK.value and self.softcap == 0 and self.similarity == DOT.value
        return not (base_2 and all(t is None for t in terms) and abs(self.scale) * LOG2E.value <= 1)

    @property
    def exact(self) -> bool:
        """Whether distances come from differences."""
        return self.similarity > COSINE.value and self.query.dtype == torch.float32

    @property
    def busy(self) -> bool:
        terms = (self.mask, self.seed, self.slopes)
        return self.softcap > 0 or self.similarity != DOT.value or any(t is not None for t in terms)

    @cached_property
    def key_squares(self) -> Tensor | None:
        return self._squares(self.key)

    @cached_property
    def query_squares(self) -> Tensor | None:
        return self._squares(self.query)

    def _squares(self, x: Tensor) -> Tensor | None:
        if self.similarity == DOT.value or self.exact:
            return None
        batch, heads, length, dim = x.shape
        out = x.new_empty((batch, heads, length), dtype=torch.float32)
        rows, width = batch * heads * length, block(dim)
        launch(
            squared_norms, cdiv(rows, max(2048 // width, 1)), x, x, out, rows, heads, length, dim,
            *x.stride()[:3], BLOCK_R=max(2048 // width, 1), BLOCK_D=width,
        )  # fmt: skip
        return out

    @property
    def terms(self) -> tuple[int, ...]:
        """Strides of mask (b, h, i, j), temperature (h), slopes (b, h), lengths (b) and sinks (h)."""
        counts = ((self.mask, 4), (self.temperature, 1), (self.slopes, 2), (self.lengths, 1), (self.sinks, 1))
        return tuple(n for t, dims in counts for n in ((0,) * dims if t is None else t.stride()))

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time choices that forward and backward share."""
        return {
            "NATURAL": self.natural,
            "MASK": self.mask_kind,
            "CAPPED": self.softcap > 0,
            "SIMILARITY": self.similarity,
            "EXACT": self.exact,
            "SEEDS": 0 if self.seed is None else self.seed.numel(),
            "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            "BLOCK_D": block(self.query.shape[3]),
            "BLOCK_V": block(self.value.shape[3]),
        }


def flat(t: Tensor) -> Tensor:
    """Leading dims as one: a view where strides allow."""
    return t if t.dim() == 4 else t.reshape(t.shape[:-3].numel(), *t.shape[-3:])


def _led(t: Tensor, lead: torch.Size) -> Tensor:
    return t if t.shape[:-3] == lead else t.expand(*lead, *t.shape[-3:])


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def block(width: int) -> int:
    """Power of two that holds a row; 16 is the least of a tensor core."""
    return max(16, power_of_2(width))


def tiles(table: Table, x: Inputs) -> Any:
    """The table's row for the device, the dtype, the wider of the two head dims, and what scores need."""
    by_dim = pick(table, x.query.device)[x.query.element_size()]
    dim = max(x.query.shape[3], x.value.shape[3])
    plain, busy = by_dim[min(most for most in by_dim if most >= dim)]
    return busy if x.busy else plain


def describable(t: Tensor) -> bool:
    """Whether TMA can read it: 16-byte strides and start, nothing empty or broadcast."""
    unit = 16 // t.element_size()
    return t.numel() > 0 and t.data_ptr() % 16 == 0 and all(s % unit == 0 and s > 0 for s in t.stride()[:3])


def attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """`mmkern::attention_fwd`: query (B..., H, L, E), key (B..., K, S, E), value (B..., K, S, V) and the rest
    -> (B..., H, L, V) in query's memory order, and the log-sum-exp (B..., H, L) in float32."""
    check.attention(*args)
    query, value = args[0], args[2]
    out = empty_output(query, value.shape[-1])
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    x = Inputs.of(*args)
    if lse.numel():
        _forward(x, out.flatten(0, -4) if out.dim() > 4 else out, lse)
    return out, lse


def empty_output(query: Tensor, value_dim: int) -> Tensor:
    """Memory for (B..., H, L, V), as mmkern.reference.empty_output: the dims before the heads lie as one."""
    heads, q_len, head_dim = query.shape[-3:]
    if query.dim() == 4 and value_dim == head_dim and (head_dim <= 1 or query.stride(-1) == 1):
        out = torch.empty_like(query)
        if head_dim <= 1 or out.stride(-1) == 1:
            return out
    if query.stride(-3) < query.stride(-2):
        return query.new_empty((*query.shape[:-3], q_len, heads, value_dim)).transpose(-3, -2)
    return query.new_empty((*query.shape[:-1], value_dim))


def _forward(x: Inputs, out: Tensor, lse: Tensor) -> None:
    batch, heads, kv_heads, q_len, k_len, head_dim, value_dim = x.sizes
    block_m, block_n, warps, stages, tma = tiles(FORWARD, x)
    packed = q_len <= PACKED_ROWS and heads > kv_heads
    rows = q_len * (heads // kv_heads if packed else 1)
    splits, split_len = 1, max(k_len, 1)
    if rows <= 64:
        block_m = min(block_m, max(16, power_of_2(rows)))
        # Four warps of head dim 128 have too few registers on sm_90: 8 bytes were spilled.
        block_n, warps = min(block_n, 64), min(warps, 4 if max(head_dim, value_dim) <= 64 else 8)
        if k_len > SPLIT:  # by the shape of one sequence alone: the bits must not depend on who is in the batch
            splits, split_len = cdiv(k_len, SPLIT), SPLIT
    parts, tops, totals = out, lse, None
    if splits > 1:
        parts = out.new_empty((splits, batch, heads, q_len, value_dim), dtype=torch.float32)
        tops, totals = lse.new_empty((2, splits, *lse.shape)).unbind()
    key, value = x.key, x.value
    tma = tma and describable(key) and describable(value)
    descriptors = [None, None]
    if tma:
        descriptors = [
            TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, block_n, block(t.shape[3])])
            for t in (key, value)
        ]
    m_blocks = cdiv(rows, block_m)
    launch(
        _attention_fwd_kernel, m_blocks * splits * batch * (kv_heads if packed else heads), x.query, x.query, key,
        value, *descriptors, parts, tops, totals, x.mask, x.temperature, x.slopes, x.lengths, None if splits > 1 else
        x.sinks, x.seed, x.key_squares, x.scale, x.softcap, x.threshold, x.keep_scale, x.left, x.right,
        int(x.lower_right), heads, kv_heads, q_len, k_len, head_dim, value_dim, m_blocks, splits, split_len,
        *x.query.stride()[:3], *key.stride()[:3], *value.stride()[:3], parts.stride(0) if splits > 1 else 0,
        *parts.stride()[-4:-1], lse.numel(), *x.terms, **x.flags, PACKED=packed, TMA=tma, BLOCK_M=block_m,
        BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        launch(
            _merge_kernel, lse.numel(), out, parts, tops, totals, out, lse, x.sinks, lse.numel(), heads, q_len,
            value_dim, splits, parts.stride(0), *out.stride()[:3], 0 if x.sinks is None else x.sinks.stride(0),
            BLOCK_S=16, BLOCK_V=block(value_dim), num_warps=4,
        )  # fmt: skip
