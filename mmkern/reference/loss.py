"""Losses over classes by their definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkern.reference.gradients import of_bits
from mmkern.reference.numerics import wide as widened
from mmkern.reference.softmax import log_softmax

NONE, MEAN, SUM = range(3)  # reductions
IN_FORWARD = ("input", "target")  # whose gradients come with the loss, in the order of the outputs and of wanted's bits


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    wide: bool,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-sum_c w_c t_c log softmax(x)_c, with t the target (1 at its class) smoothed towards 1 / classes.

    Returns the loss (in input's dtype; with `wide`, at least float32), its gradients for what is IN_FORWARD, and what
    these were multiplied by. They are those of the reduced loss, or with reduction NONE of each position's, and without
    elements where not wanted; the multiplier is of shape (1,), or (0,) where it is 1.
    """
    dim = min(1, input.dim() - 1)
    x = widened(input)
    w = torch.ones_like(x[:1] if dim else x) if weight is None else _along(weight.to(x.dtype), dim, x.dim())
    w = w[:1] if dim else w
    share = label_smoothing / max(1, x.shape[dim])
    if target.is_floating_point():
        hidden = torch.zeros((), dtype=torch.bool, device=x.device)
        terms = w * ((1 - label_smoothing) * widened(target) + share)
        log_p = log_softmax(x, dim)
        loss = -(terms * log_p).sum(dim)
        total = torch.tensor(float(loss.numel() if x.shape[dim] else 0), dtype=x.dtype, device=x.device)
    else:
        hidden = (target == ignore_index).unsqueeze(dim)
        place = torch.where(hidden, 0, target.unsqueeze(dim))
        _check(place, x.shape[dim])
        log_p = log_softmax(torch.where(hidden, 0.0, x), dim)
        own = w.expand_as(x).gather(dim, place)
        loss = -(1 - label_smoothing) * own * log_p.gather(dim, place)
        if label_smoothing > 0:
            loss = loss - share * (w * log_p).sum(dim, keepdim=True)
        loss = torch.where(hidden, 0.0, loss).squeeze(dim)
        total = torch.where(hidden, 0.0, own).sum()
        terms = (share * w).expand_as(x).scatter_add(dim, place, (1 - label_smoothing) * own)
    divisor = total if reduction == MEAN else torch.ones_like(total)
    asked = of_bits(IN_FORWARD, wanted)
    grad_input, grad_target = input.new_empty(0), target.new_empty(0)
    if "input" in asked:
        slope = (log_p.exp() * terms.sum(dim, keepdim=True) - terms) / divisor
        grad_input = torch.where(hidden, 0.0, slope).detach().to(input.dtype)
    if "target" in asked:
        grad_target = ((label_smoothing - 1) * w * log_p / divisor).detach().to(target.dtype)
    half = torch.float16 in (input.dtype, target.dtype) and wanted != 0
    if reduction != NONE:
        loss = loss.sum() / divisor
    return (
        loss if wide or input.dtype == torch.float64 else loss.to(input.dtype),
        grad_input,
        grad_target,
        torch.ones(int(half), dtype=torch.float32, device=x.device),
    )


def cross_entropy_loss(*args: object) -> Tensor:
    """The loss alone."""
    return cross_entropy(*args)[0]  # type: ignore[arg-type]


def cross_entropy_backward(grad: Tensor, grad_loss: Tensor, unit: Tensor | None) -> Tensor:
    """grad * grad_loss / unit, with a grad_loss for each position or one for all."""
    factor = grad_loss.to(widened(grad).dtype)
    if unit is not None:
        factor = factor / unit.reshape(())
    if factor.dim():
        factor = factor.unsqueeze(1)
    return (grad * factor).to(grad.dtype)


def cross_entropy_backward_(grad: Tensor, grad_loss: Tensor, unit: Tensor | None) -> None:
    grad.copy_(cross_entropy_backward(grad, grad_loss, unit))


def _along(weight: Tensor, dim: int, rank: int) -> Tensor:
    return weight.reshape((1,) * dim + (-1,) + (1,) * (rank - dim - 1))


def _check(place: Tensor, classes: int) -> None:
    """IndexError for a class that does not exist; tracing and transforms leave that to gather."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or not place.is_cpu:
        return
    wrong = (place < 0) | (place >= classes)
    if wrong.any():
        raise IndexError(f"target: expected classes in [0, {classes}) or ignore_index, got {int(place[wrong][0])}")
