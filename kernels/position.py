"""Positional encodings added to activations or to looked-up embeddings: one read and one write of each element.

A program takes a block of positions, a block of channels and up to ENTRIES of the batch, and computes the encoding
once for all of them. Gradients of tables and embeddings sum in a fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels import check
from mmkern.kernels.launch import cdiv, launch, power_of_2
from mmkern.kernels.numerics import add, keep_tile, narrow, sincos, wide
from mmkern.kernels.turns import turns

NONE, SINUSOIDAL, SCALAR, SINCOS2D, TABLE = (tl.constexpr(i) for i in range(5))
_KINDS = {"none": NONE, "sinusoidal": SINUSOIDAL, "scalar": SCALAR, "sincos2d": SINCOS2D, "table": TABLE}
ENTRIES = 8
ELEMENTS = 2048  # of a tile
CHANNELS = 512  # of a tile, at most


@triton.jit
def _encoding(
    position, line, row_ok, start, dim, table_ptr, table_rows, stride_tr, stride_tc, turns_ptr,
    KIND: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows (M, BLOCK_D) from channel `start` on; position, line: int64 (M,). A position outside the table gives NaN."""
    column = start + tl.arange(0, BLOCK_D)
    if KIND == SINUSOIDAL:
        pair = start // 2 + tl.arange(0, BLOCK_D // 2)
        turn = tl.load(turns_ptr + pair, mask=pair < (dim + 1) // 2, other=0)
        sine, cosine = sincos(turn[None, :], position[:, None])
        return tl.reshape(tl.join(sine, cosine), [position.shape[0], BLOCK_D])
    elif KIND == SCALAR:
        sine, cosine = sincos(tl.load(turns_ptr), position)
        return (sine + cosine)[:, None] + tl.zeros([1, BLOCK_D], tl.float32)
    elif KIND == SINCOS2D:  # sines and cosines of the column, then of the row
        quarter, i = column // (dim // 4), column % (dim // 4)
        turn = tl.load(turns_ptr + i, mask=column < dim, other=0)
        axis = tl.where((quarter < 2)[None, :], position[:, None], line[:, None])
        sine, cosine = sincos(turn[None, :], axis)
        return tl.where((quarter % 2 == 0)[None, :], sine, cosine)
    elif KIND == TABLE:
        inside = (position >= 0) & (position < table_rows)
        ok = (row_ok & inside)[:, None] & (column < dim)[None, :]
        at = position[:, None] * stride_tr + column[None, :] * stride_tc
        return tl.where(inside[:, None], wide(tl.load(table_ptr + at, mask=ok, other=0.0)), float("nan"))
    else:
        return tl.zeros([position.shape[0], BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["length", "offset", "entries", "middle", "l_blocks", "table_rows", "rows"])
def _add_kernel(
    x_ptr, tokens_ptr, out_ptr, table_ptr, offsets_ptr, turns_ptr, seed_ptr, scale, threshold, keep_scale, offset,
    entries, middle, heads, height, per_offset, length, dim, rows, table_rows, l_blocks, d_blocks, stride_xb, stride_xm,
    stride_xl, stride_xd, stride_ne, stride_nl, stride_ob, stride_om, stride_ol, stride_tr, stride_tc, stride_fb,
    KIND: tl.constexpr, PER: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x (or, given tokens, rows of x = weight) times scale, plus the encoding, then dropout."""
    pid = tl.program_id(0)
    l = (pid % l_blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)  # noqa: E741
    start = (pid // l_blocks) % d_blocks * BLOCK_D
    first = pid // (l_blocks * d_blocks) * PER
    column = start + tl.arange(0, BLOCK_D)
    l_ok = l < length
    ok = l_ok[:, None] & (column < dim)[None, :]
    shared = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    if offsets_ptr is None and KIND != SINCOS2D:
        shared = _encoding(
            l + offset, l, l_ok, start, dim, table_ptr, table_rows, stride_tr, stride_tc, turns_ptr, KIND, BLOCK_D
        )
    zero = tl.full([], 0, tl.int64)
    for step in tl.range(first, tl.minimum(first + PER, entries)):
        entry = step + zero  # int64; the interpreter's is a plain number
        b, m = entry // middle, entry % middle
        if tokens_ptr is not None:
            token = tl.load(tokens_ptr + entry * stride_ne + l * stride_nl, mask=l_ok, other=0)
            known = (token >= 0) & (token < rows)
            at = tl.where(known, token, 0)[:, None] * stride_xl + column[None, :] * stride_xd
            x = tl.where(known[:, None], wide(tl.load(x_ptr + at, mask=ok, other=0.0)), float("nan"))
        else:
            at = b * stride_xb + m * stride_xm + l[:, None] * stride_xl + column[None, :] * stride_xd
            x = wide(tl.load(x_ptr + at, mask=ok, other=0.0))
        out = x * scale
        if offsets_ptr is None and KIND != SINCOS2D:
            out += shared
        else:
            position, line = l, l * 0 + entry % height
            if offsets_ptr is not None:
                position = l + offset + tl.load(offsets_ptr + entry // per_offset * stride_fb)
            out += _encoding(
                position, line, l_ok, start, dim, table_ptr, table_rows, stride_tr, stride_tc, turns_ptr, KIND, BLOCK_D
            )
        if seed_ptr is not None:
            i = l[:, None]
            keep = keep_tile(
                tl.load(seed_ptr), threshold, i * 0 + entry // heads, i * 0 + entry % heads, i, start, BLOCK_D
            )
            out = tl.where(keep, out * keep_scale, 0.0)
        at = b * stride_ob + m * stride_om + l[:, None] * stride_ol + column[None, :]
        tl.store(out_ptr + at, narrow(out, out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["offset", "entries", "middle", "length", "table_rows", "l_blocks"])
def _table_gradient_kernel(
    grad_ptr, out_ptr, offsets_ptr, seed_ptr, threshold, keep_scale, offset, entries, middle, heads, per_offset, length,
    dim, table_rows, l_blocks, stride_gb, stride_gm, stride_gl, stride_gd, stride_fb,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of the table: the gradients of every row it was added to, batch entries in order."""
    pid = tl.program_id(0)
    r = (pid % l_blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    start = pid // l_blocks * BLOCK_D
    column = start + tl.arange(0, BLOCK_D)
    acc, rest = tl.zeros([BLOCK_L, BLOCK_D], tl.float32), tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    zero = tl.full([], 0, tl.int64)
    for step in tl.range(0, entries):
        entry = step + zero  # int64; the interpreter's is a plain number
        b, m = entry // middle, entry % middle
        l = r - offset  # noqa: E741
        if offsets_ptr is not None:
            l = l - tl.load(offsets_ptr + entry // per_offset * stride_fb)  # noqa: E741
        l_ok = (l >= 0) & (l < length)
        at = b * stride_gb + m * stride_gm + l[:, None] * stride_gl + column[None, :] * stride_gd
        grad = wide(tl.load(grad_ptr + at, mask=l_ok[:, None] & (column < dim)[None, :], other=0.0))
        if seed_ptr is not None:
            i = l[:, None]
            keep = keep_tile(
                tl.load(seed_ptr), threshold, i * 0 + entry // heads, i * 0 + entry % heads, i, start, BLOCK_D
            )
            grad = tl.where(keep, grad * keep_scale, 0.0)
        acc, rest = add(acc, rest, grad)
    ok = (r < table_rows)[:, None] & (column < dim)[None, :]
    tl.store(out_ptr + r[:, None] * dim + column[None, :], narrow(acc, out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["length", "d_blocks"])
def _embedding_gradient_kernel(
    grad_ptr, out_ptr, starts_ptr, order_ptr, seed_ptr, scale, threshold, keep_scale, padding_idx, heads, length, dim,
    d_blocks, stride_gr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A row of the weight: the gradients of every place its token stands at, in their order."""
    pid = tl.program_id(0)
    token = (pid // d_blocks).to(tl.int64)
    start = pid % d_blocks * BLOCK_D
    column = start + tl.arange(0, BLOCK_D)
    first, last = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    last = tl.where(token == padding_idx, first, last)
    acc, rest = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for at in tl.range(first, last, BLOCK_R):
        place = at + tl.arange(0, BLOCK_R)
        row = tl.load(order_ptr + place, mask=place < last, other=0)
        ok = (place < last)[:, None] & (column < dim)[None, :]
        grad = wide(tl.load(grad_ptr + row[:, None] * stride_gr + column[None, :], mask=ok, other=0.0)) * scale
        if seed_ptr is not None:
            entry = row[:, None] // length
            keep = keep_tile(
                tl.load(seed_ptr), threshold, entry // heads, entry % heads, row[:, None] % length, start, BLOCK_D
            )
            grad = tl.where(keep, grad * keep_scale, 0.0)
        acc, rest = add(acc, rest, tl.sum(tl.where(ok, grad, 0.0), 0))
    tl.store(out_ptr + token * dim + column, narrow(acc, out_ptr.dtype.element_ty), mask=column < dim)


def has_rows(x: Tensor) -> bool:
    return (x.shape[-1] <= 1 or x.stride(-1) == 1) and (x.dim() <= 4 or x.is_contiguous())


def empty_rows(x: Tensor) -> Tensor:
    """Memory for a result in x's layout, where its last dim is contiguous."""
    out = torch.empty_like(x)
    return out if has_rows(x) and has_rows(out) else torch.empty_like(x.contiguous())


def rows_of(x: Tensor) -> Tensor:
    """x (..., length, dim) as (batch, middle, length, dim), its last dim contiguous; a view where x has rows."""
    x = x if has_rows(x) else x.contiguous()
    return x[None, None] if x.dim() == 2 else x.unsqueeze(1) if x.dim() == 3 else x.flatten(1, -3)


def _keep(dropout_p: float, seed: Tensor | None) -> tuple[int, float]:
    """Threshold of the words that are kept, and what those kept are multiplied by."""
    return round(dropout_p * 2**32), 1.0 if seed is None else 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)


def _frequencies(encoding: str, dim: int, device: torch.device) -> Tensor | None:
    if encoding == "sinusoidal":
        return turns((dim + 1) // 2, 10000.0, 2 / max(dim, 1), device)
    if encoding == "sincos2d":
        return turns(dim // 4, 10000.0, 4 / max(dim, 1), device)
    return turns(2, 10000.0, 1.0, device)[1:] if encoding == "scalar" else None


def _blocks(length: int, dim: int) -> tuple[int, int]:
    block_d = max(4, min(power_of_2(dim), CHANNELS))
    return max(1, min(power_of_2(length), ELEMENTS // block_d)), block_d


def add_positional_encoding_fwd(
    x: Tensor, encoding: str, table: Tensor | None, offset: int, offsets: Tensor | None, scale: float, dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mmkern::add_positional_encoding_fwd`: x (..., length, dim) -> the same shape."""
    check.given("x", x, rank=2)
    check.encoding(encoding, table, offset, offsets, x, x.shape)
    check.dropout(dropout_p, dropout_seed, x)
    out = empty_rows(x)
    heads = x.shape[-3] if x.dim() > 2 else 1
    rest = (encoding, table, offset, offsets, scale, dropout_p, dropout_seed, heads, x.shape)
    _add(rows_of(x), None, rows_of(out), *rest)
    return out


def embed_tokens_fwd(
    tokens: Tensor, weight: Tensor, encoding: str, table: Tensor | None, offset: int, offsets: Tensor | None,
    scale: float, dropout_p: float, padding_idx: int | None, dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mmkern::embed_tokens_fwd`: tokens (..., length), weight (vocabulary, dim) -> (..., length, dim)."""
    check.given("weight", weight, rank=2)
    check.given("weight", weight, shape=weight.shape[:2])
    check.given("tokens", tokens, weight, (torch.int64, torch.int32), rank=1)
    check.encoding(encoding, table, offset, offsets, weight, (*tokens.shape, weight.shape[1]))
    if padding_idx is not None:
        check.between("padding_idx", padding_idx, 0, weight.shape[0] - 1)
    check.dropout(dropout_p, dropout_seed, weight)
    out = weight.new_empty(*tokens.shape, weight.shape[1])
    entries, heads = tokens.shape[:-1].numel(), tokens.shape[-2] if tokens.dim() > 1 else 1
    view = out.view(entries, 1, *out.shape[-2:])
    tokens = tokens.reshape(entries, tokens.shape[-1])
    _add(weight, tokens, view, encoding, table, offset, offsets, scale, dropout_p, dropout_seed, heads, out.shape)
    return out


def _add(
    x: Tensor, tokens: Tensor | None, out: Tensor, encoding: str, table: Tensor | None, offset: int,
    offsets: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None, heads: int, shape: torch.Size,
) -> None:  # fmt: skip
    """out (batch, middle, length, dim), of a result of `shape`: its dim before the length is dropout's head and the
    row of a grid, its first has an offset for each entry."""
    if not out.numel():
        return
    batch, middle, length, dim = out.shape
    entries, (block_l, block_d) = batch * middle, _blocks(length, dim)
    l_blocks, d_blocks = cdiv(length, block_l), cdiv(dim, block_d)
    launch(
        _add_kernel, l_blocks * d_blocks * cdiv(entries, ENTRIES), out, x, tokens, out, table, offsets,
        _frequencies(encoding, dim, out.device), seed, scale, *_keep(dropout_p, seed), offset, entries, middle, heads,
        heads, entries // (shape[0] if len(shape) > 2 else 1), length, dim, x.shape[0],
        0 if table is None else table.shape[0], l_blocks, d_blocks,
        *(x.stride() if tokens is None else (0, 0, *x.stride())), *((0, 0) if tokens is None else tokens.stride()),
        *out.stride()[:3], *((0, 0) if table is None else table.stride()), 0 if offsets is None else offsets.stride(0),
        KIND=_KINDS[encoding].value, PER=ENTRIES, BLOCK_L=block_l, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def position_table_bwd(
    grad: Tensor, max_length: int, offset: int, offsets: Tensor | None, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:  # fmt: skip
    """`mmkern::position_table_bwd`: grad (..., length, dim) -> (max_length, dim)."""
    check.given("grad", grad, rank=2)
    check.encoding("none", None, offset, offsets, grad, grad.shape)
    check.dropout(dropout_p, dropout_seed, grad)
    check.between("max_length", max_length, 0, 2**62)
    out = grad.new_empty(max_length, grad.shape[-1])
    heads = grad.shape[-3] if grad.dim() > 2 else 1
    view = rows_of(grad)
    batch, middle, length, dim = view.shape
    if not view.numel():
        return out.zero_()
    block_l, block_d = _blocks(max_length, dim)
    l_blocks = cdiv(max_length, block_l)
    launch(
        _table_gradient_kernel, l_blocks * cdiv(dim, block_d), out, view, out, offsets, dropout_seed,
        *_keep(dropout_p, dropout_seed), offset, batch * middle, middle, heads,
        batch * middle // (grad.shape[0] if grad.dim() > 2 else 1), length, dim, max_length, l_blocks,
        *view.stride(), 0 if offsets is None else offsets.stride(0), BLOCK_L=block_l, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out


def embed_tokens_bwd(
    grad: Tensor, tokens: Tensor, vocabulary: int, scale: float, dropout_p: float, padding_idx: int | None,
    dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mmkern::embed_tokens_bwd`: grad (..., length, dim), tokens (..., length) -> (vocabulary, dim)."""
    check.given("grad", grad, rank=1)
    check.given("tokens", tokens, grad, (torch.int64, torch.int32), rank=1)
    check.given("grad", grad, shape=(*tokens.shape, grad.shape[-1]))
    check.dropout(dropout_p, dropout_seed, grad)
    check.between("vocabulary", vocabulary, 0, 2**62)
    if padding_idx is not None:
        check.between("padding_idx", padding_idx, 0, vocabulary - 1)
    dim = grad.shape[-1]
    out = grad.new_empty(vocabulary, dim)
    if not grad.numel():
        return out.zero_()
    rows = grad.reshape(-1, dim)
    rows = rows if dim == 1 or rows.stride(1) == 1 else rows.contiguous()
    ordered, order = tokens.flatten().sort(stable=True)  # equal tokens stay in the order of their places
    starts = torch.searchsorted(ordered, torch.arange(vocabulary + 1, device=tokens.device))
    block_d = max(4, min(power_of_2(dim), CHANNELS))
    d_blocks = cdiv(dim, block_d)
    launch(
        _embedding_gradient_kernel, vocabulary * d_blocks, out, rows, out, starts, order, dropout_seed, scale,
        *_keep(dropout_p, dropout_seed), -1 if padding_idx is None else padding_idx, tokens.shape[-2] if tokens.dim() >
        1 else 1, tokens.shape[-1], dim, d_blocks, rows.stride(0), BLOCK_R=16, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return out
