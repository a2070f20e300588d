"""Cross-entropy and its gradient in one pass: logits read once, twice where a row does not stay on chip.

Gradients for float16 logits are kept without the mean's divisor, which would underflow; backward divides.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkern.kernels import check
from mmkern.kernels.launch import launch
from mmkern.kernels.numerics import LN2, LOG2E, add, narrow, wide
from mmkern.kernels.rows import Rows, at, place

MEAN = 1


@triton.jit
def _cross_entropy_kernel(
    x_ptr, target_ptr, weight_ptr, divisor_ptr, loss_ptr, grad_ptr, grad_target_ptr, smoothing, ignore_index, n1, n2,
    inner, width, x0, x1, x2, x3, xn, g0, g1, g2, g3, gn, t0, t1, t2, t3, tn, d0, d1, d2, d3, dn, l0, l1, l2, l3,
    SOFT: tl.constexpr, SMOOTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ON_CHIP: tl.constexpr,
):  # fmt: skip
    """-sum_c w_c t_c log softmax(x)_c of each row, with t its target, smoothed; slope_c = p_c sum(w t) - w_c t_c."""
    a, b, c, i, ok = place(tl.program_id(0), n1, n2, inner, ROWS)
    x_rows, g_rows = at(a, b, c, i, x0, x1, x2, x3), at(a, b, c, i, g0, g1, g2, g3)
    t_rows, d_rows = at(a, b, c, i, t0, t1, t2, t3), at(a, b, c, i, d0, d1, d2, d3)
    n = tl.arange(0, COLUMNS)[None, :]
    share = smoothing / width
    keep = 1.0 - smoothing
    target = tl.full([ROWS, 1], -1, tl.int64)
    hidden = ok[:, None] & False
    own = tl.full([ROWS, 1], 1.0, tl.float32)
    if not SOFT:
        target = tl.load(target_ptr + t_rows, mask=ok[:, None], other=0)
        hidden = target == ignore_index
        known = (target >= 0) & (target < width)
        if weight_ptr is not None:
            own = wide(tl.load(weight_ptr + target, mask=known & ok[:, None], other=0.0))
        own = tl.where(hidden, 0.0, tl.where(known, own, float("nan")))  # no value is read before the launch: NaN shows
    visible = ok[:, None] & (hidden == 0)

    # One pass, online: the maximum, the sum of exponentials, and sums of terms and of terms times logits.
    top = tl.full([ROWS, 1], -float("inf"), tl.float32)
    base = tl.zeros([ROWS, 1], tl.float32)  # the maximum where finite: what sums are relative to
    total, terms = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    rest, terms_rest, dots_rest = total, total, total
    dots, x_own = tl.zeros([ROWS, 1], tl.float32), tl.zeros([ROWS, 1], tl.float32)
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, width, COLUMNS):
        m = start + n
        inside = visible & (m < width)
        x = wide(tl.load(x_ptr + x_rows + m.to(tl.int64) * xn, mask=inside, other=-float("inf")))
        highest = tl.maximum(top, tl.max(x, 1)[:, None])
        before, base = base, tl.where(tl.abs(highest) < float("inf"), highest, 0.0)
        down = tl.exp2((top - base) * LOG2E)
        total, rest = add(total * down, rest * down, tl.sum(tl.exp2((x - base) * LOG2E), 1)[:, None])
        top = highest
        if SOFT or SMOOTH:
            w = tl.full([1, COLUMNS], 1.0, tl.float32)
            if weight_ptr is not None:
                w = wide(tl.load(weight_ptr + m, mask=m < width, other=0.0))
            term = w * share
            if SOFT:
                t = wide(tl.load(target_ptr + t_rows + m.to(tl.int64) * tn, mask=inside, other=0.0))
                term = w * (keep * t + share)
            moved = tl.where(terms == 0.0, 0.0, terms * (before - base))
            dots, dots_rest = add(dots, dots_rest, moved + tl.sum(tl.where(inside, term * (x - base), 0.0), 1)[:, None])
            terms, terms_rest = add(terms, terms_rest, tl.sum(tl.where(inside, term, 0.0), 1)[:, None])
        if not SOFT:
            x_own += tl.sum(tl.where(inside & (m == target), x, 0.0), 1)[:, None]
    log_total = tl.where(top == float("inf"), float("nan"), tl.log2(total))
    loss = terms * (log_total * LN2) - dots
    if not SOFT:
        loss += keep * own * (base - x_own + log_total * LN2)
        terms += keep * own
    loss = tl.where(hidden, 0.0, loss)
    row = at(a, b, c, i, l0, l1, l2, l3)
    tl.store(loss_ptr + row, loss, mask=ok[:, None])

    inverse = 1.0
    if divisor_ptr is not None:
        inverse = 1.0 / tl.load(divisor_ptr)
    if grad_ptr is not None or grad_target_ptr is not None:
        for start in tl.range(0, width, COLUMNS):
            m = start + n
            there = ok[:, None] & (m < width)
            inside = visible & there
            if not ON_CHIP:
                x = wide(tl.load(x_ptr + x_rows + m.to(tl.int64) * xn, mask=inside, other=-float("inf")))
            w = tl.full([1, COLUMNS], 1.0, tl.float32)
            if weight_ptr is not None:
                w = wide(tl.load(weight_ptr + m, mask=m < width, other=0.0))
            if grad_ptr is not None:
                term = w * share
                if SOFT:
                    t = wide(tl.load(target_ptr + t_rows + m.to(tl.int64) * tn, mask=inside, other=0.0))
                    term = w * (keep * t + share)
                else:
                    term = term + tl.where(m == target, keep * own, 0.0)
                p = tl.exp2((x - base) * LOG2E - log_total)
                slope = tl.where(hidden, 0.0, (p * terms - term) * inverse)
                tl.store(grad_ptr + g_rows + m.to(tl.int64) * gn, narrow(slope, grad_ptr.dtype.element_ty), mask=there)
            if grad_target_ptr is not None:
                slope = -keep * w * (x - base - log_total * LN2) * inverse
                at_d = grad_target_ptr + d_rows + m.to(tl.int64) * dn
                tl.store(at_d, narrow(slope, grad_target_ptr.dtype.element_ty), mask=there)


@triton.jit
def _scale_kernel(
    grad_ptr, out_ptr, grad_loss_ptr, unit_ptr, n1, n2, inner, width, g0, g1, g2, g3, gn, o0, o1, o2, o3, on, f0, f1,
    f2, f3,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad * grad_loss / unit: one read, one write."""
    a, b, c, i, ok = place(tl.program_id(0), n1, n2, inner, ROWS)
    factor = wide(tl.load(grad_loss_ptr + at(a, b, c, i, f0, f1, f2, f3), mask=ok[:, None], other=0.0))
    if unit_ptr is not None:
        factor = factor / tl.load(unit_ptr)
    n = tl.arange(0, COLUMNS)[None, :]
    for start in tl.range(0, width, COLUMNS):
        m = (start + n).to(tl.int64)
        inside = ok[:, None] & (m < width)
        x = wide(tl.load(grad_ptr + at(a, b, c, i, g0, g1, g2, g3) + m * gn, mask=inside, other=0.0)) * factor
        at_out = out_ptr + at(a, b, c, i, o0, o1, o2, o3) + m * on
        tl.store(at_out, narrow(x, out_ptr.dtype.element_ty), mask=inside)


