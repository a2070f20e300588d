"""The backends: why one of them cannot run a call, and what it launches; in which order they are tried.

`explain`, the choice before a call and the dispatch of CUDA tensors all read a `Kernel`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from mmkern.ops._compiled import _C, not_built

BACKENDS = ("cpu", "cuda", "triton", "reference")  # in the order they are tried

# Where the kernel in CUDA C++ was measured to be faster than Triton's: op -> compute capabilities. There it goes first;
# elsewhere what has numbers does.
MEASURED: dict[str, tuple[tuple[int, int], ...]] = {}


@dataclass
class Backend:
    """A backend as this process has it.

    name: one of BACKENDS.
    device: type of the tensors that it takes.
    missing: says why it cannot run here at all, if it cannot; loads it where it can.
    """

    name: str
    device: str
    missing: Callable[[], str | None]


@dataclass(frozen=True)
class Kernel:
    """What a backend has for an op.

    launch: "file.function" in mmkern.kernels, imported when first needed; or a function; either takes the schema's
        arguments. "": the operator of this schema that C++ registers, in namespace mmkern for the CPU and mmkern_cuda.
    refuses: why this kernel cannot run a call, if it cannot, told from the named arguments. A dtype that no kernel
        takes is refused before (`Op`, dtype_of).
    """

    backend: Backend
    launch: str | Callable[..., Any] = ""
    refuses: Callable[[Any], str | None] | None = None

    def launcher(self) -> Callable[..., Any]:
        if not isinstance(self.launch, str):
            return self.launch
        module, function = self.launch.split(".")
        launcher: Callable[..., Any] = getattr(import_module(f"mmkern.kernels.{module}"), function)
        return launcher


def interprets() -> bool:
    """Whether Triton interprets its kernels, on any device."""
    return bool(import_module("triton").knobs.runtime.interpret)


@cache
def _without_triton() -> str | None:
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


CPU = Backend("cpu", "cpu", lambda: not_built if _C is None else None)
CUDA = Backend("cuda", "cuda", _without_cuda)
TRITON = Backend("triton", "cuda", _without_triton)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unmeasured(op: str, device: torch.device) -> str | None:
    """Why CUDA C++ does not go before Triton on this device, if it does not."""
    if op in MEASURED and _capability(device) in MEASURED[op]:
        return None
    return "not yet measured on this GPU; backend('cuda') forces it"
