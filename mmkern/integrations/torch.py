"""torch.nn.functional's attention, softmax and cross-entropy done by mmkern, where and as long as it is asked for.

with mmkern.integrations.torch.patched():
    model(inputs)

mmkern.integrations.torch.patch(model)  # for every forward pass of this model, until unpatch(model)
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.overrides import handle_torch_function, has_torch_function

import mmkern


class _Replacement:
    """A function of torch.nn.functional by mmkern's kernels.

    Tensor subclasses and function modes see the call, and look it up by torch's own function, to which this is equal.
    Nested, sparse and other tensors that are not plain memory go to torch's own function, which knows them.
    """

    def __init__(self, name: str, tensors: int, ours: Callable[..., Tensor]) -> None:
        self.__name__ = self.__qualname__ = name
        self.__module__ = __name__
        self.__wrapped__ = getattr(F, name)
        self.__doc__ = self.__wrapped__.__doc__
        self._ours = ours
        self._tensors = tensors  # how many leading arguments may be tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args[: self._tensors], *kwargs.values())
        tensors = tuple(t for t in given if isinstance(t, Tensor) or hasattr(type(t), "__torch_function__"))
        if any(t.is_nested or t.layout is not torch.strided for t in tensors if isinstance(t, Tensor)):
            return self.__wrapped__(*args, **kwargs)
        if has_torch_function(tensors) and not any(isinstance(t, CausalBias) for t in tensors):
            return handle_torch_function(self, tensors, *args, **kwargs)
        return self._ours(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return self is other or self.__wrapped__ is other

    def __hash__(self) -> int:
        return hash(self.__wrapped__)

    def __repr__(self) -> str:
        return f"<{self.__module__}.{self.__name__}>"

    def __reduce__(self) -> str:
        return self.__name__


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    alignment = "upper_left"
    if isinstance(attn_mask, CausalBias):
        if is_causal:
            raise ValueError("is_causal: a CausalBias as attn_mask says it already")
        if attn_mask.variant == CausalVariant.LOWER_RIGHT:
            alignment = "lower_right"
        attn_mask, is_causal = None, True
    return mmkern.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, causal_alignment=alignment
    )


def _row_op(name: str, ours: Callable[..., Tensor]) -> Callable[..., Tensor]:
    theirs = getattr(F, name)

    def row_op(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        if dim is None:  # torch guesses the dim, with a warning
            return theirs(input, dim, _stacklevel + 2, dtype)
        return ours(input if dtype is None else input.to(dtype), dim)

    return row_op


_torch_cross_entropy = F.cross_entropy


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
        return _torch_cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return mmkern.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )


scaled_dot_product_attention = _Replacement("scaled_dot_product_attention", 4, _attention)
softmax = _Replacement("softmax", 1, _row_op("softmax", mmkern.softmax))
log_softmax = _Replacement("log_softmax", 1, _row_op("log_softmax", mmkern.log_softmax))
cross_entropy = _Replacement("cross_entropy", 3, _cross_entropy)


def _followed(function: Any) -> Any:
    """torch's function again, as another object: torch.compile keeps the original whole, with what it calls hidden."""
    again = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    again.__kwdefaults__ = function.__kwdefaults__
    return wraps(function)(again)


_CHANGES: tuple[tuple[Any, str, Any], ...] = (
    (F, "scaled_dot_product_attention", scaled_dot_product_attention),
    (F, "softmax", softmax),
    (F, "log_softmax", log_softmax),
    (F, "cross_entropy", cross_entropy),
    (F, "multi_head_attention_forward", _followed(F.multi_head_attention_forward)),
    # What set_fastpath_enabled(False) sets; torch.compile does not follow that call.
    (torch.backends.mha, "_is_fastpath_enabled", False),
)

_lock = threading.Lock()
_open: list[None] = []  # an entry for each block now open, over all threads
_before: list[Any] = []


def _swap(values: list[Any]) -> list[Any]:
    """Set what `_CHANGES` names to these values; returns what was there."""
    before = []
    for (owner, name, _), value in zip(_CHANGES, values, strict=True):
        before.append(getattr(owner, name))
        setattr(owner, name, value)
    return before


