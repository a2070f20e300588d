"""What each kernel takes of a GPU, read from its binary: `python -m mmkern.kernels.resources`. Needs no GPU.

Every launcher is called on tensors without memory; what it would launch is compiled for each target, and registers,
spills, shared memory and matrix instructions are read with the tools that Triton's wheel brings.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mmkern.kernels import attention, attention_backward
from mmkern.kernels.launch import compiling
from mmkern.kernels.numerics import INTERPRETED

TARGETS = (80, 90, 100)
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a block may take
MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "OMMA", "DMMA")


@dataclass(frozen=True)
class Usage:
    """One compiled kernel. spills: bytes of local memory a thread; shared: bytes a block; matrix: instructions."""

    call: str
    kernel: str
    target: int
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]

    @property
    def row(self) -> tuple[str, ...]:
        matrix = " ".join(f"{n} {name}" for name, n in self.matrix.items()) or "-"
        shared = f"{self.shared / 1024:.1f}"
        return self.call, self.kernel, f"sm_{self.target}", str(self.registers), str(self.spills), shared, matrix


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# name -> (tensor or float options of one call)
FEATURES: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "": lambda dtype: {},
    " causal grouped": lambda dtype: {"causal": True, "kv_heads": 2},
    " dropout": lambda dtype: {"dropout_p": 0.1, "seed": empty(1, dtype=torch.int64)},
    " bias": lambda dtype: {"mask": empty(1, 8, 1024, 1024, dtype=dtype)},
    " padding": lambda dtype: {"mask": empty(2, 1, 1, 1024, dtype=torch.bool)},
    " cosine": lambda dtype: {"similarity": 1, "temperature": empty(8, dtype=torch.float32)},
    " euclidean": lambda dtype: {"similarity": 2},
    " softcap alibi": lambda dtype: {"softcap": 30.0, "slopes": empty(2, 8, dtype=torch.float32)},
}
HEAD_DIMS = (64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def attention_arguments(
    dtype: torch.dtype, head_dim: int, q_len: int = 1024, k_len: int = 1024, heads: int = 8, kv_heads: int = 8,
    causal: bool = False, mask: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
    similarity: int = 0, temperature: Tensor | None = None, softcap: float = 0.0, slopes: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of `mmkern::attention_fwd` for two sequences."""
    q, k, v = (empty(2, n, length, head_dim, dtype=dtype) for n, length in ((heads, q_len), *[(kv_heads, k_len)] * 2))
    score = (causal, 0.125, similarity, temperature, -1, -1, softcap, slopes, None, None, False)
    return q, k, v, mask, dropout_p, *score, seed


def _forward(dtype: torch.dtype, head_dim: int, **options: Any) -> None:
    attention.attention_fwd(*attention_arguments(dtype, head_dim, **options))


def _backward(dtype: torch.dtype, head_dim: int, **options: Any) -> None:
    args = attention_arguments(dtype, head_dim, **options)
    query, mask = args[0], args[3]
    out = empty(2, query.shape[2], query.shape[1], head_dim, dtype=dtype).transpose(1, 2)
    wanted = 7 | (8 if mask is not None and mask.is_floating_point() else 0)
    wanted |= 16 * (args[8] is not None) | 32 * (args[12] is not None)
    attention_backward.attention_bwd(out, None, out, empty(*query.shape[:3], dtype=torch.float32), *args, wanted)


def calls() -> dict[str, Callable[[], None]]:
    """Name -> a launcher on tensors without memory; each row of each launch table is among them."""
    found: dict[str, Callable[[], None]] = {}
    for name, dtype in DTYPES.items():
        for head_dim in HEAD_DIMS:
            for feature, options in FEATURES.items():
                for way, call in (("forward", _forward), ("backward", _backward)):
                    title = f"attention {way} {name} {head_dim}{feature}"
                    found[title] = lambda call=call, d=dtype, n=head_dim, o=options: call(d, n, **o(d))  # type: ignore[misc]
        decode = {"q_len": 1, "k_len": 4096, "heads": 32, "kv_heads": 8}
        found[f"attention decode {name} 128"] = lambda d=dtype, o=decode: _forward(d, 128, **o)  # type: ignore[misc]
    return found


def measure(target: int, names: Sequence[str] = ()) -> Iterator[Usage]:
    """Compile the calls whose name holds one of `names` (all if none) for a compute capability."""
    for title, call in calls().items():
        if names and not any(name in title for name in names):
            continue
        with compiling(target) as found:
            call()
        for function, compiled in found.kernels.values():
            yield usage(title, function.__name__.strip("_").removesuffix("_kernel"), target, compiled)


def usage(call: str, kernel: str, target: int, compiled: Any) -> Usage:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def cuobjdump(what: str) -> str:
            command = [str(tools / "cuobjdump"), what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        resources = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("--dump-resource-usage"))
        assert resources, "cuobjdump: no resource usage in the binary"
        instructions = re.findall(rf"\b({'|'.join(MATRIX)})\b", cuobjdump("-sass"))
    counts = {name: instructions.count(name) for name in MATRIX if name in instructions}
    return Usage(call, kernel, target, int(resources[1]), int(resources[2]), compiled.metadata.shared, counts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mmkern.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("calls", nargs="*", help="parts of names of calls, such as 'forward bf16 128' [all]")
    parser.add_argument("--target", nargs="*", type=int, default=list(TARGETS), help="capabilities: 90 for sm_90")
    options = parser.parse_args()
    if INTERPRETED:
        sys.exit("resources: Triton is interpreting; unset TRITON_INTERPRET to compile")
    header = ("call", "kernel", "target", "registers", "spills B", "shared KiB", "matrix instructions")
    print("{:<40} {:<16} {:<7} {:>9} {:>9} {:>10}  {}".format(*header))
    bad = 0
    for target in options.target:
        for found in measure(target, options.calls):
            print("{:<40} {:<16} {:<7} {:>9} {:>9} {:>10}  {}".format(*found.row), flush=True)
            bad += found.spills > 0 or found.shared > SHARED_LIMIT[target] * 1024
    if bad:
        sys.exit(f"resources: {bad} kernels spill or take more shared memory than there is")


if __name__ == "__main__":
    main()
