"""Launching Triton kernels: on the tensors' device and its current stream, in the interpreter, or only compiling.

Every launcher of this package goes through `launch` and chooses its tile sizes with `pick`, so what runs on a GPU is
what the interpreter checks and what is compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

Row = TypeVar("Row")


def cdiv(a: int, b: int) -> int:
    """Triton's own of this name take 4 us a call."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass
class Compilation:
    """Instead of running kernels, collect them, compiled for one target: `with compiling(90) as found`."""

    capability: int
    kernels: dict[int, tuple[Any, Any]] = field(default_factory=dict)  # id of a compiled kernel -> (function, it)


_compilations: list[Compilation] = []  # the innermost `compiling` block is last


class _NoDevice:
    """What Triton asks of a driver before it compiles, for a machine without the GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise RuntimeError("nothing can be timed without a GPU")


@contextmanager
def compiling(capability: int) -> Iterator[Compilation]:
    """Have launches compile for a CUDA compute capability (90 is sm_90) without a GPU; tensors are on "meta"."""
    _compilations.append(Compilation(capability))
    driver = triton.runtime.driver
    before = driver._active  # asking for it in public looks for a GPU
    driver.set_active(_NoDevice(GPUTarget("cuda", capability, 32)))
    try:
        yield _compilations[-1]
    finally:
        _compilations.pop()
        driver.set_active(before)


@cache
def _device_capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as major * 10 + minor; the lowest supported, 75, for any other.

    AMD's GPUs have 64 KiB of shared memory, as that one has; the interpreter takes any size.
    """
    if _compilations:
        return _compilations[-1].capability
    if device.type != "cuda" or torch.version.hip:
        return 75
    return _device_capability(torch.cuda.current_device() if device.index is None else device.index)


def pick(table: Mapping[int, Row], device: torch.device) -> Row:
    """The row of the highest compute capability that the device has."""
    have = capability(device)
    return table[max(row for row in table if row <= have)]


def launch(kernel: Any, blocks: int, on: Tensor, *args: Any, **options: Any) -> None:
    """Run `kernel` as that many programs on the current stream of the device of `on`, whatever device is current."""
    if blocks == 0:
        return
    if _compilations:
        compiled = kernel.warmup(*args, grid=(blocks,), **options)
        _compilations[-1].kernels[id(compiled)] = (kernel, compiled)
    elif on.is_cuda and on.device.index != torch.cuda.current_device():
        with torch.cuda.device(on.device):
            kernel[(blocks,)](*args, **options)
    else:
        kernel[(blocks,)](*args, **options)
