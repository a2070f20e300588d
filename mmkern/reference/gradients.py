"""Gradients of a formula, by differentiating it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def formula_gradients(
    formula: Callable[..., Any], grads: Sequence[Tensor | None], args: Sequence[Any], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `formula(*args)` for the wanted arguments, in torch's own ops, so that they can be differentiated.

    grads: those of the outputs; None counts as 0.
    """
    places = [i for i, want in enumerate(wanted) if want]

    def of(*leaves: Tensor) -> Any:
        given = list(args)
        for i, leaf in zip(places, leaves, strict=True):
            given[i] = leaf
        return formula(*given)

    outputs, pullback = torch.func.vjp(of, *(args[i] for i in places))[:2]
    single = isinstance(outputs, Tensor)
    full = [
        torch.zeros_like(out) if grad is None else grad
        for out, grad in zip([outputs] if single else outputs, grads, strict=True)
    ]
    found = dict(zip(places, pullback(full[0] if single else tuple(full)), strict=True))
    return [found.get(i) for i in range(len(args))]
