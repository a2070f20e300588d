"""The vector vocabulary of csrc/cpu/simd/vec.isa.h, per instruction set, against numpy and torch.

tests/vec_probe.cpp is compiled here once per instruction set with the flags of the build, so nothing of it ships.
"""

import ctypes
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkern.testing import isas

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / sysconfig.get_platform() / "mmkern._C" / "build.ninja"
pytestmark = pytest.mark.skipif(not BUILD.exists(), reason="not built in this checkout: its compiler flags are unknown")
SPECIAL = np.array([0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-45, -1e-38, 3.4e38, 65519.0, 65520.0], np.float32)


@pytest.fixture(scope="module", params=isas())
def probe(request, tmp_path_factory):
    rules = BUILD.read_text()
    command = re.search(r"rule cxx\n command = (\S+) (.*) \$extra", rules)
    extra = re.search(rf"extra = (.*-DMMKERN_ISA={request.param})\n", rules)
    assert command, "no compile command in build.ninja"
    assert extra, f"no flags for {request.param} in build.ninja"
    if not shutil.which(command[1]):
        pytest.skip(f"{command[1]} is not installed")
    out = tmp_path_factory.mktemp("vec") / f"{request.param}.so"
    flags = [*shlex.split(command[2].replace("$$", "$")), *extra[1].split(), "-fvisibility=default"]
    subprocess.run([command[1], *flags, "-shared", str(ROOT / "tests/vec_probe.cpp"), "-o", str(out)], check=True)
    library = ctypes.CDLL(str(out))
    library.isa = request.param
    return library


def pointer(a: np.ndarray) -> ctypes.c_void_p:
    return a.ctypes.data_as(ctypes.c_void_p)


def apply(probe, op: str, *args: np.ndarray) -> np.ndarray:
    x, y, z = (np.ascontiguousarray(a, np.float32) for a in (*args, *[args[0]] * (3 - len(args))))
    out = np.full(x.size + 1, 7.0, np.float32)
    assert probe.apply(op.encode(), pointer(x), pointer(y), pointer(z), pointer(out), ctypes.c_long(x.size)) == 0
    assert out[-1] == 7.0, "wrote past the end"
    return out[:-1]


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    number = ~np.isnan(a)
    np.testing.assert_array_equal(a.view(np.uint32)[number], b.view(np.uint32)[number])


def values(count: int = 1003, scale: float = 10.0) -> list[np.ndarray]:
    """Three arrays: random numbers, and every pair of special ones at the head."""
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(scale=scale, size=(3, count)).astype(np.float32)
    pairs = np.stack(np.meshgrid(SPECIAL, SPECIAL), -1).reshape(-1, 2)
    x[: len(pairs)], y[: len(pairs)] = pairs.T
    return [x, y, z]


@pytest.mark.parametrize(
    ("op", "exact"),
    {
        "add": lambda x, y, z: x + y,
        "sub": lambda x, y, z: x - y,
        "mul": lambda x, y, z: x * y,
        "div": lambda x, y, z: x / y,
        "max": lambda x, y, z: np.where(x > y, x, y),  # y where either is NaN
        "min": lambda x, y, z: np.where(x < y, x, y),
        "less": lambda x, y, z: (x < y) * np.float32(1),
        "less_equal": lambda x, y, z: (x <= y) * np.float32(1),
        "equal": lambda x, y, z: (x == y) * np.float32(1),
        "is_nan": lambda x, y, z: np.isnan(x) * np.float32(1),
        "logic": lambda x, y, z: (((x < y) & ~np.isnan(z)) | (x == z)) * np.float32(1),
        "abs": lambda x, y, z: np.abs(x),
        "sqrt": lambda x, y, z: np.sqrt(x),
    }.items(),
)
def test_exact_operations(probe, op, exact):
    with np.errstate(all="ignore"):
        x, y, z = values()
        same_bits(apply(probe, op, x, y, z), np.asarray(exact(x, y, z), np.float32))


@pytest.mark.parametrize("op", ["fma", "fnma"])
def test_multiply_add_rounds_once_or_twice(probe, op):
    x, y, z = (a[200:].astype(np.float64) for a in values())
    exact = z + x * y * (1 if op == "fma" else -1)
    bound = np.spacing(np.abs(x * y).astype(np.float32)) + np.spacing(np.abs(exact).astype(np.float32))
    assert (np.abs(apply(probe, op, x, y, z) - exact) <= bound).all()
    if probe.lanes() > 4 or getattr(probe, "fused", False):  # avx2 and up, and Arm, have the instruction
        one = np.float32(1 + 2**-12)
        assert apply(probe, op, np.full(16, one), np.full(16, one if op == "fma" else -one), np.full(16, -1.0))[0] == (
            np.float32(np.float64(one) ** 2 - 1)
        )


