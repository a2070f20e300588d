"""What the backends have for one op, and which of them runs a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmkern.ops._autograd import Values
from mmkern.ops._backends import BACKENDS, CUDA, TRITON, Kernel, unmeasured
from mmkern.ops._checks import KERNEL_DTYPES, transformed
from mmkern.ops._choice import _state

_WITH_KERNELS = BACKENDS[:-1]


class Kernels:
    """An op's kernels, one of a backend, and its reference.

    record: class of the op's arguments by name. tensors, typed: places of tensors, and of those whose dtype is checked.
    launchers: backend -> function of the schema's arguments. Triton's is imported when it is first needed.
    """

    def __init__(self, op: str, kernels: Sequence[Kernel], record: Any, tensors: list[int], typed: list[int]) -> None:
        self.op = op
        self.of = {kernel.backend.name: kernel for kernel in kernels}
        self.record, self.tensors, self.typed = record, tensors, typed
        self.launchers: dict[str, Callable[..., Any]] = {}

    def find(self, args: Values, device: str | None = None) -> tuple[str, dict[str, str]]:
        """The backend that runs a call, and why others do not: those before it, and while `explain` asks, all."""
        device, forced, reasons = device or self.device(args), _state.forced, {}
        ran = "reference"
        for name in _WITH_KERNELS:
            if forced is not None and forced != name:
                reasons[name] = f"backend({forced!r}) is in force"
            elif reason := self._refusal(name, device, args):
                reasons[name] = reason
            elif ran == "reference":
                ran = name
                if _state.choices is None:
                    break
        if _state.strict and forced is not None and forced != ran:
            raise RuntimeError(f"{self.op}: backend {forced!r} refused: {reasons[forced]}")
        return ran, reasons

    def launcher(self, name: str) -> Callable[..., Any]:
        if name not in self.launchers:
            self.launchers[name] = self.of[name].launcher()
        return self.launchers[name]

    def device(self, args: Values) -> str:
        """The type of the tensors' device, or in words those that they are on."""
        found = {args[i].device.type for i in self.tensors if args[i] is not None}
        return found.pop() if len(found) == 1 else " and ".join(sorted(found))

    def _refusal(self, name: str, device: str, args: Values) -> str | None:
        kernel = self.of.get(name)
        if kernel is None:
            return "no kernel for this op"
        backend = kernel.backend
        if device != backend.device and not (backend is TRITON and _state.interpreting):
            return f"tensors are on {device}"
        if reason := backend.missing():
            return reason
        preferred = backend is not CUDA or _state.forced == "cuda"
        if not preferred and (reason := unmeasured(self.op, args[self.tensors[0]].device)):
            return reason
        if transformed():
            return "inside forward-mode AD or a torch.func transform"
        for i in self.typed:
            dtype = args[i].dtype
            if dtype not in KERNEL_DTYPES and dtype.is_floating_point:
                return f"the kernels take float32, bfloat16 and float16, not {dtype}"
        return kernel.refuses(self.record._make(args)) if kernel.refuses else None
