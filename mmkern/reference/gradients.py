"""Gradients of a formula, by differentiating it; and which of them are wanted, by the names of its arguments."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Collection, Sequence
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor


def record_class(name: str, arguments: Sequence[str]) -> Any:
    """Class of records of arguments, which are tuples and have names."""
    return namedtuple(name, arguments)  # type: ignore[misc]


@cache
def record(formula: Callable[..., Any]) -> Any:
    """Class of a formula's arguments."""
    return record_class(formula.__name__, list(signature(formula).parameters))


def formula_gradients(
    formula: Callable[..., Any], grads: Sequence[Tensor | None], args: Any, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of `formula(*args)` for the wanted arguments, in torch's own ops, so that they can be differentiated.

    grads: those of the outputs; None counts as 0. args: a record of the formula's arguments. wanted: names of these.
    """
    names = [name for name in args._fields if name in wanted]

    def of(*leaves: Tensor) -> Any:
        return formula(*args._replace(**dict(zip(names, leaves, strict=True))))

    outputs, pullback = torch.func.vjp(of, *(getattr(args, name) for name in names))[:2]
    single = isinstance(outputs, Tensor)
    full = [
        torch.zeros_like(out) if grad is None else grad
        for out, grad in zip([outputs] if single else outputs, grads, strict=True)
    ]
    return dict(zip(names, pullback(full[0] if single else tuple(full)), strict=True))


def bits(names: Sequence[str], wanted: Collection[str]) -> int:
    """`wanted` as kernels read it: bit i for names[i]."""
    found = 0
    for i, name in enumerate(names):
        if name in wanted:
            found |= 1 << i
    return found


def of_bits(names: Sequence[str], wanted: int) -> list[str]:
    """The names whose bits are set."""
    return [name for i, name in enumerate(names) if wanted >> i & 1]


def in_order(names: Sequence[str], found: dict[str, Tensor], like: Tensor) -> tuple[Tensor, ...]:
    """What was found of the gradients of names, as operators return them: without elements where there is none."""
    return tuple(found[name] if name in found else like.new_empty(0) for name in names)
