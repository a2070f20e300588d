"""Cross-entropy of a linear layer's logits by its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkern.reference.gradients import formula_gradients
from mmkern.reference.loss import NONE, cross_entropy


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cross_entropy(hidden @ weight^T + bias, target) of (N, D), (V, D), (N) and (V).

    Returns the loss (float32, or float64) and its gradients for hidden (wanted & 1), weight (2) and bias (4), in
    float32 for float16, without elements where not wanted.
    """
    counted, logits = _logits(hidden, weight, target, bias, ignore_index)
    options = class_weight, ignore_index, reduction, label_smoothing
    loss, slope, *_ = cross_entropy(logits, target, *options, True, int(wanted > 0))
    # Written out: this may run where autograd cannot, within an operator of a compiled graph.
    with torch.no_grad():
        found = [
            torch.where((target == ignore_index).unsqueeze(-1), 0.0, slope @ _wide(weight)) if wanted & 1 else None,
            slope.t() @ counted if wanted & 2 else None,
            slope.sum(0) if wanted & 4 else None,
        ]
        like = zip(found, (hidden, weight, weight if bias is None else bias), strict=True)
        kept = [t.new_empty(0, dtype=kept_dtype(t)) if g is None else g.to(kept_dtype(t)) for g, t in like]
    return loss, kept[0], kept[1], kept[2]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden (wanted & 1), weight (2) and bias (4), given that of each row's loss."""
    options = class_weight, ignore_index, NONE, label_smoothing
    found = _gradients(grad_loss, hidden, weight, target, bias, *options, wanted)
    like = zip(found, (hidden, weight, weight if bias is None else bias), strict=True)
    kept = [t.new_empty(0) if g is None else g.to(t.dtype) for g, t in like]
    return kept[0], kept[1], kept[2]


def kept_dtype(t: Tensor) -> torch.dtype:
    """A mean's gradient is below float16's range until backward multiplies it by a loss scale."""
    return torch.float32 if t.dtype == torch.float16 else t.dtype


def _gradients(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor | None]:
    *options, wanted = rest

    def formula(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _loss(hidden, weight, target, bias, *options)

    flags = [bool(wanted & bit) for bit in (1, 2, 4)]
    wide = [None if t is None else _wide(t) for t in (hidden, weight, bias)]
    return formula_gradients(formula, [grad_loss], wide, flags)


def _loss(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    class_weight, ignore_index, reduction, label_smoothing = options
    logits = _logits(hidden, weight, target, bias, ignore_index)[1]
    return cross_entropy(logits, target, class_weight, ignore_index, reduction, label_smoothing, True, 0)[0]


def _logits(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The rows that are counted, the others being 0, which reach nobody then, whatever they hold; all rows' logits."""
    hidden = torch.where((target == ignore_index).unsqueeze(-1), 0.0, _wide(hidden))
    logits = hidden @ _wide(weight).t()
    return hidden, logits if bias is None else logits + _wide(bias)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
