"""What the attention kernels, forward and backward, share: which keys a query sees, and its scores.

A tile of scores is addressed by `i` (positions of queries on the key axis) and `j` (keys), tensors that broadcast
against each other: (M, 1) and (1, N) in a tile of rows, (1, M) and (N, 1) in a transposed one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkern.kernels.numerics import LOG2E, dot, tanh, wide

# mmkern.reference.Similarity
DOT = tl.constexpr(0)
COSINE = tl.constexpr(1)
EUCLIDEAN = tl.constexpr(2)
SQUARED_EUCLIDEAN = tl.constexpr(3)
# kinds of attn_mask
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)


@triton.jit
def tile(ptr, rows, row_ok, columns, width):
    """Rows of a matrix whose last dim is contiguous; rows: int64 offsets. 0 outside."""
    return tl.load(ptr + rows[:, None] + columns[None, :], mask=row_ok[:, None] & (columns[None, :] < width), other=0.0)


@triton.jit
def key_length(lengths_ptr, stride_nb, batch, k_len):
    """How many keys of a batch entry are there; a length outside [0, k_len] counts as the nearer end."""
    length = k_len
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch * stride_nb), 0), k_len).to(tl.int32)
    return length


@triton.jit
def phases(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Blocks that cover [lo, hi), those within [full_lo, full_hi) apart: first, inner first, inner last, last.

    Inner blocks need no test of positions. Where there is none, inner first = inner last = first.
    """
    first = lo // BLOCK
    last = tl.maximum(tl.cdiv(hi, BLOCK), first)
    inner_first = tl.maximum(tl.cdiv(tl.maximum(full_lo, 0), BLOCK), first)
    inner_last = tl.minimum(tl.maximum(full_hi, 0) // BLOCK, last)
    none = inner_last <= inner_first
    inner_first = tl.where(none, first, inner_first)
    inner_last = tl.where(none, first, inner_last)
    return first, inner_first, inner_last, last


@triton.jit
def exp(x, NATURAL: tl.constexpr):
    """e^x, of x in natural units or (2^x) in those of base 2."""
    if NATURAL:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def distances(q_ptr, q_rows, q_ok, k_ptr, k_rows, k_ok, head_dim):
    """|q - k|^2 from the differences: q_rows, k_rows are offsets that broadcast to the tile. For float32, whose dot
    products run on the same units; with |q|^2 + |k|^2 - 2 q.k two close vectors would lose all digits."""
    total = tl.zeros_like(q_rows + k_rows).to(tl.float32)
    for d in range(0, head_dim):
        q = tl.load(q_ptr + q_rows + d, mask=q_ok, other=0.0)
        k = tl.load(k_ptr + k_rows + d, mask=k_ok, other=0.0)
        total += (q - k) * (q - k)
    return total


@triton.jit
def similarity(qk, q_square, k_square, SIMILARITY: tl.constexpr, EXACT: tl.constexpr):
    """From dot products (from squared distances, where EXACT) and squared norms that broadcast to the tile."""
    if SIMILARITY == COSINE:
        return qk * inverse_norm(q_square) * inverse_norm(k_square)
    elif SIMILARITY == EUCLIDEAN:
        return -tl.sqrt(squared_distance(qk, q_square, k_square, EXACT))
    elif SIMILARITY == SQUARED_EUCLIDEAN:
        return -squared_distance(qk, q_square, k_square, EXACT)
    else:
        return qk


@triton.jit
def inverse_norm(square):
    return 1.0 / tl.maximum(tl.sqrt(square), 1e-12, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def squared_distance(qk, q_square, k_square, EXACT: tl.constexpr):
    if EXACT:
        return qk
    else:
        return tl.maximum(q_square + k_square - 2.0 * qk, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scores(
    sim, i, j, i_ok, length, left, right, factor, softcap, slope, mask_ptr, mask_offsets,
    EDGE: tl.constexpr, MASK: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, minus infinity where hidden; which are visible; and tanh(score / softcap), for its slope.

    factor, softcap and slope bring the unit: natural where they or a float mask may hold numbers that times log2(e)
    overflow, else that of base 2. EDGE: positions have to be tested. `i_ok`: rows that exist.
    """
    s = sim * factor
    capped = s
    if CAPPED:
        capped = tanh(s / softcap)
        s = softcap * capped
    if SLOPED:
        s -= slope * tl.abs(i - j).to(tl.float32)
    visible = (i == i) & (j == j)
    if EDGE:
        visible = (j < length) & (j >= i - left) & (j <= i + right)
    if MASK == BOOL_MASK:
        visible = visible & (tl.load(mask_ptr + mask_offsets, mask=visible & i_ok, other=0) != 0)
    elif MASK == FLOAT_MASK:
        bias = wide(tl.load(mask_ptr + mask_offsets, mask=visible & i_ok, other=0.0))
        visible = visible & (bias != -float("inf"))
        s += bias
    if EDGE or MASK != NO_MASK:
        s = tl.where(visible, s, -float("inf"))
    return s, visible, capped


@triton.jit(do_not_specialize=["rows", "length"])
def squared_norms(
    x_ptr, out_ptr, rows, heads, length, dim, stride_xb, stride_xh, stride_xl,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """|x|^2 in float32 of each row of (batch, heads, length, dim); out is contiguous. One read of x."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = row // length
    offsets = (at // heads) * stride_xb + (at % heads) * stride_xh + (row % length) * stride_xl
    x = wide(tile(x_ptr, offsets, row < rows, tl.arange(0, BLOCK_D), dim))
    tl.store(out_ptr + row, tl.sum(x * x, 1), mask=row < rows)


@triton.jit
def products(
    x, x_ptr, x_rows, x_ok, y, y_ptr, y_rows, y_ok, width, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """x y^T (M, N), or y x^T (N, M) where TRANSPOSED, from tiles (M, D) and (N, D) and where their rows lie."""
    if x.dtype == tl.float32 and PRECISION == "ieee":
        # Without tensor cores a dot keeps all of its operands in registers: 16 columns at a time, from the cache.
        if TRANSPOSED:
            acc = tl.zeros([y.shape[0], x.shape[0]], tl.float32)
        else:
            acc = tl.zeros([x.shape[0], y.shape[0]], tl.float32)
        for start in tl.range(0, width, 16, num_stages=1):
            columns = start + tl.arange(0, 16)
            x_part = tile(x_ptr, x_rows, x_ok, columns, width)
            y_part = tile(y_ptr, y_rows, y_ok, columns, width)
            if TRANSPOSED:
                acc = dot(y_part, tl.trans(x_part), acc, PRECISION)
            else:
                acc = dot(x_part, tl.trans(y_part), acc, PRECISION)
        return acc
    elif TRANSPOSED:
        return dot(y, tl.trans(x), tl.zeros([y.shape[0], x.shape[0]], tl.float32), PRECISION)
    else:
        return dot(x, tl.trans(y), tl.zeros([x.shape[0], y.shape[0]], tl.float32), PRECISION)


@triton.jit
def query_key(
    q, q_ptr, q_rows, q_ok, k, k_ptr, k_rows, k_ok, head_dim,
    EXACT: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q k^T, as `products`; squared distances where EXACT."""
    if EXACT:
        if TRANSPOSED:
            return distances(q_ptr, q_rows[None, :], q_ok[None, :], k_ptr, k_rows[:, None], k_ok[:, None], head_dim)
        else:
            return distances(q_ptr, q_rows[:, None], q_ok[:, None], k_ptr, k_rows[None, :], k_ok[None, :], head_dim)
    else:
        return products(q, q_ptr, q_rows, q_ok, k, k_ptr, k_rows, k_ok, head_dim, TRANSPOSED, PRECISION)
