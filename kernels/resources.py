"""What each kernel takes of a GPU, read from its binary: `python -m mmkern.kernels.resources`. Needs no GPU.

Every Triton launcher is called on tensors without memory; what it would launch is compiled for each target, and
registers, spills, shared memory and matrix instructions are read with the tools that Triton's wheel brings. Of the CUDA
C++ kernels, all that mmkern._C_cuda holds for a target are read; "C++" names these alone.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from mmkern.kernels import attention, attention_backward, loss, position, rotary, softmax
from mmkern.kernels.launch import compiling
from mmkern.kernels.numerics import INTERPRETED
from mmkern.testing import FEATURES as ATTENTION_FEATURES
from mmkern.testing import Sizes

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


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# title -> rows of mmkern.testing.FEATURES, and key heads
FEATURES: dict[str, tuple[tuple[str, ...], int]] = {
    "": ((), 8),
    " causal grouped": (("causal",), 2),
    " dropout": (("dropout",), 8),
    " bias": (("float mask, one for the batch",), 8),
    " padding": (("bool mask of keys",), 8),
    " cosine": (("cosine, learned",), 8),
    " euclidean": (("euclidean",), 8),
    " softcap alibi": (("softcap", "alibi of each batch"), 8),
}
SIMILARITIES = ("dot", "cosine", "euclidean", "squared_euclidean")
HEAD_DIMS = (64, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def attention_arguments(
    dtype: torch.dtype, head_dim: int, q_len: int = 1024, k_len: int = 1024, heads: int = 8, kv_heads: int = 8,
    features: Sequence[str] = (),
) -> tuple[Any, ...]:  # fmt: skip
    """Those of `mmkern::attention_fwd` for two sequences."""
    q, k, v = (empty(2, n, length, head_dim, dtype=dtype) for n, length in ((heads, q_len), *[(kv_heads, k_len)] * 2))
    sizes = Sizes(2, heads, q_len, k_len, dtype, "meta", draw=empty)
    o: dict[str, Any] = {}
    for name in features:
        o |= ATTENTION_FEATURES[name](sizes)
    seed = empty(1, dtype=torch.int64) if "dropout_p" in o else None
    return (
        q, k, v, o.get("attn_mask"), o.get("dropout_p", 0.0), o.get("is_causal", False), o.get("scale", 0.125),
        SIMILARITIES.index(o.get("similarity", "dot")), o.get("temperature"), -1, -1, o.get("softcap", 0.0),
        o.get("alibi_slopes"), None, None, False, seed,
    )  # fmt: skip


def _forward(dtype: torch.dtype, head_dim: int, **options: Any) -> None:
    attention.attention_fwd(*attention_arguments(dtype, head_dim, **options))


def _backward(dtype: torch.dtype, head_dim: int, **options: Any) -> None:
    args = attention_arguments(dtype, head_dim, **options)
    query, mask = args[0], args[3]
    out = empty(2, query.shape[2], query.shape[1], head_dim, dtype=dtype).transpose(1, 2)
    wanted = 7 | (8 if mask is not None and mask.is_floating_point() else 0)
    wanted |= 16 * (args[8] is not None) | 32 * (args[12] is not None)
    attention_backward.attention_bwd(out, None, out, empty(*query.shape[:3], dtype=torch.float32), *args, wanted)


def _softmax(width: int, dim: int, dtype: torch.dtype) -> None:
    x = empty(512, width, dtype=dtype) if dim else empty(width, 512, dtype=dtype)
    for forward, backward in (
        (softmax.softmax_fwd, softmax.softmax_bwd),
        (softmax.log_softmax_fwd, softmax.log_softmax_bwd),
    ):
        forward(x, dim)
        backward(x, x, dim)


def _masked_softmax(width: int, dtype: torch.dtype) -> None:
    x, mask, bias = (
        empty(2, 8, 64, width, dtype=dtype),
        empty(2, 1, 1, width, dtype=torch.bool),
        empty(8, 64, width, dtype=dtype),
    )
    seed = empty(1, dtype=torch.int64)
    softmax.masked_softmax_fwd(x, mask, 0.5, bias, 3, 0.1, seed)
    softmax.masked_softmax_bwd(x, None, x, mask, 0.5, bias, 3, 0.1, seed, 1)
    softmax.masked_softmax_bwd(x, x, None, mask, 0.5, bias, 3, 0.0, None, 1)


def _cross_entropy(width: int, dtype: torch.dtype) -> None:
    x, weight = empty(512, width, dtype=dtype), empty(width, dtype=dtype)
    loss.cross_entropy_fwd(x, empty(512, dtype=torch.int64), None, -100, 1, 0.0, False, 1)
    loss.cross_entropy_fwd(x, empty(512, dtype=torch.int64), weight, -100, 1, 0.1, False, 1)
    loss.cross_entropy_fwd(x, x, weight, -100, 1, 0.1, False, 3)
    loss.cross_entropy_bwd_(x, empty(512, dtype=torch.float32), None)


def _position(dtype: torch.dtype) -> None:
    x, seed = empty(4, 9, 1024, 768, dtype=dtype), empty(1, dtype=torch.int64)
    for encoding in ("none", "sinusoidal", "scalar", "sincos2d"):
        position.add_positional_encoding_fwd(x, encoding, None, 0, None, 1.0, 0.0, None)
    position.add_positional_encoding_fwd(x, "sinusoidal", None, 0, empty(4, dtype=torch.int64), 2.0, 0.1, seed)
    table, tokens = empty(2048, 768, dtype=dtype), empty(4, 1024, dtype=torch.int64)
    position.embed_tokens_fwd(tokens, empty(32000, 768, dtype=dtype), "table", table, 3, None, 2.0, 0.1, None, seed)
    position.position_table_bwd(x, 2048, 3, None, 0.1, seed)
    position.embed_tokens_bwd(empty(4, 1024, 768, dtype=dtype), tokens, 32000, 2.0, 0.1, 0, seed)


def _rotary(dtype: torch.dtype) -> None:
    q, k = empty(2, 32, 1024, 128, dtype=dtype), empty(2, 8, 1024, 128, dtype=dtype)
    for pairs in ("half", "interleaved"):
        rotary.rotary_qk_fwd(q, k, None, 1e4, pairs, 128, None, False)
        rotary.rotary_fwd(q, empty(2, 1024, dtype=torch.int64), 1e4, pairs, 64, [32, 32], True)


ROW_CALLS: dict[str, Callable[[torch.dtype], None]] = {
    **{f"softmax {width}": partial(_softmax, width, 1) for width in (64, 1024, 4096, 8192, 32768, 131072)},
    "softmax across 1024": partial(_softmax, 1024, 0),
    **{f"masked softmax {width}": partial(_masked_softmax, width) for width in (64, 4096, 131072)},
    **{f"cross entropy {width}": partial(_cross_entropy, width) for width in (1000, 32000, 128256)},
    "position": _position,
    "rotary": _rotary,
}


def calls() -> dict[str, Callable[[], None]]:
    """Name -> a launcher on tensors without memory; each row of each launch table is among them."""
    found: dict[str, Callable[[], None]] = {}
    for name, dtype in DTYPES.items():
        for head_dim in HEAD_DIMS:
            for feature, (features, kv_heads) in FEATURES.items():
                for way, call in (("forward", _forward), ("backward", _backward)):
                    title = f"attention {way} {name} {head_dim}{feature}"
                    found[title] = partial(call, dtype, head_dim, kv_heads=kv_heads, features=features)
        found |= {f"{title} {name}": partial(call, dtype) for title, call in ROW_CALLS.items()}
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


def cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def read(call: str, kernel: str, target: int, resources: str, sass: str, shared: int) -> Usage:
    found = re.search(r"REG:(\d+) STACK:(\d+)", resources)
    assert found, "cuobjdump: no resource usage in the binary"
    instructions = re.findall(rf"\b({'|'.join(MATRIX)})\b", sass)
    spills = int(found[2]) if re.search(r"\bSTL\b", sass) else 0  # a frame that nothing is stored to is none
    counts = {name: instructions.count(name) for name in MATRIX if name in instructions}
    return Usage(call, kernel, target, int(found[1]), spills, shared, counts)


def usage(call: str, kernel: str, target: int, compiled: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, sass = cuobjdump("--dump-resource-usage", file.name), cuobjdump("-sass", file.name)
    return read(call, kernel, target, resources, sass, compiled.metadata.shared)


def measure_library(target: int, names: Sequence[str] = ()) -> Iterator[Usage]:
    """The kernels of mmkern._C_cuda that are built for a capability; shared memory is what each declares."""
    spec = find_spec("mmkern")
    folder = Path(str(spec.origin)).parent if spec else Path()
    path = next(iter(sorted(folder.glob("_C_cuda*.so"))), None)
    if path is None or (names and "C++" not in names):
        return

    def of_target(what: str) -> str:
        parts = cuobjdump(what, str(path)).split("Fatbin elf code")
        return "".join(part for part in parts if re.search(rf"^arch = sm_{target}a?$", part, re.M))

    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", of_target("-sass"), re.S))
    for mangled, resources in re.findall(r"Function (\S+):\s*\n(.*)", of_target("--dump-resource-usage")):
        shared = re.search(r"SHARED:(\d+)", resources)
        yield read("C++", demangled(mangled), target, resources, sass[mangled], int(shared[1]) if shared else 0)


def demangled(name: str) -> str:
    """softmax<bf16, 128, 32>, where c++filt is."""
    if not (tool := shutil.which("c++filt")):
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"mmkern::(\w+?)(?:_kernel)?(<.*?>)?\(", text)
    return found[1] + (found[2] or "").replace("mmkern::", "") if found else text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mmkern.kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("calls", nargs="*", help="parts of names of calls, such as 'forward bf16 128'; C++ [all]")
    parser.add_argument("--target", nargs="*", type=int, default=list(TARGETS), help="capabilities: 90 for sm_90")
    options = parser.parse_args()
    if INTERPRETED:
        sys.exit("resources: Triton is interpreting; unset TRITON_INTERPRET to compile")
    header = ("call", "kernel", "target", "registers", "spills B", "shared KiB", "matrix instructions")
    print("{:<40} {:<28} {:<7} {:>9} {:>9} {:>10}  {}".format(*header))
    bad = 0
    for target in options.target:
        for found in chain(measure(target, options.calls), measure_library(target, options.calls)):
            print("{:<40} {:<28} {:<7} {:>9} {:>9} {:>10}  {}".format(*found.row), flush=True)
            bad += found.spills > 0 or found.shared > SHARED_LIMIT[target] * 1024
    if bad:
        sys.exit(f"resources: {bad} kernels spill or take more shared memory than there is")


if __name__ == "__main__":
    main()
