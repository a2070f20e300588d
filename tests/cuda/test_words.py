"""The words that kernels multiply matrices with, each against numbers: as g++ compiles them and from nvcc's PTX."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import struct
from functools import cache
from pathlib import Path

import pytest
import torch
from ptx_runner import HERE, ROOT, built, made, run
from torch import Tensor

from mmkern.reference.philox import philox

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the emulator needs g++")
LEVELS = ["g++", "sm_80", "sm_90a"] if shutil.which("nvcc") else ["g++"]
CSRC = ROOT / "csrc"


@cache
def ptx(target: str) -> str:
    texts = [(HERE / "words.cu").read_bytes(), *(p.read_bytes() for p in sorted((CSRC / "cuda/tile").glob("*")))]
    key = hashlib.sha256(b"".join(texts)).hexdigest()[:16]
    out = ROOT / "build" / "emulator" / f"words-{target}-{key}.ptx"
    made(out, ["nvcc", "-std=c++17", "-O3", f"-arch={target}", f"-I{CSRC}", "-ptx", str(HERE / "words.cu")])
    return Path(out).read_text()


def launch(level: str, name: str, given: Tensor, out: Tensor) -> None:
    if level != "g++":
        parameters = struct.pack("QQ", given.data_ptr(), out.data_ptr())
        counts = run(ptx(level), name, (1,), (32,), [parameters], [given, out], dynamic_shared=1536)
        assert counts.shared_conflicts == 0
        return
    library = ctypes.CDLL(str(built("words.cu", "-DMMKERN_EMULATE", f"-I{CSRC}", f"-I{HERE}", "-x", "c++")))
    library.words_run.restype = ctypes.c_char_p
    sizes = [ctypes.c_size_t(t.untyped_storage().nbytes()) for t in (given, out)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (given, out)]
    message = library.words_run(name.encode(), pointers[0], sizes[0], pointers[1], sizes[1])
    assert message == b"", message.decode()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_copies_matrices_and_products(dtype: torch.dtype, level: str) -> None:
    """Small integers, so every sum is exact: a lane that holds another's element shows."""
    given = torch.arange(512).mul(7).remainder(23).sub(11).to(dtype).view(2, 16, 16)
    out = torch.full((32, 4, 4), float("nan"))
    launch(level, "words_f16" if dtype == torch.float16 else "words_bf16", given, out)
    x, y = given.float()
    found = torch.empty(2, 16, 16)
    for lane in range(32):
        g, q = lane // 4, lane % 4 * 2
        for n in range(4):  # y^T's columns 0-7 and 8-15, then y's
            for i in range(4):
                found[n // 2, g + i // 2 * 8, n % 2 * 8 + q + i % 2] = out[lane, n, i]
    assert torch.equal(found[0], x @ y.T)
    assert torch.equal(found[1], x @ y)


@pytest.mark.parametrize("level", LEVELS)
def test_scalars_and_lanes(level: str) -> None:
    x = torch.linspace(-3.0, 10.0, 32)
    x[5:9] = torch.tensor([1e-6, -0.2499, 0.2501, 0.0])
    numbers = [0x89ABCDEF, 0x01234567, 0xFFFFFFF0, 5, 3]
    given = torch.tensor([*x.view(torch.int32).tolist(), *(n - (n >> 31 << 32) for n in numbers)], dtype=torch.int32)
    out = torch.full((32, 12), float("nan"))
    launch(level, "words_scalar", given, out)
    lanes = torch.arange(32)
    want = [x.double().tanh(), x.sqrt(), x.abs(), x[lanes // 4 * 4], x[lanes ^ 3], torch.ones(32), torch.zeros(32)]
    for i, column in enumerate([*want, x.double().exp2()]):
        torch.testing.assert_close(out[:, i].double(), column.double(), rtol=4e-7, atol=0, equal_nan=True)
    counter = [(numbers[2] + lanes) & 0xFFFFFFFF, *(torch.tensor(n) for n in (*numbers[3:], 7))]
    words = philox(counter, [torch.tensor(n) for n in numbers[:2]])
    bits = out[:, 8:].contiguous().view(torch.int32).long() & 0xFFFFFFFF
    assert torch.equal(bits, torch.stack(words, -1))
