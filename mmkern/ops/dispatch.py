"""How a call reaches a kernel: schemas, the choice of backend, and the words that explain it.

PyTorch's dispatcher picks the kernel by device. What is decided here, before it, is whether a kernel can
take this call at all; if not, the reference formula runs, and `explain` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkern.reference.gradients import formula_gradients

_C: ModuleType | None
try:
    from mmkern import _C
except ImportError as error:  # a checkout without a compiler: every op still runs, through its reference
    _C = None
    _not_built = f"mmkern._C could not be loaded: {error}"

BACKENDS = ("cpu", "cuda", "triton", "reference")  # in the order they are tried
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
_library = torch.library.Library("mmkern", "DEF")
_cuda_library = torch.library.Library("mmkern_cuda", "DEF")  # the same schemas; kernels of mmkern._C_cuda
Refusal = Callable[..., str | None]
Values = Sequence[Any]
Backward = Callable[[Sequence[Tensor | None], Values, Values, Sequence[bool]], Sequence[Tensor | None]]


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
    interpreting: bool = False  # "triton" is forced and Triton runs its kernels in its interpreter, on any device
    record: list[Choice] | None = None
    in_use: bool = False  # forced or record is set: one look per call instead of two

    def update(self, **fields: Any) -> dict[str, Any]:
        """Set fields, and give back what restores them."""
        before = {name: getattr(self, name) for name in fields}
        for name, value in fields.items():
            setattr(self, name, value)
        self.in_use = self.forced is not None or self.record is not None
        return before


_state = _State()


class Op:
    """One operator: its schema, its reference, its fake, and which kernels may take a call.

    Args:
        schema: signature in torch's schema language, without namespace.
        reference: the definition in plain torch; takes the schema's arguments, any device and dtype.
        fake: output shapes, dtypes and strides for tracing.
        kernels: backend name -> function of the schema's arguments that returns None where that backend's
            kernel can run the call, or the reason why not. Whether the tensors are on its device is checked here.
        triton: "file.function" of the launcher in mmkern.kernels, which takes the schema's arguments; or, of an op made
            of others, its function itself; "" if none.
        backward: gradients of the kernel's outputs, None where one got none; the schema's arguments; the outputs;
            and for each argument whether its gradient is wanted -> one gradient (or None) for each argument. It
            calls another Op, whose reference formula gives second derivatives. Without it, the reference formula
            is differentiated.
        save: arguments and outputs, as backward gets them; replace by None what backward does not read, so that
            its memory can be freed.
        hidden: only the first output is the caller's; the others are for backward, which cannot be differentiated
            through them.
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: dict[str, Refusal],
        backward: Backward | None = None,
        save: Callable[[Values, Values], tuple[Values, Values]] = lambda args, outputs: (args, outputs),
        hidden: bool = False,
        triton: str | Callable[..., Any] = "",
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.reference = reference
        self.kernels = kernels
        self.backward = backward
        self.save = save
        self.hidden = hidden
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mmkern::{self.name}", fake, lib=_library)
        self.triton = triton
        if triton:
            _library.impl(self.name, self._on_cuda, "CUDA")
        self._dispatch = getattr(torch.ops.mmkern, self.name).default
        self._cuda: Callable[..., Any] | None = None
        if "cuda" in kernels:
            _cuda_library.define(schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(f"mmkern_cuda::{self.name}", fake, lib=_cuda_library)
            self._cuda = getattr(torch.ops.mmkern_cuda, self.name).default
        # Positions known from the schema: asking each argument whether it is a tensor costs 0.1 us apiece.
        types = [str(argument.type) for argument in self._dispatch._schema.arguments]
        self._tensors = [i for i, name in enumerate(types) if name in ("Tensor", "Optional[Tensor]")]
        self._cpu_refuses = kernels.get("cpu") if _C else None

    def __call__(self, *args: Any) -> Any:
        on_cpu, wants_grad = True, False
        for i in self._tensors:
            if (tensor := args[i]) is not None:
                on_cpu = on_cpu and tensor.is_cpu
                wants_grad = wants_grad or tensor.requires_grad
        if on_cpu and self._cpu_refuses is not None and not _state.in_use and not _transformed():
            # Every call of a default CPU process passes here; what _choose would do, in a third of the time.
            kernel = self._dispatch if self._cpu_refuses(*args) is None else self.reference
        else:
            kernel = self._choose(args)
        if wants_grad and kernel is not self.reference and torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # tracing refuses one tensor as two inputs: query is key, say
                args = tuple(a.view_as(a) if isinstance(a, Tensor) else a for a in args)
            return _Differentiable.apply(self, *args)
        return kernel(*args)[0] if self.hidden else kernel(*args)

    def direct(self, *args: Any) -> Any:
        """The kernel of the tensors' device, all of its outputs, no autograd: for ops made of others."""
        if self._cuda is not None and _state.forced == "cuda":
            return self._cuda(*args)
        return self._launch(*args) if _state.interpreting else self._dispatch(*args)

    def _on_cuda(self, *args: Any) -> Any:
        return self._launch(*args)

    def _launch(self, *args: Any) -> Any:
        """The Triton kernel, imported when first needed."""
        launcher = self.triton
        if isinstance(launcher, str):
            module, function = launcher.split(".")
            launcher = getattr(import_module(f"mmkern.kernels.{module}"), function)
        self._launch = launcher  # type: ignore[method-assign]
        return launcher(*args)

    def _choose(self, args: Sequence[Any]) -> Callable[..., Any]:
        devices = {args[i].device.type for i in self._tensors if args[i] is not None}
        reasons: dict[str, str] = {}
        for name in BACKENDS[:-1]:
            if _state.forced not in (None, name):
                reasons[name] = f"backend({_state.forced!r}) is in force"
            elif reason := self._refusal(name, devices, args):
                reasons[name] = reason
        ran = next((name for name in BACKENDS if name not in reasons), "reference")
        if _state.strict and _state.forced not in (None, ran):
            raise RuntimeError(f"{self.name}: backend {_state.forced!r} refused: {reasons[str(_state.forced)]}")
        if _state.record is not None:
            detail = _C.isa() if ran == "cpu" and _C else ""
            refused = {name: reasons.get(name, f"{ran} goes first") for name in BACKENDS[:-1] if name != ran}
            _state.record.append(Choice(self.name, ran, detail, refused))
        if ran == "reference":
            return self.reference
        if ran == "cuda" and self._cuda is not None:
            return self._cuda
        return self._launch if _state.interpreting else self._dispatch

    def _refusal(self, name: str, devices: set[str], args: Sequence[Any]) -> str | None:
        if name not in self.kernels:
            return "no kernel for this op"
        if devices != {_DEVICE[name]} and not (name == "triton" and _state.interpreting):
            return f"tensors are on {' and '.join(sorted(devices))}"
        if name == "cpu" and _C is None:
            return _not_built
        if name == "triton" and (reason := _without_triton()):
            return reason
        if name == "cuda" and (reason := _without_cuda()):
            return reason
        if name == "cuda" and _state.forced != "cuda":  # so Triton runs by default: what has numbers goes first
            return "not yet measured on this GPU; backend('cuda') forces it"
        if _transformed():
            return "inside forward-mode AD or a torch.func transform"
        return self.kernels[name](*args)


def _interprets() -> bool:
    return bool(import_module("triton").knobs.runtime.interpret)


@cache
def _without_triton() -> str | None:
    """Why Triton kernels cannot run in this process, if they cannot."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "Triton is not installed: pip install 'mmkern[triton]'"
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"needs Triton >= 3.6, found {version}"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (7, 5):
        return "needs compute capability 7.5 or higher"
    return None


@cache
def _without_cuda() -> str | None:
    """Why the CUDA C++ kernels cannot run in this process, if they cannot; loads them where they can."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    built = sorted(Path(__file__).parents[1].glob("_C_cuda*.so"))
    if not built:
        return "mmkern._C_cuda was not built: it needs nvcc >= 12.8"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs compute capability 8.0 or higher"
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        return f"mmkern._C_cuda could not be loaded: {error}"
    return None


def _transformed() -> bool:
    """Whether forward-mode AD or a torch.func transform is on: these act on torch's own ops, so on the reference."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Differentiable(torch.autograd.Function):
    """Forward by the kernel; gradients by the op's backward, or by differentiating its formula, recomputed."""

    # Without setup_context, for which torch would inspect the signature at every call: 30 us.
    @staticmethod
    def forward(ctx: Any, op: Op, *args: Any) -> Any:
        output = op.direct(*args)
        kept: Values = args
        outputs: Values = ()
        if op.backward is not None:
            kept, outputs = op.save(args, output if isinstance(output, tuple) else (output,))
            ctx.set_materialize_grads(False)
        ctx.op = op
        ctx.rest = list(kept)
        ctx.where = [i for i in op._tensors if kept[i] is not None]
        for i in ctx.where:
            ctx.rest[i] = None
        ctx.outputs = [t is not None for t in outputs]
        ctx.save_for_backward(*(kept[i] for i in ctx.where), *(t for t in outputs if t is not None))
        return output[0] if op.hidden else output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        args, saved = list(ctx.rest), iter(ctx.saved_tensors)
        for i in ctx.where:
            args[i] = next(saved)
        op, wanted = ctx.op, ctx.needs_input_grad[1:]
        if op.backward is None:
            return None, *formula_gradients(op.reference, grads, args, wanted)
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(args))
        outputs = [next(saved) if there else None for there in ctx.outputs]
        return None, *op.backward(grads, args, outputs, wanted)


