"""The CUDA C++ kernels without a GPU: torch.ops.mmkern_cuda on CPU tensors, its kernels run by the emulator.

The host code is the library's own. A kernel runs as g++ compiled it, or from the PTX that nvcc wrote for a target.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from ptx_runner import HERE, ROOT, built, made

from mmkern.ops.dispatch import CUDA  # and with it the schemas

CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
TORCH = Path(torch.__file__).parent


@cache
def library() -> Any:
    """All of csrc/cuda on the emulator."""
    sources = [*KERNELS, *sorted((CSRC / "cuda").glob("*.cpp"))]
    flags = [
        "-O1", "-DMMKERN_EMULATE", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{CSRC}", f"-I{HERE}", "-isystem", str(TORCH / "include"), "-x", "c++", *map(str, sources),
        f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    path = built("emulated.cpp", *flags)
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@cache
def ptx(target: str, seed: int = 0) -> str:
    """PTX of every kernel for a target such as "80", compiled once for the text of csrc/cuda."""
    texts = b"".join(path.read_bytes() for path in sorted((CSRC / "cuda").glob("**/*")) if path.is_file())
    key = hashlib.sha256(texts + f"{target} {seed}".encode()).hexdigest()[:16]
    found = []
    for source in KERNELS:
        out = ROOT / "build" / "emulator" / f"{source.stem}-{target}-{key}.ptx"
        options = ["-std=c++17", "-O3", f"-arch=sm_{target}", f"-DMMKERN_SEED={seed}", f"-I{CSRC}", "-ptx"]
        made(out, ["nvcc", *options, str(source)])
        found.append(out.read_text())
    return "\n".join(found)


def levels() -> list[str]:
    """How the kernels can be run here: on a GPU, that alone."""
    if torch.cuda.is_available():
        return [] if CUDA.missing() else ["cuda"]
    if not shutil.which("g++"):
        return []
    return ["g++", "sm_80", "sm_90a"] if shutil.which("nvcc") else ["g++"]


@contextmanager
def emulated(level: str, order: int = 0, seed: int = 0) -> Iterator[Any]:
    """Have torch.ops.mmkern_cuda run at a level: "g++", the PTX of "sm_80", or on a GPU as it is.

    order: seed of the order of threads. seed: of PTX, the error that is built into it.
    """
    if level == "cuda":
        yield None
        return
    lib = library()
    text = "" if level == "g++" else ptx(level.removeprefix("sm_"), seed)
    lib.mmkern_emulate(text.encode(), order)
    try:
        yield lib
    finally:
        lib.mmkern_emulate(b"", 0)
