"""linear_cross_entropy a chunk of rows at a time: logits, loss and gradients, and sums over all chunks."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from mmkern.ops._checks import by_value
from mmkern.ops._choice import _state, leave_threads
from mmkern.ops._compiled import _C
from mmkern.ops._loss_arguments import check_classes, check_linear_border
from mmkern.ops.loss import _cross_entropy, _scale_
from mmkern.reference.gradients import of_bits
from mmkern.reference.linear_loss import DIFFERENTIABLE, kept_dtype
from mmkern.reference.loss import MEAN, NONE, SUM

_BUDGET = 32 << 20  # bytes of a chunk's logits, and of their gradient: larger ones are no faster
_GPU_BUDGET = 256 << 20  # a matmul of fewer rows leaves a GPU idle
_BLOCK = 1024  # rows of weight whose gradient is added at a time
_FEWEST_ROWS = 16  # of a chunk: fewer would read the whole weight for too little work
_RUN = 32  # chunks whose gradients of weight are added in float32, before their sum is added in float64


def widened(dtype: torch.dtype) -> bool:
    """Whether logits of this dtype are faster multiplied in float32.

    torch's float16 matmul on CPU runs 300 times slower than its float32 one, and so does its bfloat16 one where the
    processor has no dot product for it: 0.3 GFLOP/s.
    """
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not (_C and "avx512_bf16" in _C.isas()))


class _WeightGradient:
    """The sum over chunks: of a run of them in float32, as the matmul adds; of the runs in float64.

    One chunk more costs one rounding in the run alone: 16,384 chunks err as 32 do. A single chunk is not added.
    """

    def __init__(self, weight: Tensor, chunks: int) -> None:
        self.run = weight.new_zeros(weight.shape if chunks != 1 else 0, dtype=torch.float32)
        self.runs: Tensor | None = None
        self.left, self.single = _RUN, chunks == 1

    def add_product(self, grad: Tensor, part: Tensor, factor: float) -> None:
        """Add factor * grad^T @ part."""
        if self.single:
            self.run = torch.addmm(part[:1], grad.t(), part, beta=0, alpha=factor)
            return
        if self.left == 0:
            if self.runs is None:
                self.runs = self.run.new_zeros(self.run.shape, dtype=torch.float64)
            _add(self.runs, self.run)
            self.run.zero_()
            self.left = _RUN
        self.left -= 1
        if grad.dtype == torch.float32:
            self.run.addmm_(grad.t(), part, alpha=factor)
        else:
            _add(self.run, torch.addmm(part[:1], grad.t(), part, beta=0, alpha=factor))

    def total(self) -> Tensor:
        return self.run if self.runs is None else (self.runs + self.run).float()


def _add(into: Tensor, more: Tensor) -> None:
    # torch adds two dtypes by copying one to the other's first: block by block the copy stays in cache.
    for to, block in zip(into.split(_BLOCK), more.split(_BLOCK), strict=True):
        to.add_(block)


def rows_at_a_time(classes: int, itemsize: int, chunk_size: int, budget: int = _BUDGET) -> int:
    return chunk_size or max(_FEWEST_ROWS, budget // (max(1, classes) * itemsize))


def host_reads(t: Tensor) -> bool:
    """Whether t's values can be read here; on a GPU, the host would wait for them."""
    return t.is_cpu and by_value(t) and not _state.interpreting


