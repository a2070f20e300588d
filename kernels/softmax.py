"""Softmax, log-softmax and masked softmax: a row that fits stays on chip, so each element is read and written once.

Wider rows are read twice: once for the maximum and the sum, online, and once to write. So are those of masked
softmax; where they fit on chip, the second time from the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels import check
from mmkern.kernels.launch import launch
from mmkern.kernels.numerics import LN2, LOG2E, add, keep_at, keep_tile, narrow, wide
from mmkern.kernels.rows import at, collapsed, like_input, place

NO_TERM, BOOL_TERM, FLOAT_TERM = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _softmax_kernel(
    x_ptr, out_ptr, n1, n2, inner, width, x0, x1, x2, x3, xn, y0, y1, y2, y3, yn,
    LOG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    a, b, c, i, ok = place(tl.program_id(0), n1, n2, inner, ROWS)
    x_rows, out_rows = at(a, b, c, i, x0, x1, x2, x3), at(a, b, c, i, y0, y1, y2, y3)
    n = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    if ON_CHIP:
        inside = ok[:, None] & (n < width)
        x = wide(tl.load(x_ptr + x_rows + n * xn, mask=inside, other=-float("inf")))
        x = x - tl.max(x, 1)[:, None]
        e = tl.where(inside, tl.exp2(x * LOG2E), 0.0)
        total = tl.sum(e, 1)[:, None]
        if LOG:
            y = x - tl.log2(total) * LN2
        else:
            y = e / total
        tl.store(out_ptr + out_rows + n * yn, narrow(y, out_ptr.dtype.element_ty), mask=inside)
    else:
        top = tl.full([ROWS], -float("inf"), tl.float32)
        total, rest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, width, COLUMNS):
            inside = ok[:, None] & (start + n < width)
            x = wide(tl.load(x_ptr + x_rows + (start + n) * xn, mask=inside, other=-float("inf")))
            highest = tl.maximum(top, tl.max(x, 1))
            base = tl.where(highest == -float("inf"), 0.0, highest)
            down = tl.exp2((top - base) * LOG2E)
            total, rest = add(total * down, rest * down, tl.sum(tl.exp2((x - base[:, None]) * LOG2E), 1))
            top = highest
        top, total = top[:, None], total[:, None]
        for start in tl.range(0, width, COLUMNS):
            inside = ok[:, None] & (start + n < width)
            x = wide(tl.load(x_ptr + x_rows + (start + n) * xn, mask=inside, other=-float("inf"))) - top
            if LOG:
                y = x - tl.log2(total) * LN2
            else:
                y = tl.exp2(x * LOG2E) / total
            tl.store(out_ptr + out_rows + (start + n) * yn, narrow(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_bwd_kernel(
    grad_ptr, y_ptr, out_ptr, n1, n2, inner, width, g0, g1, g2, g3, gn, y0, y1, y2, y3, yn, o0, o1, o2, o3, on,
    LOG: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """From the output y: y (g - sum g y), or g - exp(y) sum g."""
    a, b, c, i, ok = place(tl.program_id(0), n1, n2, inner, ROWS)
    g_rows, y_rows = at(a, b, c, i, g0, g1, g2, g3), at(a, b, c, i, y0, y1, y2, y3)
    out_rows = at(a, b, c, i, o0, o1, o2, o3)
    n = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    if ON_CHIP:
        inside = ok[:, None] & (n < width)
        g = wide(tl.load(grad_ptr + g_rows + n * gn, mask=inside, other=0.0))
        y = wide(tl.load(y_ptr + y_rows + n * yn, mask=inside, other=0.0))
        if LOG:
            found = g - tl.exp2(y * LOG2E) * tl.sum(g, 1)[:, None]
        else:
            found = y * (g - tl.sum(g * y, 1)[:, None])
        tl.store(out_ptr + out_rows + n * on, narrow(found, out_ptr.dtype.element_ty), mask=inside)
    else:
        total, rest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        for start in tl.range(0, width, COLUMNS):
            inside = ok[:, None] & (start + n < width)
            g = wide(tl.load(grad_ptr + g_rows + (start + n) * gn, mask=inside, other=0.0))
            if not LOG:
                g = g * wide(tl.load(y_ptr + y_rows + (start + n) * yn, mask=inside, other=0.0))
            total, rest = add(total, rest, tl.sum(g, 1))
        for start in tl.range(0, width, COLUMNS):
            inside = ok[:, None] & (start + n < width)
            g = wide(tl.load(grad_ptr + g_rows + (start + n) * gn, mask=inside, other=0.0))
            y = wide(tl.load(y_ptr + y_rows + (start + n) * yn, mask=inside, other=0.0))
            if LOG:
                found = g - tl.exp2(y * LOG2E) * total[:, None]
            else:
                found = y * (g - total[:, None])
            tl.store(out_ptr + out_rows + (start + n) * on, narrow(found, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scores(
    x, inside, mask_ptr, mask_at, bias_ptr, bias_at, scale, MASK: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """scale * x + bias + mask, minus infinity where hidden; and what is not hidden."""
    visible = inside
    s = x * scale
    if BIAS == FLOAT_TERM:
        bias = wide(tl.load(bias_ptr + bias_at, mask=inside, other=0.0))
        visible = visible & (bias != -float("inf"))
        s += bias
    if MASK == BOOL_TERM:
        visible = visible & (tl.load(mask_ptr + mask_at, mask=inside, other=0) != 0)
    elif MASK == FLOAT_TERM:
        mask = wide(tl.load(mask_ptr + mask_at, mask=inside, other=0.0))
        visible = visible & (mask != -float("inf"))
        s += mask
    return tl.where(visible, s, -float("inf")), visible


@triton.jit
def _kept(seed_ptr, threshold, linear, start, dims1, dims2, dims3, LAST: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements dropout keeps, by their places in the contiguous result; LAST: its rows are those reduced."""
    seed = tl.load(seed_ptr)
    if LAST:
        row = tl.min(linear, 1)[:, None] // dims3
        return keep_tile(seed, threshold, row // (dims1 * dims2), row // dims2 % dims1, row % dims2, start, COLUMNS)
    else:
        row = linear // dims3
        return keep_at(seed, threshold, row // (dims1 * dims2), row // dims2 % dims1, row % dims2, linear % dims3)


@triton.jit
def _masked_kernel(
    x_ptr, out_ptr, mask_ptr, bias_ptr, seed_ptr, grad_ptr, y_ptr, scale, grad_scale, threshold, keep_scale, dims1,
    dims2, dims3, n1, n2, inner, width, x0, x1, x2, x3, xn, o0, o1, o2, o3, on, m0, m1, m2, m3, mn, b0, b1, b2, b3, bn,
    g0, g1, g2,
    g3, gn, MASK: tl.constexpr, BIAS: tl.constexpr, BACKWARD: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Forward: weights of each row, dropped. BACKWARD: the gradient of its scores, times grad_scale, from grad and
    either the weights y or, without them, x."""
    a, b, c, i, ok = place(tl.program_id(0), n1, n2, inner, ROWS)
    x_rows, out_rows = at(a, b, c, i, x0, x1, x2, x3), at(a, b, c, i, o0, o1, o2, o3)
    mask_rows, bias_rows = at(a, b, c, i, m0, m1, m2, m3), at(a, b, c, i, b0, b1, b2, b3)
    g_rows = at(a, b, c, i, g0, g1, g2, g3)
    n = tl.arange(0, COLUMNS).to(tl.int64)[None, :]
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total, rest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    base = tl.zeros([ROWS], tl.float32)
    if y_ptr is None:
        for start in tl.range(0, width, COLUMNS):
            inside = ok[:, None] & (start + n < width)
            x = wide(tl.load(x_ptr + x_rows + (start + n) * xn, mask=inside, other=0.0))
            s, _ = _scores(
                x, inside, mask_ptr, mask_rows + (start + n) * mn, bias_ptr, bias_rows + (start + n) * bn, scale, MASK,
                BIAS,
            )  # fmt: skip
            highest = tl.maximum(top, tl.max(s, 1))
            base = tl.where(highest == -float("inf"), 0.0, highest)
            down = tl.exp2((top - base) * LOG2E)
            total, rest = add(total * down, rest * down, tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1))
            top = highest
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None]
    delta, rest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for way in tl.static_range(2 if BACKWARD else 1):  # backward: the row's sum, then its gradients
        for start in tl.range(0, width, COLUMNS):
            inside = ok[:, None] & (start + n < width)
            at_out = out_rows + (start + n) * on
            x = tl.zeros([ROWS, COLUMNS], tl.float32)
            if y_ptr is None:
                x = wide(tl.load(x_ptr + x_rows + (start + n) * xn, mask=inside, other=0.0))
            s, visible = _scores(
                x, inside, mask_ptr, mask_rows + (start + n) * mn, bias_ptr, bias_rows + (start + n) * bn, scale, MASK,
                BIAS,
            )  # fmt: skip
            if y_ptr is None:
                w = tl.exp2((s - base[:, None]) * LOG2E) * inverse
            else:
                w = wide(tl.load(y_ptr + at_out, mask=inside, other=0.0))
            if BACKWARD:
                g = wide(tl.load(grad_ptr + g_rows + (start + n) * gn, mask=inside, other=0.0))
                if seed_ptr is not None:
                    keep = _kept(seed_ptr, threshold, at_out, start, dims1, dims2, dims3, LAST, COLUMNS)
                    g = tl.where(keep, g * keep_scale, 0.0)
                g, w = tl.where(visible, g, 0.0), tl.where(visible, w, 0.0)
                if way == 0:
                    delta, rest = add(delta, rest, tl.sum(g * w, 1))
                else:
                    found = tl.where(visible, w * (g - delta[:, None]), 0.0) * grad_scale
                    tl.store(out_ptr + at_out, narrow(found, out_ptr.dtype.element_ty), mask=inside)
            else:
                if seed_ptr is not None:
                    keep = _kept(seed_ptr, threshold, at_out, start, dims1, dims2, dims3, LAST, COLUMNS)
                    w = tl.where(keep, w * keep_scale, 0.0)
                tl.store(out_ptr + at_out, narrow(w, out_ptr.dtype.element_ty), mask=inside)


def _run(kernel: object, tensors: list[Tensor], dim: int, log: bool) -> None:
    """tensors: inputs, then the result."""
    if not tensors[-1].numel():
        return
    given, rows = collapsed(list(tensors), dim)
    block_r, columns, warps = rows.blocks(len(given) - 1)
    launch(
        kernel, rows.programs(block_r), tensors[-1], *given, *rows.shape[1:], *rows.all_strides,
        LOG=log, ROWS=block_r, COLUMNS=columns, ON_CHIP=columns >= rows.width, num_warps=warps,
    )  # fmt: skip


def softmax_fwd(input: Tensor, dim: int) -> Tensor:
    """`mmkern::softmax_fwd`: any shape -> the same, contiguous."""
    check.softmax(input, dim)
    out = like_input(input)
    _run(_softmax_kernel, [input, out], dim, False)
    return out


def log_softmax_fwd(input: Tensor, dim: int) -> Tensor:
    """`mmkern::log_softmax_fwd`."""
    check.softmax(input, dim)
    out = like_input(input)
    _run(_softmax_kernel, [input, out], dim, True)
    return out


def softmax_out(input: Tensor, dim: int, out: Tensor) -> None:
    """`mmkern::softmax_out`: into `out`, which may be `input`: rows on chip are read before they are written."""
    _into(input, dim, out, False)


def log_softmax_out(input: Tensor, dim: int, out: Tensor) -> None:
    """`mmkern::log_softmax_out`."""
    _into(input, dim, out, True)


def _into(input: Tensor, dim: int, out: Tensor, log: bool) -> None:
    check.softmax(input, dim, ("out", out))
    check.writable("out", out)
    overlaps = input.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    same = input.data_ptr() == out.data_ptr() and input.stride() == out.stride()
    if overlaps and not same:
        input = input.clone()
    if out.dim() > 5 and not out.is_contiguous():
        fresh = like_input(out)
        _run(_softmax_kernel, [input, fresh], dim, log)
        out.copy_(fresh)
    else:
        _run(_softmax_kernel, [input, out], dim, log)


def softmax_bwd(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """`mmkern::softmax_bwd`: from the gradient of the output, and the output."""
    check.softmax(output, dim, ("grad", grad), name="output")
    out = like_input(output)
    _run(_softmax_bwd_kernel, [grad, output, out], dim, False)
    return out


def log_softmax_bwd(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """`mmkern::log_softmax_bwd`."""
    check.softmax(output, dim, ("grad", grad), name="output")
    out = like_input(output)
    _run(_softmax_bwd_kernel, [grad, output, out], dim, True)
    return out


def _term(t: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """A mask or bias in x's shape, by its strides, and its kind."""
    if t is None:
        return None, NO_TERM.value
    kind = BOOL_TERM if t.dtype == torch.bool else FLOAT_TERM
    return (t.view(torch.uint8) if kind is BOOL_TERM else t).expand(x.shape), kind.value


def _masked(
    x: Tensor | None, out: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None, dim: int, dropout_p: float,
    seed: Tensor | None, grad: Tensor | None = None, output: Tensor | None = None, grad_scale: float = 1.0,
) -> None:  # fmt: skip
    """The weights of x; given grad, the gradient of scores from x or from the weights `output`, which is contiguous."""
    if not out.numel():
        return
    (term, kind), (added, added_kind) = _term(mask, out), _term(bias, out)
    (x, _, term, added, grad_), rows = collapsed([out if x is None else x, out, term, added, grad], dim)
    block_r, columns, warps = rows.blocks(2)
    shape = (1,) * max(0, 3 - out.dim()) + tuple(out.shape)
    keep_scale = 1.0 if seed is None else 0.0 if dropout_p >= 1 else 1 / (1 - dropout_p)
    launch(
        _masked_kernel, rows.programs(block_r), out, x, out, term, added, seed, grad_, output, scale, grad_scale,
        round(dropout_p * 2**32), keep_scale, *shape[-3:], *rows.shape[1:], *rows.all_strides, MASK=kind,
        BIAS=added_kind, BACKWARD=grad is not None, LAST=dim == out.dim() - 1, ROWS=block_r, COLUMNS=columns,
        num_warps=warps,
    )  # fmt: skip


def masked_softmax_fwd(
    x: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None, dim: int, dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """`mmkern::masked_softmax_fwd`."""
    check.masked_softmax(x, mask, scale, bias, dim, dropout_p, dropout_seed)
    out = like_input(x)
    _masked(x, out, mask, scale, bias, dim, dropout_p, dropout_seed)
    return out


def masked_softmax_bwd(
    grad: Tensor, output: Tensor | None, x: Tensor | None, mask: Tensor | None, scale: float, bias: Tensor | None,
    dim: int, dropout_p: float, dropout_seed: Tensor | None, wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`mmkern::masked_softmax_bwd`: gradients of x, mask and bias, empty where their bit is not set."""
    source = output if dropout_seed is None else x
    if source is None or (x is not None and output is not None):
        check.refuse("output, x", "one of them: x with dropout_seed, output without")
    name = "output" if dropout_seed is None else "x"
    check.masked_softmax(source, mask, scale, bias, dim, dropout_p, dropout_seed, name)
    check.given("grad", grad, source, (source.dtype,), source.shape)
    check.wanted(wanted, (source, mask, bias))
    rest = (mask, scale, bias, dim, dropout_p, dropout_seed, grad, output)
    found = [grad.new_empty(0)] * 3
    if wanted & 1:
        found[0] = like_input(grad)
        _masked(x, found[0], *rest, scale)
    if wanted & 6:
        # What mask and bias sum over, whatever their shape: the gradient of the scores, in float32.
        scores = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        _masked(x, scores, *rest)
        for place, term in ((1, mask), (2, bias)):
            if wanted >> place & 1 and term is not None:
                found[place] = scores.sum_to_size(term.shape).to(term.dtype).contiguous()
    return found[0], found[1], found[2]
