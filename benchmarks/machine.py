"""What ran the benchmark: versions, processor, build, and the machine's own ceilings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mmkern
from mmkern.benchmarks.measure import Case, loops_for, seconds_per_call
from mmkern.ops.dispatch import _C

CEILING_SECONDS = 0.15
SMALLEST_COPY = 1 << 16


def _commit() -> str | None:
    """Commit of the checkout mmkern is imported from, with "+" where files differ from it; None if installed."""
    folder = Path(mmkern.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(folder)]
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def facts(device: str = "cpu") -> dict[str, Any]:
    """Everything a reader needs to judge or repeat the numbers; plain JSON values."""
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", torch.__config__.show())
    onednn = re.search(r"MKL-DNN v(\S+)", torch.__config__.show())
    return {
        "processor": _C.processor() if _C else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "mkl": mkl[1] if mkl else None,
        "onednn": onednn[1] if onednn else None,
        "mmkern": mmkern.__version__,
        "commit": _commit(),
        "isa": _C.isa() if _C else None,
        "isas": list(_C.isas()) if _C else [],
        "compiler": _C.build()["compiler"] if _C else None,
        **(_gpu(device) if device != "cpu" else {}),
    }


def _gpu(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        "gpu_processors": properties.multi_processor_count,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "triton": metadata.version("triton"),
    }


class Ceilings:
    """The most this machine does, measured when first asked for and kept for the run.

    Bandwidths are measured at the case's own size, rounded up to a power of two, so that data which fits a
    cache is held against that cache and not against memory.
    """

    def __init__(self, seconds: float = CEILING_SECONDS, device: str = "cpu") -> None:
        self.seconds = seconds
        self.device = device
        self.measured: dict[str, float] = {}

    def __call__(self, case: Case) -> float | None:
        bound = case.bound
        if self.device != "cpu" and bound == "fma" and case.dtype is not torch.float32:
            bound = "bf16_dot"  # a GPU's float16 runs on the same units at the same rate
        return self.of(bound, case.bytes)

    def of(self, bound: str, size: float = 0) -> float | None:
        """GFLOP/s of "fma" or "bf16_dot" (FMA where the processor has none), GB/s of "copy" or "read" at `size`
        bytes moved; None if mmkern._C is not built."""
        if _C is None and self.device == "cpu":
            return None
        moved = 0 if bound in ("fma", "bf16_dot") else max(SMALLEST_COPY, 1 << (int(size) - 1).bit_length())
        name = f"{bound} {moved >> 10} KiB" if moved else bound
        if name not in self.measured:
            self.measured[name] = self._measure(bound, moved)
        return self.measured[name]

    def _measure(self, bound: str, moved: int) -> float:
        if self.device != "cpu":
            return self._measure_gpu(bound, moved)
        assert _C is not None  # `of` has looked
        if bound == "fma":
            return _C.fma_gflops(self.seconds)
        if bound == "bf16_dot":
            return _C.bf16_dot_gflops(self.seconds) or _C.fma_gflops(self.seconds)
        return _C.copy_gbs(moved // 2, self.seconds) if bound == "copy" else _C.read_gbs(moved, self.seconds)

    def _measure_gpu(self, bound: str, moved: int) -> float:
        """By torch's own matmul of random numbers (zeros would draw less power), copy and sum."""
        if bound in ("fma", "bf16_dot"):
            dtype = torch.float32 if bound == "fma" else torch.bfloat16
            a, b = (torch.randn(8192, 8192, device=self.device, dtype=dtype) for _ in range(2))
            return 2 * 8192**3 / self._fastest(lambda: a @ b) / 1e9
        x = torch.randn(moved // 4 // (2 if bound == "copy" else 1), device=self.device)
        y = torch.empty_like(x)
        call = partial(y.copy_, x) if bound == "copy" else x.sum
        return moved / self._fastest(call) / 1e9

    def _fastest(self, call: Callable[[], Any]) -> float:
        """Seconds a call takes in the best of several stretches."""
        times, end = [], time.perf_counter() + self.seconds + 1.0
        loops = loops_for(call, self.device)
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
            times.append(seconds_per_call(call, loops, self.device))
        return min(times)
