"""What ran the benchmark: versions, processor, build, and the machine's own ceilings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import mmkern
from mmkern.benchmarks.measure import Case
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


def facts() -> dict[str, Any]:
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
    }


class Ceilings:
    """The most this machine does, measured when first asked for and kept for the run.

    Bandwidths are measured at the case's own size, rounded up to a power of two, so that data which fits a
    cache is held against that cache and not against memory.
    """

    def __init__(self, seconds: float = CEILING_SECONDS) -> None:
        self.seconds = seconds
        self.measured: dict[str, float] = {}

    def __call__(self, case: Case) -> float | None:
        return self.of(case.bound, case.bytes)

    def of(self, bound: str, size: float = 0) -> float | None:
        """GFLOP/s of "fma" or "bf16_dot" (FMA where the processor has none), GB/s of "copy" or "read" at `size`
        bytes moved; None if mmkern._C is not built."""
        if _C is None:
            return None
        moved = 0 if bound in ("fma", "bf16_dot") else max(SMALLEST_COPY, 1 << (int(size) - 1).bit_length())
        name = f"{bound} {moved >> 10} KiB" if moved else bound
        if name not in self.measured:
            self.measured[name] = self._measure(bound, moved)
        return self.measured[name]

    def _measure(self, bound: str, moved: int) -> float:
        assert _C is not None  # `of` has looked
        if bound == "fma":
            return _C.fma_gflops(self.seconds)
        if bound == "bf16_dot":
            return _C.bf16_dot_gflops(self.seconds) or _C.fma_gflops(self.seconds)
        return _C.copy_gbs(moved // 2, self.seconds) if bound == "copy" else _C.read_gbs(moved, self.seconds)
