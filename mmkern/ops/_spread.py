"""DTensor, told how to split the ops once its user has imported it: torch.distributed is not imported before."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def is_spread(values: Sequence[Any]) -> bool:
    """Whether one of them is a DTensor."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and any(isinstance(value, distributed.DTensor) for value in values)


def known_to_dtensor(fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which also registers the rules of `_sharding`, where there is DTensor.

    It asks for the output's shape before it looks for a rule, in eager calls and while torch.compile traces.
    """

    def told(*args: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:
            import_module("mmkern.ops._sharding").register()
        return fake(*args)

    return told