@contextmanager
def backend(name: str, *, strict: bool = False, isa: str | None = None) -> Iterator[None]:
    """Force ops onto one backend within a `with` block.

    Process-wide, like torch's own backend flags: calls of other threads are forced too while the block runs.
    "triton" takes tensors on the CPU, too, where Triton interprets its kernels (TRITON_INTERPRET=1): slowly.

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
    isa_before = _C.isa() if _C else None
    if _C and isa is not None:
        _C.set_isa(isa)
    interpreting = name == "triton" and _without_triton() is None and _interprets()
    before = _state.update(forced=name, strict=strict, interpreting=interpreting)
    try:
        yield
    finally:
        _state.update(**before)
        if _C and isa is not None:
            _C.set_isa(isa_before)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Run `fn(*args, **kwargs)` and tell, for each mmkern op it called, which backend ran and why no other did.

    `fn` may be an op, a module or any function. Returns one `Choice` per op call, in order; print them.

    Example:
        >>> import mmkern, torch
        >>> print(mmkern.explain(mmkern.softmax, torch.zeros(2, dtype=torch.float64), dim=0)[0].backend)
        reference
    """
    record: list[Choice] = []
    before = _state.update(record=record)
    try:
        fn(*args, **kwargs)
    finally:
        _state.update(**before)
    if _state.record is not None:  # inside another explain, which is told of these calls too
        _state.record.extend(record)
    return record
