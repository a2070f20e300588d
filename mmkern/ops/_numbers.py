"""Numbers among the arguments: of Python, numpy, a 0-dim tensor, or symbolic while torch traces."""

from __future__ import annotations

import operator
import sys
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_LARGEST = sys.float_info.max
_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def number(name: str, value: Any) -> float:
    """`value` as a finite number. One that is still symbolic stays so: asking for its value would fix it."""
    if type(value) is not float and type(value) is not int:
        if isinstance(value, _SYMBOLIC):
            return value  # type: ignore[return-value]
        if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if isinstance(value, Tensor):
            _check_scalar(name, value)
        value = float(value)
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value if type(value) is float else float(value)


def probability(name: str, value: Any) -> float:
    """`value` as a number in [0, 1]."""
    value = number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def integer(name: str, value: Any, expected: str = "an integer") -> int:
    """`value` as an integer, or a symbolic one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        if isinstance(value, Tensor):
            _check_scalar(name, value)
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})") from None


def _check_scalar(name: str, value: Tensor) -> None:
    if value.dim() or value.requires_grad or value.is_complex():
        why = "requires grad, which has no gradient here" if value.requires_grad else f"shape {tuple(value.shape)}"
        raise TypeError(f"{name}: expected a number, got a tensor: {why}")
