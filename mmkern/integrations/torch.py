"""torch.nn.functional's attention, softmax and cross-entropy done by mmkern, where and as long as it is asked for.

with mmkern.integrations.torch.patched():
    model(inputs)

mmkern.integrations.torch.patch(model)  # for every forward pass of this model, until unpatch(model)
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkern

_lock = threading.Lock()
_open: list[object] = []  # blocks now open, over all threads
_saved: dict[str, Any] = {}


def _row_op(ours: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    def replacement(
        input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
    ) -> Tensor:
        if dim is None:  # torch guesses the dim, with a warning
            return _saved[name](input, dim, _stacklevel + 1, dtype)
        return ours(input if dtype is None else input.to(dtype), dim)

    return replacement


def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    if size_average is not None or reduce is not None:  # deprecated in favour of reduction, with a warning
        return _saved["cross_entropy"](
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return mmkern.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": mmkern.scaled_dot_product_attention,
    "softmax": _row_op(mmkern.softmax, "softmax"),
    "log_softmax": _row_op(mmkern.log_softmax, "log_softmax"),
    "cross_entropy": _cross_entropy,
}


@contextmanager
def patched() -> Iterator[None]:
    """Inside the block F's `scaled_dot_product_attention`, `softmax`, `log_softmax` and `cross_entropy` are mmkern's.

    That reaches everything which looks these names up in torch.nn.functional: nn.MultiheadAttention, nn.Softmax,
    nn.Transformer*, nn.CrossEntropyLoss, most models. Not `tensor.softmax`, `torch.softmax` or a name imported from
    there before.
    torch's fused inference path for nn.TransformerEncoderLayer calls neither name, so it is off inside. The
    change is process-wide, like torch's own backend flags, and undone when the last open block ends.

    Example:
        >>> import torch, mmkern.integrations.torch as integration
        >>> with integration.patched():
        ...     torch.nn.functional.softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    block = object()
    with _lock:
        _open.append(block)
        if len(_open) == 1:
            _saved["fastpath"] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            for name, function in _REPLACEMENTS.items():
                _saved[name] = getattr(F, name)
                setattr(F, name, function)
    try:
        yield
    finally:
        with _lock:
            _open.remove(block)
            if not _open:
                torch.backends.mha.set_fastpath_enabled(_saved.pop("fastpath"))
                for name, function in _saved.items():
                    setattr(F, name, function)
                _saved.clear()


def patch(model: torch.nn.Module) -> torch.nn.Module:
    """Run every forward pass of `model` inside `patched()`; returns `model`. `unpatch` undoes it."""
    if "forward" in vars(model) and hasattr(model.forward, "__mmkern_patched__"):
        return model
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with patched():
            return original(*args, **kwargs)

    forward.__mmkern_patched__ = vars(model).get("forward")  # type: ignore[attr-defined]
    model.forward = forward  # type: ignore[method-assign]
    return model


def unpatch(model: torch.nn.Module) -> torch.nn.Module:
    """Give `model` its own forward back; returns `model`. Harmless where `patch` was not called."""
    forward = vars(model).get("forward")
    if forward is not None and hasattr(forward, "__mmkern_patched__"):
        del model.forward
        if forward.__mmkern_patched__ is not None:
            model.forward = forward.__mmkern_patched__
    return model
