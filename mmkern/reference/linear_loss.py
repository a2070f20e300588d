"""Cross-entropy of a linear layer's logits by its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmkern.reference.gradients import formula_gradients, in_order, of_bits, record
from mmkern.reference.loss import NONE, cross_entropy
from mmkern.reference.numerics import wide

DIFFERENTIABLE = ("hidden", "weight", "bias")  # in the order in which operators return gradients and `wanted` has bits


def linear_cross_entropy(
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
) -> tuple[Tensor, ...]:
    """cross_entropy(hidden @ weight^T + bias, target) of (N, D), (V, D), (N) and (V).

    Returns the loss (float32, or float64) and its gradients for what is DIFFERENTIABLE, in float32 for float16, without
    elements where not wanted.
    """
    counted, logits = _logits(hidden, weight, target, bias, ignore_index)
    options = class_weight, ignore_index, reduction, label_smoothing
    loss, slope, *_ = cross_entropy(logits, target, *options, True, int(wanted > 0))
    gradients: dict[str, Callable[[], Tensor]] = {
        "hidden": lambda: torch.where((target == ignore_index).unsqueeze(-1), 0.0, slope @ wide(weight)),
        "weight": lambda: slope.t() @ counted,
        "bias": lambda: slope.sum(0),
    }
    # Written out: this may run where autograd cannot, within an operator of a compiled graph.
    with torch.no_grad():
        dtype = kept_dtype(hidden)
        found = {name: gradients[name]().to(dtype) for name in of_bits(DIFFERENTIABLE, wanted)}
    return (loss, *in_order(DIFFERENTIABLE, found, hidden.new_empty(0, dtype=dtype)))


def linear_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int,
    wanted: int,
) -> tuple[Tensor, ...]:
    """Gradients for what is DIFFERENTIABLE, given that of each row's loss; empty where not wanted."""
    given = record(_loss)(hidden, weight, target, bias, class_weight, ignore_index, label_smoothing)
    given = given._replace(**{name: wide(t) for name in DIFFERENTIABLE if (t := getattr(given, name)) is not None})
    found = formula_gradients(_loss, [grad_loss], given, of_bits(DIFFERENTIABLE, wanted))
    return in_order(DIFFERENTIABLE, {name: g.to(hidden.dtype) for name, g in found.items()}, hidden)


def kept_dtype(t: Tensor) -> torch.dtype:
    """A mean's gradient is below float16's range until backward multiplies it by a loss scale."""
    return torch.float32 if t.dtype == torch.float16 else t.dtype


def _loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """That of each row."""
    logits = _logits(hidden, weight, target, bias, ignore_index)[1]
    return cross_entropy(logits, target, class_weight, ignore_index, NONE, label_smoothing, True, 0)[0]


def _logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The rows that are counted, the others being 0, which reach nobody then, whatever they hold; all rows' logits."""
    hidden = torch.where((target == ignore_index).unsqueeze(-1), 0.0, wide(hidden))
    logits = hidden @ wide(weight).t()
    return hidden, logits if bias is None else logits + wide(bias)