@contextmanager
def patched() -> Iterator[None]:
    """Inside the block F's `scaled_dot_product_attention`, `softmax`, `log_softmax` and `cross_entropy` are mmkern's.

    That reaches everything which looks these names up in torch.nn.functional: nn.MultiheadAttention, nn.Softmax,
    nn.Transformer*, nn.CrossEntropyLoss, most models. Not `tensor.softmax`, `torch.softmax` or a name imported from
    there before. Nested and sparse tensors stay with torch.
    torch's fused inference path for nn.TransformerEncoderLayer calls neither name, so it is off inside. The
    change is process-wide, like torch's own backend flags, and undone when the last open block ends. What
    torch.compile traces inside keeps mmkern's ops, and changes nothing outside when it runs.

    Example:
        >>> import torch, mmkern.integrations.torch as integration
        >>> with integration.patched():
        ...     torch.nn.functional.softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    if torch.compiler.is_dynamo_compiling():  # follows the assignments, and needs no lock: nothing is assigned
        before = _swap([value for _, _, value in _CHANGES])
        try:
            yield
        finally:
            _swap(before)
        return
    with _lock:
        if not _open:
            _before[:] = _swap([value for _, _, value in _CHANGES])
        _open.append(None)
    try:
        yield
    finally:
        with _lock:
            _open.pop()
            if not _open:
                _swap(_before)


# ---- One model


@cache
def _patched_type(original: Any) -> Any:
    """`original` with its calls inside `patched()`, under the same name.

    A type, not an attribute of the instance: copies, replicas and pickles of the model then call their own forward.
    """

    # Not forward alone: an instance may have one of its own, which calls what it replaced, or nothing.
    @wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(type(self), "_mmkern_original"):  # torch.compile kept this method, unpatch came later
            return original.__call__(self, *args, **kwargs)
        with patched():
            return original.__call__(self, *args, **kwargs)

    @wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with patched():
            return original.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        reduced: Any = original.__reduce_ex__(self, protocol)
        make, args, *rest = reduced
        args = tuple(original if a is type(self) else a for a in args)
        return (_rebuild, (make, args), *rest)

    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__call__": call,
        "forward": forward,
        "__reduce_ex__": reduce,
        "_mmkern_original": original,
    }
    return type(original.__name__, (original,), members)


def _rebuild(make: Callable[..., torch.nn.Module], args: tuple[Any, ...]) -> torch.nn.Module:
    return patch(make(*args))


def patch(model: torch.nn.Module) -> torch.nn.Module:
    """Run every call of `model` inside `patched()`; returns `model`. `unpatch` undoes it.

    Reached through `model(...)` and `model.forward(...)`, so by `generate` and the like, too; copies, pickles, replicas
    and compiled versions of the model are patched as it is. `isinstance` and the class's name stay as they were.

    Raises:
        ValueError: forward is a generator or a coroutine, which runs after the call; or TorchScript, which does not
            call torch.nn.functional.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        patch(model._orig_mod)
        return model
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: TorchScript does not call torch.nn.functional; patch the model it was made from")
    original = type(model)
    if not hasattr(original, "_mmkern_original"):
        if any(f(original.forward) for f in (inspect.isgeneratorfunction, inspect.iscoroutinefunction,
                                             inspect.isasyncgenfunction)):  # fmt: skip
            raise ValueError(
                f"model: {original.__name__}.forward runs after the call returns; open patched() around it"
            )
        object.__setattr__(model, "__class__", _patched_type(original))  # type: ignore[arg-type]
    return model


def unpatch(model: torch.nn.Module) -> torch.nn.Module:
    """Give `model` its own class back; returns `model`. Harmless where `patch` was not called.

    Raises:
        ValueError: something else has changed the model's class since.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        unpatch(model._orig_mod)
        return model
    now: Any = type(model)
    if "_mmkern_original" in vars(now):
        object.__setattr__(model, "__class__", now._mmkern_original)
    elif hasattr(now, "_mmkern_original"):
        raise ValueError(f"model: its class was changed after patch(), to {now}; undo that first")
    return model