@torch.no_grad()
def _chunked(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    chunk_size: int,
    wanted: int,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients for hidden, weight and bias: in float32, or for hidden in kept_dtype.

    A chunk of rows at a time: logits by torch's matmul, loss and gradient of them by one kernel, and two matmuls. Where
    the host reads the target, ignored rows are left out; elsewhere they are multiplied too, as zeros, and the gradients
    of a mean divided in the end.
    grad_loss: that of each row's loss; None: 1 for all, of the reduced loss.
    """
    rows, reads, asked = len(hidden), host_reads(target), of_bits(DIFFERENTIABLE, wanted)
    kept, h, y, w, b = None, hidden, target, weight, bias
    if reads:
        kept = (target != ignore_index).nonzero().squeeze(1)
        if len(kept) == rows:
            kept = None
        else:
            h, y = hidden[kept], target[kept]
        check_classes(y, len(weight))
        if widened(hidden.dtype):
            w, b = weight.float(), None if bias is None else bias.float()
    divisor: Any = divisor_of(y, class_weight, ignore_index) if reduction == MEAN else 1.0
    # Of a mean over nothing only the loss is NaN: there are no rows to scale.
    factor = 1.0 if not reads else 1.0 / divisor if divisor else inf
    shape, dtype = ((rows,), torch.float32) if reduction == NONE else ((), torch.float64)
    losses = hidden.new_zeros(shape, dtype=dtype)
    new = hidden.new_empty if kept is None else hidden.new_zeros
    grad_hidden = new(hidden.shape if "hidden" in asked else 0, dtype=kept_dtype(hidden))
    grad_bias = hidden.new_zeros(len(weight) if "bias" in asked else 0, dtype=torch.float64)
    step = rows_at_a_time(len(weight), w.element_size(), chunk_size, _BUDGET if reads else _GPU_BUDGET)
    summed = _WeightGradient(weight if "weight" in asked else weight[:0], -(-len(h) // step))
    buffer = w.new_empty(min(step, len(h)), len(weight))
    for start in range(0, len(h), step):
        part, classes = h[start : start + step].to(w.dtype), y[start : start + step]
        place = slice(start, start + len(part)) if kept is None else kept[start : start + step]
        if not reads:
            part = part.masked_fill((classes == ignore_index)[:, None], 0.0)  # they may hold NaN
        logits = buffer[: len(part)]
        if b is None:
            torch.mm(part, w.t(), out=logits)
        else:
            torch.addmm(b, part, w.t(), out=logits)
        options = ignore_index, reduction and SUM, label_smoothing, True, int(wanted != 0)
        loss, grad, *_ = _cross_entropy.direct(logits, classes, class_weight, *options)
        if reduction == NONE:
            losses[place] = loss
        else:
            losses += loss
        if wanted == 0:
            continue
        if grad_loss is not None:
            _scale_.direct(grad, torch.where(classes == ignore_index, 0.0, grad_loss[place]), None)  # 0 * inf is not 0
        if "hidden" in asked and kept is None and grad_hidden.dtype == w.dtype:
            torch.addmm(part[:1], grad, w, beta=0, alpha=factor, out=grad_hidden[place])
        elif "hidden" in asked:
            grad_hidden[place] = torch.addmm(part[:1], grad, w, beta=0, alpha=factor).to(grad_hidden.dtype)
        if "weight" in asked:
            summed.add_product(grad, part, factor)
        if "bias" in asked:
            grad_bias.add_(grad.sum(0, dtype=torch.float32), alpha=factor)
    found = [grad_hidden, summed.total() if "weight" in asked else hidden.new_zeros(0), grad_bias.float()]
    if reduction == MEAN:
        losses = losses / divisor
        if not reads:
            wide = [g.to(kept_dtype(g)) for g in found]
            found = [torch.where(divisor == 0, 0.0, g / divisor).to(g.dtype) for g in wide]
    return losses.float(), found


def divisor_of(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Any:
    """What a mean divides by: how many rows count, or the sum of their weights; a float where the host reads the
    target, else a float64 tensor on its device."""
    counted = target != ignore_index
    if host_reads(target):
        target = target[counted]
        if class_weight is None:
            return float(len(target))
        # One after the other: the order of torch's sum would depend on the number of threads.
        counts = torch.bincount(target, minlength=len(class_weight))
        return (class_weight.double() * counts).cumsum(0)[-1].item()
    if class_weight is None:
        return counted.sum().double()
    return torch.where(counted, class_weight.double()[target.clamp(0, len(class_weight) - 1)], 0.0).sum()


def forward_in_chunks(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """`mmkern::linear_cross_entropy_fwd`, on any device."""
    check_linear_border(None, hidden, weight, target, bias, class_weight, *options)
    leave_threads()
    with torch.autocast(hidden.device.type, enabled=False):
        loss, found = _chunked(None, hidden, weight, target, bias, class_weight, ignore_index, *options)
        return loss, *(g.to(kept_dtype(hidden)) for g in found)


def backward_in_chunks(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    """`mmkern::linear_cross_entropy_bwd`, of losses that are not reduced."""
    if grad_loss is None:
        raise ValueError("grad_loss: expected a tensor, got None")
    tensors = hidden, weight, target, bias, class_weight
    check_linear_border(grad_loss, *tensors, NONE, *options)
    leave_threads()
    with torch.autocast(hidden.device.type, enabled=False):
        _, found = _chunked(grad_loss.contiguous(), *tensors, ignore_index, NONE, *options)
        return tuple(g.to(hidden.dtype) for g in found)