def like_logits(x: Tensor) -> Tensor:
    """Memory for a gradient of x: in x's own order of dims where it is dense, as mmkern::cross_entropy_fwd promises."""
    if x.dim() == 1:
        return x.new_empty(x.shape)
    inner = [(n, step) for n, step in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    if any(step != n * after for (_, step), (n, after) in pairwise(inner)):
        x = x.contiguous()
        inner = [(n, step) for n, step in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    if x.stride(1) == 1 or x.shape[1] <= 1:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    if not inner:
        return x.new_empty(x.shape) if x.stride(0) != 1 else x.new_empty((x.shape[1], x.shape[0])).t().view(x.shape)
    return x.new_empty(x.shape)


def _over_classes(t: Tensor | None, shape: torch.Size, dim: int) -> Tensor | None:
    """One number a row as a tensor of the logits' shape, by a stride of 0."""
    return None if t is None else t.unsqueeze(dim).expand(shape) if t.dim() else t.expand(shape)


def cross_entropy_fwd(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, label_smoothing: float,
    wide: bool, wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`mmkern::cross_entropy_fwd`: the loss; gradients for input and target, empty if not wanted; their multiplier."""
    check.cross_entropy(input, target, weight, reduction, label_smoothing, wanted)
    weight = None if weight is None else weight.contiguous()  # the kernel steps through it by 1
    dim = min(1, input.dim() - 1)
    soft = target.is_floating_point()
    shape = (*input.shape[:dim], *input.shape[dim + 1 :])
    losses = torch.empty(shape, dtype=torch.float32, device=input.device)
    source = input.contiguous() if soft else input
    grad = like_logits(source) if wanted & 1 else None
    grad_target = torch.empty_like(target, memory_format=torch.contiguous_format) if wanted & 2 else None
    half = torch.float16 in (input.dtype, target.dtype) and wanted != 0
    divisor = _divisor(target, weight, ignore_index, losses, reduction)
    if input.numel():
        labels = target.contiguous() if soft else _over_classes(target, input.shape, dim)
        tensors = [source, grad, labels, grad_target, _over_classes(losses, input.shape, dim)]
        rows = Rows(tensors, dim)
        if not rows.fits:
            tensors[0] = source = input.contiguous()
            grad = tensors[1] = None if grad is None else torch.empty_like(source)
            rows = Rows(tensors, dim)
        block_r, columns, warps = rows.blocks(4 if soft else 2)
        launch(
            _cross_entropy_kernel, rows.programs(block_r), losses, source, target if not soft else labels, weight,
            None if half else divisor, losses, grad, grad_target, label_smoothing, ignore_index, *rows.shape[1:],
            *rows.all_strides[:-1], SOFT=soft, SMOOTH=label_smoothing > 0, ROWS=block_r, COLUMNS=columns,
            ON_CHIP=columns >= rows.width, num_warps=warps,
        )  # fmt: skip
    else:
        losses.zero_()
    loss = losses if reduction == 0 else losses.sum()
    if reduction == MEAN:
        loss = loss / divisor
    unit = input.new_empty(0, dtype=torch.float32)
    if half:
        unit = torch.ones(1, device=input.device) if divisor is None else divisor.reshape(1)
    return (
        loss if wide else loss.to(input.dtype),
        input.new_empty(0) if grad is None else grad,
        target.new_empty(0) if grad_target is None else grad_target,
        unit,
    )


def _divisor(
    target: Tensor, weight: Tensor | None, ignore_index: int, losses: Tensor, reduction: int
) -> Tensor | None:  # fmt: skip
    """What a mean divides by: the rows, those not ignored, or the weights of their targets. The host reads nothing."""
    if reduction != MEAN:
        return None
    if target.is_floating_point():
        return torch.full((), float(losses.numel() if target.numel() else 0), device=losses.device)
    counted = target != ignore_index
    if weight is None:
        return counted.sum().float()
    return torch.where(counted, weight.double()[target.clamp(0, len(weight) - 1)], 0.0).sum().float()


def cross_entropy_bwd(grad: Tensor, grad_loss: Tensor, unit: Tensor | None) -> Tensor:
    """`mmkern::cross_entropy_bwd`: grad * grad_loss / unit, with a grad_loss for each position or one for all."""
    check.scaled(grad, grad_loss, unit)
    out = like_logits(grad)
    _scale(grad, out, grad_loss, unit)
    return out


def cross_entropy_bwd_(grad: Tensor, grad_loss: Tensor, unit: Tensor | None) -> None:
    """`mmkern::cross_entropy_bwd_`: the same, into grad."""
    check.scaled(grad, grad_loss, unit)
    check.writable("grad", grad)
    _scale(grad, grad, grad_loss, unit)


def _scale(grad: Tensor, out: Tensor, grad_loss: Tensor, unit: Tensor | None) -> None:
    if not grad.numel():
        return
    dim = min(1, grad.dim() - 1)
    rows = Rows([grad, out, _over_classes(grad_loss, grad.shape, dim)], dim)
    block_r, columns, warps = rows.blocks(1)
    launch(
        _scale_kernel, rows.programs(block_r), out, grad, out, grad_loss, unit, *rows.shape[1:], *rows.all_strides[:-1],
        ROWS=block_r, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
