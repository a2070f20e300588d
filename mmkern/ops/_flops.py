"""Formulas by which torch's FlopCounterMode counts attention and linear_cross_entropy, as it counts its own ops.

torch.utils.flop_counter imports Triton where that is installed, so it is not imported here: once the caller has, the
first call under a mode of his enters the formulas.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from mmkern.reference.gradients import of_bits
from mmkern.reference.linear_loss import DIFFERENTIABLE


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, out_val: Any = None) -> int:
    """query @ key^T and weights @ value, each multiplication and each addition one."""
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    grad_out: Any,
    grad_lse: Any,
    out: Any,
    lse: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    out_val: Any = None,
) -> int:
    """The scores again, and the gradients of query, key, weights and value: as torch counts, whichever are wanted."""
    pairs = prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


def _linear(hidden: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The logits, and the gradients of hidden and weight that are computed with them."""
    *_, wanted = rest
    products = 1 + len({"hidden", "weight"}.intersection(of_bits(DIFFERENTIABLE, wanted)))
    return 2 * prod(hidden.shape) * len(weight) * products


def _linear_backward(grad_loss: Tensor, *args: Any, out_val: Any = None) -> int:
    return _linear(*args)


_FORMULAS: dict[str, Callable[..., int]] = {
    "attention_fwd": _attention,
    "attention_bwd": _attention_backward,
    "linear_cross_entropy_fwd": _linear,
    "linear_cross_entropy_bwd": _linear_backward,
}


def enter_flop_formulas() -> None:
    """Enter the formulas with torch's, and with the modes that are on, which have copied torch's already."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.ops.mmkern.attention_fwd in counter.flop_registry:
        return
    both = [(f"{name}{twin}", formula) for name, formula in _FORMULAS.items() for twin in ("", "_called")]
    formulas = {getattr(torch.ops.mmkern, name): formula for name, formula in both}
    counter.flop_registry.update(formulas)
    for mode in _python_dispatch._get_current_dispatch_mode_stack():
        if isinstance(mode, counter._FlopCounterMode):
            mode.counter.flop_registry.update(formulas)
