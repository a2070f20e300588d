"""How a call reaches a kernel: schemas, the choice of backend, and the words that explain it.

PyTorch's dispatcher picks the kernel by device. What is decided here, before it, is whether a kernel can
take this call at all; if not, the reference formula runs, and `explain` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

try:
    from mmkern import _C
except ImportError as error:  # a checkout without a compiler: every op still runs, through its reference
    _C = None
    _not_built = f"mmkern._C could not be loaded: {error}"

BACKENDS = ("cpu", "cuda", "triton", "reference")
_library = torch.library.Library("mmkern", "DEF")
Refusal = Callable[..., str | None]


@dataclass(frozen=True)
class Choice:
    """One op call: the backend that ran it, and why each other one did not.

    op: name of the op in `torch.ops.mmkern`.
    backend: one of "cpu", "cuda", "triton", "reference".
    detail: instruction set for "cpu", else "".
    refused: backend -> reason.
    """

    op: str
    backend: str
    detail: str
    refused: dict[str, str]

    def __str__(self) -> str:
        ran = f"{self.backend} ({self.detail})" if self.detail else self.backend
        reasons = "".join(f"\n    not {name}: {why}" for name, why in self.refused.items())
        return f"{self.op}: {ran}{reasons}"


@dataclass
class _State:
    """Process-wide, like torch's own backend flags; forced by `backend`, filled by `explain`."""

    forced: str | None = None
    strict: bool = False
    record: list[Choice] | None = None


_state = _State()


class Op:
    """One operator: its schema, its reference, its fake, and which kernels may take a call.

    Args:
        schema: signature in torch's schema language, without namespace.
        reference: the definition in plain torch; takes the schema's arguments, any device and dtype.
        fake: output shapes, dtypes and strides for tracing.
        kernels: backend name -> function of the schema's arguments that returns None where that backend's
            kernel can run the call, or the reason why not. Whether the tensors are on its device is checked here.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: dict[str, Refusal],
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.reference = reference
        self.kernels = kernels
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mmkern::{self.name}", fake, lib=_library)
        self._dispatch = getattr(torch.ops.mmkern, self.name).default

    def __call__(self, *args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        kernel = self._choose(tensors[0].device.type, args) if _is_default() else self._choose_forced(tensors, args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if torch.compiler.is_compiling():  # tracing refuses one tensor as two inputs: query is key, say
                args = tuple(a.view_as(a) if isinstance(a, torch.Tensor) else a for a in args)
            return _Differentiable.apply(self, kernel, *args)
        return kernel(*args)

    def _choose(self, device: str, args: Sequence[Any]) -> Callable[..., Any]:
        for name in ("cuda", "triton") if device == "cuda" else (device,):
            if name in self.kernels and self._refusal(name, device, args) is None:
                return self._dispatch
        return self.reference

    def _choose_forced(self, tensors: Sequence[torch.Tensor], args: Sequence[Any]) -> Callable[..., Any]:
        device = tensors[0].device.type
        refused: dict[str, str] = {}
        for name in BACKENDS[:-1]:
            if _state.forced not in (None, name):
                refused[name] = f"backend({_state.forced!r}) is in force"
            elif reason := self._refusal(name, device, args):
                refused[name] = reason
            else:
                break
        else:
            name = "reference"
        if _state.strict and _state.forced not in (None, name):
            raise RuntimeError(f"{self.name}: backend {_state.forced!r} refused: {refused[str(_state.forced)]}")
        if _state.record is not None:
            detail = _C.isa() if name == "cpu" else ""
            _state.record.append(Choice(self.name, name, detail, refused))
        return self.reference if name == "reference" else self._dispatch

    def _refusal(self, name: str, device: str, args: Sequence[Any]) -> str | None:
        if name not in self.kernels:
            return "no kernel for this op"
        if device != ("cpu" if name == "cpu" else "cuda"):
            return f"tensors are on {device}"
        if name == "cpu" and _C is None:
            return _not_built
        return self.kernels[name](*args)


def _is_default() -> bool:
    return _state.forced is None and _state.record is None


class _Differentiable(torch.autograd.Function):
    """Forward by `kernel`, gradients by differentiating the reference formula, recomputed in backward."""

    @staticmethod
    def forward(op: Op, kernel: Callable[..., Any], *args: Any) -> Any:
        return kernel(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        op, _, *args = inputs
        ctx.op = op
        ctx.where = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        ctx.rest = [None if isinstance(a, torch.Tensor) else a for a in args]
        ctx.save_for_backward(*(args[i] for i in ctx.where))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        args = list(ctx.rest)
        for i, t in zip(ctx.where, ctx.saved_tensors, strict=True):
            args[i] = t
        wanted = [i for i in ctx.where if ctx.needs_input_grad[i + 2]]

        def formula(*leaves: torch.Tensor) -> Any:
            for i, leaf in zip(wanted, leaves, strict=True):
                args[i] = leaf
            return ctx.op.reference(*args)

        _, pullback = torch.func.vjp(formula, *(args[i] for i in wanted))
        found = dict(zip(wanted, pullback(grads if len(grads) > 1 else grads[0]), strict=True))
        return None, None, *(found.get(i) for i in range(len(args)))


@contextmanager
def backend(name: str, *, strict: bool = False, isa: str | None = None) -> Iterator[None]:
    """Force ops onto one backend within a `with` block, process-wide.

    Args:
        name: "cpu", "cuda", "triton" or "reference".
        strict: raise RuntimeError, saying why, where that backend cannot run a call; otherwise the reference runs.
        isa: with "cpu", the instruction set to use: one of `mmkern._C.isas()`.

    Raises:
        ValueError: name is no backend, or isa is none that this processor runs.

    Example:
        >>> import mmkern, torch
        >>> with mmkern.backend("reference"):
        ...     mmkern.softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if isa is not None and (name != "cpu" or _C is None):
        raise ValueError(f"isa: only for the built 'cpu' backend, got isa={isa!r} with name={name!r}")
    before = (_state.forced, _state.strict, _C.isa() if _C else None)
    if isa is not None:
        _C.set_isa(isa)
    _state.forced, _state.strict = name, strict
    try:
        yield
    finally:
        _state.forced, _state.strict = before[:2]
        if isa is not None:
            _C.set_isa(before[2])


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Run `fn(*args, **kwargs)` and tell, for each mmkern op it called, which backend ran and why no other did.

    `fn` may be an op, a module or any function. Returns one `Choice` per op call, in order; print them.

    Example:
        >>> import mmkern, torch
        >>> print(mmkern.explain(mmkern.softmax, torch.zeros(2, dtype=torch.float64), dim=0)[0].backend)
        reference
    """
    before, _state.record = _state.record, []
    try:
        fn(*args, **kwargs)
        return _state.record
    finally:
        _state.record = before
