"""linear_cross_entropy a chunk of rows at a time: logits, loss and gradients, and sums over all chunks."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from mmkern.ops.dispatch import _C
from mmkern.ops.loss import _cross_entropy, _scale_
from mmkern.reference.linear_loss import kept_dtype

NONE, MEAN, SUM = range(3)
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

    One chunk more costs one rounding in the run alone: 16,384 chunks err as 32 do.
    """

    def __init__(self, weight: Tensor) -> None:
        self.run = weight.new_zeros(weight.shape, dtype=torch.float32)
        self.runs: Tensor | None = None
        self.chunks = 0

    def add_product(self, grad: Tensor, part: Tensor, factor: float = 1.0) -> None:
        """Add factor * grad^T @ part."""
        if self.chunks == _RUN:
            if self.runs is None:
                self.runs = self.run.new_zeros(self.run.shape, dtype=torch.float64)
            _add(self.runs, self.run)
            self.run.zero_()
            self.chunks = 0
        self.chunks += 1
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


@torch.no_grad()
def chunked(
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

    A chunk of rows at a time: logits by torch's matmul, loss and gradient of them by one kernel, and two matmuls.
    grad_loss: that of each row's loss; None: 1 for all, of the reduced loss.
    """
    rows, half = len(hidden), widened(hidden.dtype)
    kept = (target != ignore_index).nonzero().squeeze(1)
    whole = len(kept) == rows
    h, y = (hidden, target) if whole else (hidden[kept], target[kept])
    _check_classes(y, len(weight))
    # Of a mean over nothing only the loss is NaN: there are no rows to scale.
    divisor = divisor_of(y, class_weight) if reduction == MEAN else 1.0
    factor = 1.0 / divisor if divisor else inf
    losses = (
        hidden.new_zeros(rows, dtype=torch.float32) if reduction == NONE else hidden.new_zeros((), dtype=torch.float64)
    )
    new = hidden.new_zeros if len(h) < rows or rows == 0 else hidden.new_empty
    grad_hidden = new(hidden.shape if wanted & 1 else 0, dtype=kept_dtype(hidden))
    grad_bias = hidden.new_zeros(len(weight) if wanted & 4 else 0, dtype=torch.float64)
    w, b = (weight.float(), None if bias is None else bias.float()) if half else (weight, bias)
    step = rows_at_a_time(len(weight), w.element_size(), chunk_size)
    buffer = w.new_empty(min(step, len(h)), len(weight))
    summed = _WeightGradient(weight) if wanted & 2 and len(h) > step else None
    grad_weight = hidden.new_zeros(weight.shape if wanted & 2 and len(h) == 0 else 0, dtype=torch.float32)
    for start in range(0, len(h), step):
        part = h[start : start + step].to(w.dtype)
        place = slice(start, start + len(part)) if whole else kept[start : start + step]
        logits = buffer[: len(part)]
        if b is None:
            torch.mm(part, w.t(), out=logits)
        else:
            torch.addmm(b, part, w.t(), out=logits)
        options = ignore_index, reduction and SUM, label_smoothing, True, int(wanted > 0)
        loss, grad, *_ = torch.ops.mmkern.cross_entropy_fwd(logits, y[start : start + step], class_weight, *options)
        if reduction == NONE:
            losses[place] = loss
        else:
            losses += loss
        if wanted == 0:
            continue
        if grad_loss is not None:
            torch.ops.mmkern.cross_entropy_bwd_(grad, grad_loss[place], None)
        if wanted & 1 and whole and grad_hidden.dtype == w.dtype:
            torch.addmm(grad_hidden[:1], grad, w, beta=0, alpha=factor, out=grad_hidden[place])
        elif wanted & 1:
            grad_hidden[place] = (grad @ w).mul_(factor)
        if wanted & 2 and len(h) <= step:
            grad_weight = torch.addmm(weight[:1].to(w.dtype), grad.t(), part, beta=0, alpha=factor)
        elif summed is not None:
            summed.add_product(grad, part, factor)
        if wanted & 4:
            grad_bias.add_(grad.sum(0, dtype=torch.float32), alpha=factor)
    if summed is not None:
        grad_weight = summed.total()
    loss = losses / divisor if reduction == MEAN else losses
    return loss.float(), [grad_hidden, grad_weight, grad_bias.float()]


@torch.no_grad()
def chunked_on_gpu(
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
    """`chunked` without a value that the host would have to wait for: ignored rows are multiplied too, as zeros."""
    rows, classes = len(hidden), len(weight)
    losses = hidden.new_zeros(
        rows if reduction == NONE else (), dtype=torch.float32 if reduction == NONE else torch.float64
    )
    grad_hidden = hidden.new_empty(hidden.shape if wanted & 1 else 0, dtype=kept_dtype(hidden))
    summed = _WeightGradient(weight if wanted & 2 else weight[:0])
    grad_bias = hidden.new_zeros(classes if wanted & 4 else 0, dtype=torch.float64)
    step = rows_at_a_time(classes, weight.element_size(), chunk_size, _GPU_BUDGET)
    buffer = weight.new_empty(min(step, rows), classes)
    for start in range(0, rows, step):
        place = slice(start, min(start + step, rows))
        part = hidden[place].masked_fill((target[place] == ignore_index)[:, None], 0.0)  # they may hold NaN
        logits = buffer[: place.stop - start]
        if bias is None:
            torch.mm(part, weight.t(), out=logits)
        else:
            torch.addmm(bias, part, weight.t(), out=logits)
        options = ignore_index, reduction and SUM, label_smoothing, True, int(wanted > 0)
        loss, grad, *_ = _cross_entropy.direct(logits, target[place], class_weight, *options)
        if reduction == NONE:
            losses[place] = loss
        else:
            losses += loss
        if grad_loss is not None and wanted:
            of_rows = torch.where(target[place] == ignore_index, 0.0, grad_loss[place])  # 0 * inf is not 0
            _scale_.direct(grad, of_rows, None)
        if wanted & 1:
            grad_hidden[place] = grad @ weight
        if wanted & 2:
            summed.add_product(grad, part)
        if wanted & 4:
            grad_bias += grad.sum(0, dtype=torch.float32)
    found = [grad_hidden, summed.total() if wanted & 2 else hidden.new_zeros(0), grad_bias.float()]
    if reduction == MEAN:
        divisor = gpu_divisor(target, class_weight, ignore_index)
        losses = losses / divisor
        # Of a mean over nothing only the loss is NaN.
        found = [torch.where(divisor == 0, 0.0, g / divisor).to(g.dtype) for g in found]
    return losses.float(), found


def gpu_divisor(target: Tensor, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    counted = target != ignore_index
    if class_weight is None:
        return counted.sum().double()
    return torch.where(counted, class_weight.double()[target.clamp(0, len(class_weight) - 1)], 0.0).sum()


def _check_classes(target: Tensor, classes: int) -> None:
    if target.numel():
        low, high = (int(t) for t in target.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise IndexError(f"target: expected classes in [0, {classes}) or ignore_index, got {wrong}")


def divisor_of(target: Tensor, class_weight: Tensor | None) -> float:
    if class_weight is None:
        return float(len(target))
    # One after the other: the order of torch's sum would depend on the number of threads.
    counts = torch.bincount(target, minlength=len(class_weight))
    return (class_weight.double() * counts).cumsum(0)[-1].item()
