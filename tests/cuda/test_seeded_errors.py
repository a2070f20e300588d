"""Errors put into the kernels on purpose: each must be found, by value or by the emulator's own words.

They are built into the PTX that nvcc writes; host code and reference stay right. Those marked asm are in inline
assembly, which a build for the host never sees.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from emulated import emulated, levels
from torch import Tensor

from mmkern.testing import accuracy, randn

pytestmark = pytest.mark.skipif("sm_80" not in levels(), reason="needs g++ and nvcc")
OPS = torch.ops.mmkern_cuda
VALUE = "wrong"
# number -> what is wrong; a width that shows it; what is reported; whether backward, and one block for all rows
ERRORS = {
    1: ("asm: two registers of a load swapped", 256, VALUE, "forward"),
    2: ("asm: two registers of a store swapped", 256, VALUE, "forward"),
    3: ("asm: halves of a pair swapped", 256, VALUE, "forward"),
    4: ("a 16-byte load past the end of a row", 1011, "out of bounds", "forward"),
    5: ("a store past the end of a row", 33, "wrote, with nothing between|out of bounds", "forward"),
    6: ("a reduction over half a warp", 256, VALUE, "forward"),
    7: ("warps share a place", 3000, "written by thread .* with no barrier between", "forward"),
    8: ("no barrier before the sums are read", 3000, "with no barrier between", "forward"),
    9: ("one scratch for two reductions", 3000, "read by thread .* with no barrier between", "forward"),
    10: ("no rescaling to a new maximum", 25000, VALUE, "forward"),
    11: ("one scratch for the sums of two rows", 3000, "read by thread .* with no barrier between", "backward"),
    13: ("a read of scratch that nobody wrote", 3000, "out of bounds", "forward"),
    14: ("a barrier that one warp skips", 3000, "deadlock|with no barrier between", "forward"),
    15: ("zero past the end of a row", 33, VALUE, "forward"),
    16: ("a NaN is lost where a row streams", 25000, VALUE, "forward"),
    17: ("asm: log2 where the exponential is meant", 256, VALUE, "forward"),
    18: ("asm: a store of 4 bytes where 16 are meant", 256, VALUE, "forward"),
}


def run(width: int, way: str, seed: int) -> str:
    """What the emulator says, or whether the numbers are wrong, or "" if nothing is."""
    x = randn(5, width, dtype=torch.bfloat16, scale=3.0) - 20.0
    x[1, width // 2] = 30.0
    if width > 16384:  # a thread that sees a NaN and else minus infinity
        for start in range(0, width, 8192):
            x[2, start : start + 8] = -math.inf
        x[2, 7] = math.nan
    if width == 1011:  # with one row, which is aligned whatever its length
        x = x[:1]
    grad = randn(*x.shape, dtype=torch.bfloat16, seed=1)
    exact: Tensor = torch.softmax(x.double(), 1)
    y = exact.to(x.dtype)
    baseline = torch.softmax(x, 1)
    if way == "backward":
        exact = torch.ops.aten._softmax_backward_data(grad.double(), y.double(), 1, torch.float64)
        baseline = torch.ops.aten._softmax_backward_data(grad, y, 1, x.dtype)
    with emulated("sm_80", seed=seed) as lib:
        lib.mmkern_most_blocks(1)
        try:
            out = OPS.softmax_fwd(x, 1) if way == "forward" else OPS.softmax_bwd(grad, y, 1)
        except RuntimeError as error:
            return str(error)
        finally:
            lib.mmkern_most_blocks(0)
    kind = "forward" if way == "forward" else "gradient"
    return "" if accuracy(out, exact, baseline, kind).ok else VALUE


@pytest.mark.parametrize("seed", ERRORS, ids=lambda seed: ERRORS[seed][0])
def test_an_error_is_found(seed: int) -> None:
    _, width, message, way = ERRORS[seed]
    found = run(width, way, seed)
    assert found, "nothing was found"
    assert re.search(message, found), found


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("width", sorted({width for _, width, *_ in ERRORS.values()}))
def test_without_an_error_nothing_is_found(width: int, way: str) -> None:
    if width <= 16384 or way == "forward":
        assert run(width, way, 0) == ""
