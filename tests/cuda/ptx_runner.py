"""The PTX runner from Python: kernels that a compiler wrote for a GPU run on CPU tensors, checked as no GPU does.

`run` takes any module; `running_triton` makes the launchers of mmkern.kernels compile for a capability and run here.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra"]
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


class RunOptions(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int * 3),
        *[(name, ctypes.c_int) for name in ("dynamic_shared", "order", "eager", "strict_proxies", "ties")],
    ]


class RunCounts(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("switches", "matrix_loads", "matrix_conflicts", "shared_conflicts", "products", "tied")
    ]


class EmulationError(RuntimeError):
    """What the emulator found: a race, an access out of bounds, a deadlock, an opcode without meaning."""


def made(path: Path, command: Sequence[str]) -> None:
    """Have `command` make a file, if it is not there; of several processes one does, and the others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            fresh = path.with_suffix(".fresh")
            subprocess.run([*command, "-o", str(fresh)], check=True)
            fresh.rename(path)


@cache
def built(source: str, *flags: str) -> Path:
    """A shared library of a C++ file of this folder, compiled once for its text, its headers and these flags."""
    if not shutil.which("g++"):
        raise RuntimeError("the emulator needs g++")
    read = [HERE / source, *HERE.glob("*.h"), ROOT / "csrc/cuda/tile/types.h"]
    read += [path for path in ROOT.glob("csrc/cuda/**/*") if "-DMMKERN_EMULATE" in flags and path.is_file()]
    texts = [path.read_bytes() for path in sorted(read)]
    key = hashlib.sha256(b"".join(texts) + repr((source, flags)).encode()).hexdigest()[:16]
    library = ROOT / "build" / "emulator" / f"{Path(source).stem}-{key}.so"
    made(library, ["g++", *FLAGS, *flags, str(HERE / source)])
    return library


@cache
def _runner() -> Any:
    library = ctypes.CDLL(str(built("runner.cpp")))
    library.mmkern_run_ptx.restype = ctypes.c_char_p
    library.mmkern_check_ptx.restype = ctypes.c_char_p
    return library


def check(module: str) -> None:
    """Raise EmulationError where the runner has no exact meaning for something in a module."""
    if message := _runner().mmkern_check_ptx(module.encode()).decode():
        raise EmulationError(message)


def run(
    module: str,
    entry: str,
    grid: Sequence[int],
    threads: Sequence[int],
    parameters: Sequence[bytes],
    tensors: Sequence[Tensor],
    *,
    dynamic_shared: int = 0,
    order: int = 0,
    eager: bool = False,
    strict_proxies: bool = False,
    ties: bool = False,
) -> RunCounts:
    """Run one kernel. parameters: the bytes of each; tensors: what it may touch, all of their storages.

    ties: lanes of a warp may store, with one instruction, floats that differ in their last bits to one place.

    Raises:
        EmulationError: what went wrong first.
    """

    def three(given: Sequence[int]) -> Any:
        return (ctypes.c_int * 3)(*(*given, 1, 1)[:3])

    options = RunOptions(three(grid), three(threads), dynamic_shared, order, eager, strict_proxies, ties)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    kept = [aligned(p) for p in parameters]
    counts = RunCounts()
    message = _runner().mmkern_run_ptx(
        module.encode(), entry.encode(), ctypes.byref(options), (ctypes.c_void_p * len(storages))(*storages),
        (ctypes.c_size_t * len(storages))(*storages.values()), len(storages),
        (ctypes.c_void_p * len(kept))(*(address for _, address in kept)), len(kept), ctypes.byref(counts),
    )  # fmt: skip
    if message:
        raise EmulationError(f"{entry}: {message.decode()}")
    return counts


def aligned(data: bytes, to: int = 64) -> tuple[Any, int]:
    """A buffer that holds `data` at a multiple of `to`, and that address."""
    buffer = ctypes.create_string_buffer(len(data) + to)
    address = -(-ctypes.addressof(buffer) // to) * to
    ctypes.memmove(address, data, len(data))
    return buffer, address


@dataclass
class Runs:
    """What `running_triton` ran: name of each kernel, with its counts."""

    kernels: list[tuple[str, RunCounts]] = field(default_factory=list)
    order: int = 0
    eager: bool = False


def _tensor_map(descriptor: Any, meta: dict[str, Any]) -> bytes:
    """As tests/cuda/tile_copy.h has it: base, sizes, strides, box, bytes of an element, bytes of a swizzled row."""
    size = descriptor.base.element_size()

    def five(given: Sequence[int]) -> list[int]:
        return (list(given)[::-1] + [0] * 5)[:5]

    strides = [step * size for step in five(descriptor.strides)]
    swizzle = 0 if meta["swizzle"] == 0 else 16 << meta["swizzle"]
    sizes, box = five(descriptor.shape), five(meta["block_size"])
    raw = struct.pack("Q5q5q5hBB", descriptor.base.data_ptr(), *sizes, *strides, *box, size, swizzle)
    return raw.ljust(128, b"\0")


def run_triton(runs: Runs, kernel: Any, blocks: int, *args: Any, **options: Any) -> None:
    """Compile a Triton kernel for the target in force, and run its PTX."""
    compiled = kernel.warmup(*args, grid=(blocks,), **options)
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    metas = list(getattr(compiled.metadata, "tensordesc_meta", None) or [])
    parameters: list[bytes] = []
    tensors: list[Tensor] = []
    for name, kind in compiled.src.signature.items():
        value = given.get(name)
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            tensors.append(value)
            parameters.append(struct.pack("Q", value.data_ptr()))
        elif kind.startswith("tensordesc"):
            tensors.append(value.base)
            parameters.append(_tensor_map(value, metas.pop(0)))
            parameters += [struct.pack("i", n) for n in value.shape]
            parameters += [struct.pack("q", n) for n in value.strides]
        else:
            parameters.append(struct.pack(FORMATS[kind], value))
    parameters += [bytes(8)] * 2  # scratch memory, of which these kernels have none
    counts = run(
        compiled.asm["ptx"], compiled.metadata.name, (blocks,), (compiled.metadata.num_warps * 32,), parameters,
        tensors, dynamic_shared=compiled.metadata.shared, order=runs.order, eager=runs.eager, ties=True,
    )  # fmt: skip
    runs.kernels.append((compiled.metadata.name, counts))


def _without_assembler(*given: Any) -> Any:
    """Keeps ptxas out of Triton's stages: half of the time, and nothing here reads its binary."""
    if not given:
        return "ptx only", "0"
    given[1]["cubin"] = lambda source, metadata: b""
    return None


@contextmanager
def running_triton(capability: int) -> Iterator[Runs]:
    """Have the launchers of mmkern.kernels run what Triton compiles for a capability, on CPU tensors."""
    import triton

    from mmkern.kernels import attention, attention_backward, launch, loss, position, rotary, softmax
    from mmkern.ops import _backends

    runs = Runs()

    def launch_here(kernel: Any, blocks: int, on: Tensor, *args: Any, **options: Any) -> None:
        if blocks:
            run_triton(runs, kernel, blocks, *args, **options)

    with ExitStack() as stack:
        stack.enter_context(launch.compiling(capability))
        stack.enter_context(mock.patch.object(triton.knobs.runtime, "add_stages_inspection_hook", _without_assembler))
        stack.enter_context(mock.patch.object(_backends, "interprets", return_value=True))  # so it takes CPU tensors
        for module in (attention, attention_backward, loss, position, rotary, softmax):
            stack.enter_context(mock.patch.object(module, "launch", launch_here))
        yield runs
