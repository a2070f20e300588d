"""How a call reaches a kernel: schemas, the choice of backend, and the words that explain it.

PyTorch's dispatcher picks the kernel by device. What is decided here, before it, is whether a kernel can
take this call at all; if not, the reference formula runs, and `explain` says why.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from mmkern.ops._autograd import Differentiable, DifferentiableWhenRun, Values
from mmkern.ops._compiled import _C, not_built
from mmkern.ops._flops import enter_flop_formulas

BACKENDS = ("cpu", "cuda", "triton", "reference")  # in the order they are tried
_DEVICE = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}
_library = torch.library.Library("mmkern", "DEF")
_cuda_library = torch.library.Library("mmkern_cuda", "DEF")  # the same schemas; kernels of mmkern._C_cuda
Refusal = Callable[..., str | None]
Backward = Callable[[Sequence[Tensor | None], Values, Values, Sequence[bool]], Sequence[Tensor | None]]
Save = Callable[[Values, Values, Sequence[bool]], tuple[Values, Values]]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))  # the types that no __torch_dispatch__ stands behind
# Keys of tensors whose memory is not laid out by strides: no kernel and no formula here reads it.
_LAYOUT_KEYS = [
    f"{layout}{device}" for layout in ("Sparse", "SparseCsr", "NestedTensor", "Quantized") for device in ("CPU", "CUDA")
]
_PUBLIC = {"table": "encoding", "offsets": "offset"}  # arguments of a schema that the caller knows by another name


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


class _State:
    """Process-wide, like torch's own backend flags; forced by `backend`, filled by `explain`.

    What holds is said by the blocks that are open, the last first. Blocks of two threads may close in any order, so
    none of them restores what it found.
    """

    def __init__(self) -> None:
        self._open: list[dict[str, Any]] = []
        self._lock = Lock()
        self._isa: str | None = None  # outside of all blocks that choose one
        self.forked = False  # this is a forked child, whose torch has not been told to leave its threads
        self._apply()

    def fork(self, pending: bool) -> None:
        """In a forked child, first with True; a thread of the parent may have held the lock."""
        self._lock = Lock()
        self.forked = pending
        self._apply()

    def enter(self, **fields: Any) -> dict[str, Any]:
        """Set fields until `leave` gets what this returns."""
        with self._lock:
            if "isa" in fields and not any("isa" in other for other in self._open):
                self._isa = _C.isa() if _C else None
            self._open.append(fields)
            self._apply()
        return fields

    def leave(self, fields: dict[str, Any]) -> None:
        with self._lock:
            self._open = [other for other in self._open if other is not fields]
            self._apply()
            if "isa" in fields and _C:
                _C.set_isa(self._last("isa", self._isa))

    def _apply(self) -> None:
        self.forced: str | None = self._last("forced")
        self.strict: bool = self._last("strict", False)
        # "triton" is forced and Triton runs its kernels in its interpreter, on any device
        self.interpreting: bool = self._last("interpreting", False)
        self.record: list[Choice] | None = self._last("record")
        self.in_use = bool(self._open) or self.forked  # one look per call instead of three

    def _last(self, name: str, default: Any = None) -> Any:
        return next((fields[name] for fields in reversed(self._open) if name in fields), default)


_state = _State()
os.register_at_fork(after_in_child=lambda: _state.fork(True))


def leave_threads() -> None:
    """In a forked child, one thread from the first call on: torch's thread team stayed behind with the parent.

    Its matmul would wait for the team forever, and so would the casts, copies and sums of more than 32,768 elements
    that autograd makes around an op in backward. So the setting is not taken back.
    """
    if _state.forked:
        torch.set_num_threads(1)
        _state.fork(False)


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
        save: arguments, outputs, and for each argument whether its gradient is wanted -> arguments and outputs as
            backward gets them. Put None, a size or `Late` where backward does not read the values: their memory can
            be freed then, and the caller may write into them.
        hidden: for an op of which only the first output is the caller's, the others being for backward, which cannot be
            differentiated through them: what backward will want, told from the arguments. It is the last of them.

    Each op has a twin, `softmax_fwd_called` of `softmax_fwd`, which chooses its backend when it runs and has gradients
    of its own. It stands for the call where calls are recorded and run later: torch.jit.trace, torch.export, and
    torch.compile within `explain` and `backend`. (Not an overload: torch.jit forgets which one it recorded.)
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: dict[str, Refusal],
        backward: Backward | None = None,
        save: Save = lambda args, outputs, wanted: (args, outputs),
        hidden: Callable[[Values], int] | None = None,
        triton: str | Callable[..., Any] = "",
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.reference = reference
        self.kernels = kernels
        self.backward = backward
        self.save = save
        self.hidden = hidden
        called = f"{self.name}_called"
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.define(schema.replace(self.name, called, 1), tags=torch.Tag.pt2_compliant_tag)
        _library.impl(self.name, reference, "CompositeExplicitAutograd")
        _library.impl(called, self._run, "CompositeExplicitAutograd")
        _library.impl(called, self._run_differentiable, "Autograd", with_keyset=True)
        for overload in (self.name, called):
            torch.library.register_fake(f"mmkern::{overload}", _known_to_dtensor(fake), lib=_library)
        for key in (*_LAYOUT_KEYS, "MkldnnCPU", "AutogradNestedTensor"):
            _library.impl(self.name, self._check_layouts, key)
        self.triton = triton
        if triton:
            _library.impl(self.name, self._on_cuda, "CUDA")
        self._dispatch = getattr(torch.ops.mmkern, self.name).default
        self._cuda: Callable[..., Any] | None = None
        if "cuda" in kernels:
            _cuda_library.define(schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(f"mmkern_cuda::{self.name}", fake, lib=_cuda_library)
            self._cuda = getattr(torch.ops.mmkern_cuda, self.name).default
        self.called = getattr(torch.ops.mmkern, called).default
        # Positions known from the schema: asking each argument whether it is a tensor costs 0.1 us apiece.
        arguments = self._dispatch._schema.arguments
        self._tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self.names = [_PUBLIC.get(a.name, a.name) for a in arguments]
        self._cpu_refuses = kernels.get("cpu") if _C else None

    def __call__(self, *args: Any) -> Any:
        plain, wants_grad = True, False
        for i in self._tensors:
            if (tensor := args[i]) is not None:
                plain = plain and tensor.is_cpu and type(tensor) in _PLAIN
                wants_grad = wants_grad or tensor.requires_grad
        if (
            plain
            and self._cpu_refuses is not None
            and not _state.in_use
            and not _python_dispatch._is_in_torch_dispatch_mode
            and forward_ad._current_level < 0
            and not _are_functorch_transforms_active()
            and _get_tracing_state() is None
        ):
            # Every call of a default CPU process passes here; what _choose would do, in a third of the time.
            kernel = self._dispatch if self._cpu_refuses(*args) is None else self.reference
        elif _recorded() or (torch.compiler.is_compiling() and self._is_spread(args)):
            # Dynamo would make the gradient of an output that nobody used of plain zeros, which DTensor does not take.
            self._check_spread(args)
            return self.called(*args)[0] if self.hidden is not None else self.called(*args)
        else:
            kernel = self._choose(args)
        if kernel is self.reference:
            self._check_layouts(*args)
        elif wants_grad and torch.is_grad_enabled():
            if torch.compiler.is_compiling():  # tracing refuses one tensor as two inputs: query is key, say
                args = tuple(a.view_as(a) if isinstance(a, Tensor) else a for a in args)
            return Differentiable.apply(self, *self._with_wanted(args))
        return kernel(*args) if self.hidden is None else kernel(*args)[0]

    def _with_wanted(self, args: Values) -> Values:
        return args if self.hidden is None else (*args[:-1], self.hidden(args))

    def _run(self, *args: Any) -> Any:
        return self._choose(args)(*args)

    def _run_differentiable(self, keys: Any, *args: Any) -> Any:
        below = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in self._tensors):
            return DifferentiableWhenRun.apply(self, below, *self._with_wanted(args))
        return self.called.redispatch(below, *args)

    def _check_layouts(self, *args: Any) -> None:
        for i in self._tensors:
            if args[i] is not None:
                check_dense(self.names[i], args[i])

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

    def _choose(self, args: Values) -> Callable[..., Any]:
        if not torch.compiler.is_compiling():
            leave_threads()
            if _python_dispatch._is_in_torch_dispatch_mode:
                enter_flop_formulas()
        self._check_spread(args)
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
        if devices == {"meta"} and not _transformed():
            return self._dispatch  # there are no values: the shapes, which the fake tells
        if ran == "reference":
            return self.reference
        if ran == "cuda" and self._cuda is not None:
            return self._cuda
        return self._launch if _state.interpreting else self._dispatch

    def _is_spread(self, args: Values) -> bool:
        distributed = sys.modules.get("torch.distributed.tensor")
        return distributed is not None and any(isinstance(args[i], distributed.DTensor) for i in self._tensors)

    def _check_spread(self, args: Values) -> None:
        drops = "dropout_seed" in self.names and args[self.names.index("dropout_seed")] is not None
        if drops and self._is_spread(args):
            raise ValueError("dropout_p: not with a DTensor, of which each part would drop the same elements")

    def _refusal(self, name: str, devices: set[str], args: Sequence[Any]) -> str | None:
        if name not in self.kernels:
            return "no kernel for this op"
        if devices != {_DEVICE[name]} and not (name == "triton" and _state.interpreting):
            return f"tensors are on {' and '.join(sorted(devices))}"
        if name == "cpu" and _C is None:
            return not_built
        if name == "triton" and (reason := _without_triton()):
            return reason
        if name == "cuda" and (reason := _without_cuda()):
            return reason
        if name == "cuda" and _state.forced != "cuda":  # so Triton runs by default: what has numbers goes first
            return "not yet measured on this GPU; backend('cuda') forces it"
        if _transformed():
            return "inside forward-mode AD or a torch.func transform"
        return self.kernels[name](*args)


def _known_to_dtensor(fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which also tells DTensor how to split the ops, where there is DTensor.

    It asks for the output's shape before it looks for a rule, in eager calls and while torch.compile traces. So the
    first call finds the rules, and torch.distributed is not imported before its user does.
    """

    def told(*args: Any) -> Any:
        if "torch.distributed.tensor" in sys.modules:
            import_module("mmkern.ops._sharding").register()
        return fake(*args)

    return told


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
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def _recorded() -> bool:
    """Whether calls are recorded now, to run later, when another backend may have to be chosen."""
    return _get_tracing_state() is not None or (
        torch.compiler.is_compiling()
        and (_state.forced is not None or _state.record is not None or torch.compiler.is_exporting())
    )


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """What autocast turns tensors on t's device into; None where it is off, or unknown as on "meta"."""
    device = t.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def check_dense(name: str, t: Tensor) -> None:
    """Raise TypeError if elements of t do not lie in memory by strides, or are not the numbers they stand for."""
    if t.layout is not torch.strided or t.is_nested or t.is_quantized:
        kind = "nested" if t.is_nested else t.dtype if t.is_quantized else t.layout
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def by_value(*tensors: Tensor) -> bool:
    """Whether these can be read and written as what they are: nothing is traced, faked, batched or spread."""
    if _transformed() or torch.compiler.is_compiling():
        return False
    return all(type(t) in _PLAIN and not torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors)


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
    interpreting = name == "triton" and _without_triton() is None and _interprets()
    fields = {"forced": name, "strict": strict, "interpreting": interpreting}
    block = _state.enter(**fields, **({} if isa is None else {"isa": isa}))
    try:
        if _C and isa is not None:
            _C.set_isa(isa)
        yield
    finally:
        _state.leave(block)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Run `fn(*args, **kwargs)` and tell, for each mmkern op it called, which backend ran and why no other did.

    `fn` may be an op, a module or any function. Returns one `Choice` per op call, in order; print them. Process-wide:
    calls that other threads make meanwhile are told, too, since autograd may run backward in a thread of its own.

    Example:
        >>> import mmkern, torch
        >>> print(mmkern.explain(mmkern.softmax, torch.zeros(2, dtype=torch.float64), dim=0)[0].backend)
        reference
    """
    record: list[Choice] = []
    block = _state.enter(record=record)
    try:
        fn(*args, **kwargs)
    finally:
        _state.leave(block)
    if _state.record is not None:  # inside another explain, which is told of these calls too
        _state.record.extend(record)
    return record
