"""What the backends have for one op, and which of them runs a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmkern.ops._autograd import Values
from mmkern.ops._backends import BACKENDS, CUDA, TRITON, Kernel, unmeasured
from mmkern.ops._checks import KERNEL_DTYPES, transformed
from mmkern.ops._choice import _state


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

    def find(self, args: Values) -> tuple[str, dict[str, str]]:
        """The backend that runs a call, and why others do not: those before it, and while `explain` asks, all."""
        devices, reasons = self.devices(args), dict[str, str]()
        for name in BACKENDS[:-1]:
            if _state.forced not in (None, name):
                reasons[name] = f"backend({_state.forced!r}) is in force"
            elif reason := self._refusal(name, devices, args):
                reasons[name] = reason
            elif _state.choices is None:
                break
        ran = next(name for name in BACKENDS if name not in reasons)
        if _state.strict and _state.forced not in (None, ran):
            raise RuntimeError(f"{self.op}: backend {_state.forced!r} refused: {reasons[str(_state.forced)]}")
        return ran, reasons

    def launcher(self, name: str) -> Callable[..., Any]:
        if name not in self.launchers:
            self.launchers[name] = self.of[name].launcher()
        return self.launchers[name]

    def devices(self, args: Values) -> set[str]:
        return {args[i].device.type for i in self.tensors if args[i] is not None}

    def _refusal(self, name: str, devices: set[str], args: Values) -> str | None:
        if name not in self.of:
            return "no kernel for this op"
        kernel = self.of[name]
        if devices != {kernel.backend.device} and not (kernel.backend is TRITON and _state.interpreting):
            return f"tensors are on {' and '.join(sorted(devices))}"
        if reason := kernel.backend.missing():
            return reason
        if kernel.backend is CUDA and _state.forced != "cuda":
            device = next(args[i].device for i in self.tensors if args[i] is not None)
            if reason := unmeasured(self.op, device):
                return reason
        if transformed():
            return "inside forward-mode AD or a torch.func transform"
        if dtype := self._wrong_dtype(args):
            return f"the kernels take float32, bfloat16 and float16, not {dtype}"
        return kernel.refuses(self.record._make(args)) if kernel.refuses else None

    def _wrong_dtype(self, args: Values) -> torch.dtype | None:
        dtypes = [args[i].dtype for i in self.typed]
        return next((dtype for dtype in dtypes if dtype not in KERNEL_DTYPES and dtype.is_floating_point), None)
