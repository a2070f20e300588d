"""How a call reaches a kernel: an op's schema, and the choice of the backend that runs it.

PyTorch's dispatcher picks the kernel by device. What is decided here, before it, is whether a kernel can
take this call at all; if not, the reference formula runs, and `explain` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from mmkern.ops._autograd import Differentiable, DifferentiableWhenRun, Values, apply_plainly
from mmkern.ops._backends import BACKENDS, CPU, CUDA, TRITON, Kernel
from mmkern.ops._checks import KERNEL_DTYPES, PLAIN, check_dense, transformed
from mmkern.ops._choice import Choice, _state, backend, explain, leave_threads
from mmkern.ops._compiled import _C
from mmkern.ops._flops import enter_flop_formulas
from mmkern.ops._kernels import Kernels
from mmkern.ops._spread import is_spread, known_to_dtensor
from mmkern.reference.gradients import record_class

__all__ = ["BACKENDS", "CPU", "CUDA", "TRITON", "Choice", "Kernel", "Op", "backend", "explain"]

_library = torch.library.Library("mmkern", "DEF")
_cuda_library = torch.library.Library("mmkern_cuda", "DEF")  # the same schemas; kernels of mmkern._C_cuda
Backward = Callable[[Sequence[Tensor | None], Any, Sequence[Tensor | None], Collection[str]], dict[str, Tensor]]
Save = Callable[[Any, Sequence[Tensor], Collection[str]], tuple[Values, Values]]
# Keys of tensors whose memory is not laid out by strides: no kernel and no formula here reads it.
_LAYOUT_KEYS = [
    f"{layout}{device}" for layout in ("Sparse", "SparseCsr", "NestedTensor", "Quantized") for device in ("CPU", "CUDA")
]
# Whether a transform of torch.func wrapped a tensor; one that has ended may have left some.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PUBLIC = {"table": "encoding", "offsets": "offset"}  # arguments of a schema that the caller knows by another name


class Op:
    """One operator: its schema, its reference, its fake, and which kernels may take a call.

    Args:
        schema: signature in torch's schema language, without namespace. Its arguments' names make `record`, the class
            by which everything here gets arguments; a set of names tells which gradients are wanted.
        reference: the definition in plain torch; takes the schema's arguments, any device and dtype.
        fake: output shapes, dtypes and strides for tracing.
        kernels: what each backend has. Whether the tensors are on its device is checked here.
        dtype_of: names of the arguments whose dtype, if it is floating point, must be one that kernels take.
        backward: gradients of the kernel's outputs, None where one got none; the record; the outputs; names of the
            wanted gradients -> these by name. It calls another Op, whose reference formula gives second derivatives.
            Without it, the reference formula is differentiated.
        save: the record, outputs, and names of the wanted gradients -> arguments and outputs as backward gets them; by
            default as they are. Put None, a size or `Late` where backward does not read the values: their memory can
            be freed then, and the caller may write into them.
        hidden: for an op of which only the first output is the caller's, the others being for backward, which cannot be
            differentiated through them: names of the arguments, told from the record, whose gradients they can be. Bits
            for those of them that are wanted are its last argument.

    Each op has a twin, `softmax_fwd_called` of `softmax_fwd`, which chooses its backend when it runs and has gradients
    of its own. It stands for the call where calls are recorded and run later: torch.jit.trace, torch.export, and
    torch.compile within `explain` and `backend`. (Not an overload: torch.jit forgets which one it recorded.)
    """

    def __init__(
        self,
        schema: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        kernels: Sequence[Kernel],
        dtype_of: Sequence[str] = (),
        backward: Backward | None = None,
        save: Save | None = None,
        hidden: Callable[[Any], Sequence[str]] | None = None,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.reference = reference
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
            torch.library.register_fake(f"mmkern::{overload}", known_to_dtensor(fake), lib=_library)
        for key in (*_LAYOUT_KEYS, "MkldnnCPU", "AutogradNestedTensor"):
            _library.impl(self.name, self._check_layouts, key)
        self._dispatch = getattr(torch.ops.mmkern, self.name).default
        self._unwrapped = self._dispatch._op  # what that calls, 0.25 us sooner; a compiler would not know it
        self.called = getattr(torch.ops.mmkern, called).default
        arguments = self._dispatch._schema.arguments
        self.record = record_class(self.name, [a.name for a in arguments])
        self.names = [_PUBLIC.get(a.name, a.name) for a in arguments]
        self.places = {a.name: i for i, a in enumerate(arguments)}
        # Positions known from the schema: asking each argument whether it is a tensor costs 0.1 us apiece.
        self.tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self._typed = [self.places[name] for name in dtype_of]
        self._named: dict[tuple[bool, ...], frozenset[str]] = {}
        self.kernels = Kernels(self.name, kernels, self.record, self.tensors, self._typed)
        self.kernels.launchers |= {"cpu": self._dispatch, "reference": reference}
        self._register(schema, fake)
        self._cpu_always = _C is not None and "cpu" in self.kernels.of and self.kernels.of["cpu"].refuses is None

    def _register(self, schema: str, fake: Callable[..., Any]) -> None:
        """Of its kernels what torch's dispatcher does not get from C++."""
        of = self.kernels.of
        if any(kernel.backend.device == "cuda" for kernel in of.values()):
            _library.impl(self.name, self._on_gpu, "CUDA")
        if "cpu" in of and callable(of["cpu"].launch):
            _library.impl(self.name, of["cpu"].launch, "CPU")
        if "cuda" in of:
            _cuda_library.define(schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.register_fake(f"mmkern_cuda::{self.name}", fake, lib=_cuda_library)
            self.kernels.launchers["cuda"] = getattr(torch.ops.mmkern_cuda, self.name).default

    def __call__(self, *args: Any) -> Any:
        plain, wants_grad, fast = self._cpu_always, False, False
        for i in self.tensors:
            if (tensor := args[i]) is not None:
                plain = plain and tensor.is_cpu and type(tensor) in PLAIN
                wants_grad = wants_grad or tensor.requires_grad
        if (
            plain
            and not _state.in_use
            and not _python_dispatch._is_in_torch_dispatch_mode
            and forward_ad._current_level < 0
            and not _are_functorch_transforms_active()
            and _get_tracing_state() is None
        ):
            # Every call of a default CPU process passes here; what _choose would do, in a third of the time.
            fast = not torch.compiler.is_compiling()
            kernel = self._unwrapped if fast else self._dispatch
            for i in self._typed:
                if args[i].dtype not in KERNEL_DTYPES and args[i].is_floating_point():
                    kernel = self.reference
        elif _recorded() or (torch.compiler.is_compiling() and is_spread(args)):
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
            if fast and not any([args[i] is not None and _is_wrapped(args[i]) for i in self.tensors]):
                return apply_plainly(self, kernel, *self._with_wanted(args))
            return Differentiable.apply(self, kernel, *self._with_wanted(args))
        return kernel(*args) if self.hidden is None else kernel(*args)[0]

    def named(self, flags: tuple[bool, ...]) -> frozenset[str]:
        """The names of the arguments whose flags are set."""
        if torch.compiler.is_compiling():  # a guard on the cache would recompile once it has grown
            return frozenset(name for name, flag in zip(self.record._fields, flags, strict=True) if flag)
        found = self._named.get(flags)
        if found is None:
            found = frozenset(name for name, flag in zip(self.record._fields, flags, strict=True) if flag)
            self._named[flags] = found
        return found

    def direct(self, *args: Any) -> Any:
        """The kernel that runs such a call, all of its outputs, no autograd: for ops made of others."""
        return self._launcher(self.kernels.find(args)[0])(*args)

    def _with_wanted(self, args: Values) -> Values:
        if self.hidden is None:
            return args
        wanted = 0
        for i, name in enumerate(self.hidden(self.record._make(args))):
            if (tensor := args[self.places[name]]) is not None and tensor.requires_grad:
                wanted |= 1 << i
        return *args[:-1], wanted

    def _run(self, *args: Any) -> Any:
        return self._choose(args)(*args)

    def _run_differentiable(self, keys: Any, *args: Any) -> Any:
        below = keys & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in self.tensors):
            return DifferentiableWhenRun.apply(self, below, *self._with_wanted(args))
        return self.called.redispatch(below, *args)

    def _on_gpu(self, *args: Any) -> Any:
        """What the operator does with CUDA tensors, in a compiled graph and called by hand, too."""
        return self.kernels.launcher(self.kernels.find(args, TRITON.device)[0])(*args)

    def _check_layouts(self, *args: Any) -> None:
        for i in self.tensors:
            if args[i] is not None:
                check_dense(self.names[i], args[i])

    def _choose(self, args: Values) -> Callable[..., Any]:
        if not torch.compiler.is_compiling():
            leave_threads()
            if _python_dispatch._is_in_torch_dispatch_mode:
                enter_flop_formulas()
        self._check_spread(args)
        ran, reasons = self.kernels.find(args)
        if _state.choices is not None:
            detail = _C.isa() if ran == "cpu" and _C else ""
            refused = {name: reasons.get(name, f"{ran} goes first") for name in BACKENDS[:-1] if name != ran}
            _state.choices.append(Choice(self.name, ran, detail, refused))
        if (ran == "reference" or _state.interpreting) and self.kernels.device(args) == "meta" and not transformed():
            return self._dispatch  # there are no values: the shapes, which the fake tells
        return self._launcher(ran)

    def _launcher(self, name: str) -> Callable[..., Any]:
        """What runs a call outside of the dispatcher; of CUDA tensors it comes back to _on_gpu, as in a graph."""
        return self._dispatch if name == "triton" and not _state.interpreting else self.kernels.launcher(name)

    def _check_spread(self, args: Values) -> None:
        drops = "dropout_seed" in self.names and args[self.names.index("dropout_seed")] is not None
        if drops and is_spread(args):
            raise ValueError("dropout_p: not with a DTensor, of which each part would drop the same elements")


def _recorded() -> bool:
    """Whether calls are recorded now, to run later, when another backend may have to be chosen."""
    return _get_tracing_state() is not None or (
        torch.compiler.is_compiling()
        and (_state.forced is not None or _state.choices is not None or torch.compiler.is_exporting())
    )
