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
from mmkern.benchmarks.records import ARITHMETIC, Case
from mmkern.benchmarks.timing import loops_for, seconds_per_call
from mmkern.ops.dispatch import _C

CEILING_SECONDS = 0.12
STRETCHES = 3  # a machine that is busy for a moment is not so for all of them
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
        "clock": _clock(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "power_cap": _power_cap(),
        **(_gpu(device) if device != "cpu" else {}),
    }


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _clock() -> str | None:
    """Clock rates of the processor's cores as the system tells them, "2596 to 3700 MHz"; None where it does not."""
    rates = sorted(float(r) for r in re.findall(r"cpu MHz\s*: ([\d.]+)", _read("/proc/cpuinfo") or ""))
    return f"{rates[0]:.0f} to {rates[-1]:.0f} MHz" if rates else None


def _power_cap() -> str | None:
    """The long-term limit of the first package, in watts; None where the system does not show it."""
    microwatts = _read("/sys/class/powercap/intel-rapl:0/constraint_0_power_limit_uw")
    return f"{int(microwatts) / 1e6:.0f} W" if microwatts else None


def available_bytes() -> int | None:
    """Memory that can still be taken without swapping; None where the system does not tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo") or "")
    return int(found[1]) << 10 if found else None


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
    """The most this machine does: the best of several stretches, measured when first asked for and again at the end.

    Bandwidths are measured at the case's own size, rounded up to a power of two, so that data which fits a
    cache is held against that cache and not against memory.
    """

    def __init__(self, seconds: float = CEILING_SECONDS, device: str = "cpu") -> None:
        self.seconds = seconds
        self.device = device
        self.measured: dict[str, float] = {}

    def __call__(self, case: Case) -> tuple[str, float | None]:
        """The bound that holds for a case on this machine, and its ceiling in GFLOP/s or GB/s."""
        bound = self.bound(case)
        return bound, self.of(bound, case.bytes)

    def bound(self, case: Case) -> str:
        if self.device != "cpu":  # a GPU's float16 runs on the same units as bfloat16, at the same rate
            return "bf16_dot" if case.bound == "fma" and case.dtype is not torch.float32 else case.bound
        return "fma" if case.bound == "bf16_dot" and not self.of("bf16_dot") else case.bound

    def of(self, bound: str, size: float = 0) -> float | None:
        """GFLOP/s of "fma" or "bf16_dot", GB/s of "copy" or "read" at `size` bytes moved; None if this machine has
        no such instruction or mmkern._C is not built."""
        if _C is None and self.device == "cpu":
            return None
        name, moved = self._name(bound, size)
        if name not in self.measured:
            self.measured[name] = max(self._measure(bound, moved) or 0.0 for _ in range(STRETCHES))
        return self.measured[name] or None

    def again(self, case: Case) -> float | None:
        """The case's ceiling after another look: what was measured while the machine was busy is too low."""
        bound = self.bound(case)
        name, moved = self._name(bound, case.bytes)
        if self.of(bound, case.bytes):
            self.measured[name] = max(self.measured[name], *(self._measure(bound, moved) or 0.0 for _ in range(3)))
        return self.measured.get(name) or None

    def limit(self, case: Case) -> float | None:
        """What no right kernel exceeds. A busy machine's threads wait for one another, so that what one thread does
        counts too, times the threads; of arithmetic the fastest kind there is, torch's matrix product included."""
        bound, ceiling = self(case)
        if self.device != "cpu" or not ceiling:
            return ceiling
        bounds = ARITHMETIC if bound in ARITHMETIC else (bound,)
        count = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            alone = [self._measure(b, self._name(b, case.bytes / count)[1]) or 0.0 for b in bounds for _ in range(3)]
        finally:
            torch.set_num_threads(count)
        if bound in ARITHMETIC and "matmul" not in self.measured:
            self.measured["matmul"] = max(_matmul_gflops(dtype) for dtype in (torch.float32, torch.bfloat16))
        return max(ceiling, count * max(alone), self.measured["matmul"] if bound in ARITHMETIC else 0.0)

    def check_again(self) -> float:
        """Measures every arithmetic and the largest bandwidths once more; by how much the worst one differs, as a
        share of the higher number: a clock that fell or a neighbour that came shows here."""
        worst = 0.0
        largest = {name.split()[0]: name for name in sorted(self.measured, key=_kib) if name != "matmul"}
        for bound, name in largest.items():
            if before := self.measured[name]:
                now = max(self._measure(bound, _kib(name) << 10) or 0.0 for _ in range(STRETCHES))
                worst = max(worst, abs(now - before) / max(now, before))
                self.measured[name] = max(now, before)
        return worst

    def _name(self, bound: str, size: float) -> tuple[str, int]:
        moved = 0 if bound in ARITHMETIC else max(SMALLEST_COPY, 1 << (int(size) - 1).bit_length())
        return f"{bound} {moved >> 10} KiB" if moved else bound, moved

    def _measure(self, bound: str, moved: int) -> float | None:
        seconds = self.seconds / STRETCHES
        if self.device != "cpu":
            return self._measure_gpu(bound, moved)
        assert _C is not None  # `of` has looked
        if bound == "fma":
            return _C.fma_gflops(seconds)
        if bound == "bf16_dot":
            return _C.bf16_dot_gflops(seconds)
        return _C.copy_gbs(moved // 2, seconds) if bound == "copy" else _C.read_gbs(moved, seconds)

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
        times, end = [], time.perf_counter() + (self.seconds + 1.0) / STRETCHES
        loops = loops_for(call, self.device)
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
            times.append(seconds_per_call(call, loops, self.device))
        return min(times)


def _kib(name: str) -> int:
    """64 of "copy 64 KiB", 0 of a ceiling without a size."""
    return int(name.split()[1]) if " " in name else 0


def _matmul_gflops(dtype: torch.dtype, size: int = 256) -> float:
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(seconds_per_call(lambda: a @ b) for _ in range(5)) / 1e9