def test_round_to_nearest_even(probe):
    x = np.concatenate([np.arange(-40, 40) / 4, SPECIAL[4:9], [1e6 + 0.5, -1e6 - 1.5, 2.0**30]]).astype(np.float32)
    np.testing.assert_array_equal(apply(probe, "round", x), np.round(x))


def test_pow2_is_exact_and_zero_at_the_bottom(probe):
    n = np.arange(-127, 128).astype(np.float32)
    same_bits(apply(probe, "pow2", n), np.where(n == -127, 0.0, 2.0 ** n.astype(np.float64)).astype(np.float32))


def test_exp2(probe):
    x = np.linspace(-126.4, 127, 200_003).astype(np.float32)
    actual, exact = apply(probe, "exp2", x).astype(np.float64), np.exp2(x.astype(np.float64))
    assert (np.abs(actual / exact - 1)).max() < 2.5e-7
    edges = apply(probe, "exp2", np.array([-127, -1e4, -np.inf, np.nan, 0, 1, -1, 127], np.float32))
    np.testing.assert_array_equal(edges, np.array([0, 0, 0, np.nan, 1, 2, 0.5, 2.0**127], np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_conversions_of_every_half_and_back(probe, name, dtype):
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)[:-3]  # a tail that is no whole vector
    wide = np.full(halves.numel(), 7.0, np.float32)
    getattr(probe, f"{name}_to_f32")(pointer(halves.numpy()), pointer(wide), ctypes.c_long(wide.size))
    expected = halves.view(dtype).float().numpy()
    same_bits(wide, expected)
    back = np.zeros(wide.size, np.int16)
    getattr(probe, f"f32_to_{name}")(pointer(wide), pointer(back), ctypes.c_long(wide.size))
    number, expected = ~np.isnan(wide), halves.numpy().copy()
    if probe.isa == "avx512_bf16" and name == "bf16":  # its instruction takes subnormals for zero
        expected[np.abs(wide) < 2.0**-126] &= -0x8000
    np.testing.assert_array_equal(back[number], expected[number])
    np.testing.assert_array_equal(np.isnan(torch.from_numpy(back).view(dtype).float().numpy()), ~number)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_narrowing_rounds_to_nearest_even(probe, name, dtype):
    """Around every half value: itself, the middle to the next, and one float32 to each side of the middle."""
    low = torch.arange(0, 0x7BFF if name == "f16" else 0x7F7F, dtype=torch.int16)
    a, b = low.view(dtype).double(), (low + 1).view(dtype).double()
    middle = ((a + b) / 2).float()
    x = torch.cat([middle, torch.nextafter(middle, a.float()), torch.nextafter(middle, b.float())])
    x = torch.cat([x, -x, torch.tensor([65519.9, 65520.0, 3.4e38, torch.inf, -torch.inf, 1e-45])])
    x = x[(x.abs() >= 2.0**-126) | (x == 0)].contiguous()
    out = np.zeros(x.numel(), np.int16)
    getattr(probe, f"f32_to_{name}")(pointer(x.numpy()), pointer(out), ctypes.c_long(out.size))
    np.testing.assert_array_equal(out, x.to(dtype).view(torch.int16).numpy())


def test_reductions_masks_and_partial_vectors(probe):
    lanes = probe.lanes()
    for n in range(lanes + 1):
        x = np.arange(1, lanes + 1, dtype=np.float32) * np.where(np.arange(lanes) % 2, -1, 1).astype(np.float32)
        x[n:] = np.nan  # must not be read into the result
        flags = (np.arange(lanes) % 3 == 1).astype(np.uint8) * 255
        out = np.zeros(4, np.float32)
        probe.reduce(pointer(x), pointer(flags), n, pointer(out))
        top = x[:n].max() if n else -np.inf
        expected = [x[:n].sum(), top, float(flags[:n].any()), float(np.flatnonzero(flags).sum())]
        np.testing.assert_array_equal(out, np.array(expected, np.float32))
