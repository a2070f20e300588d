"""The CUDA softmax kernels, forward and backward, on the emulator: as g++ compiles them and from the PTX of nvcc.

torch.ops.mmkern_cuda is the library's own host code; against float64 by the rule of mmkern.testing.
"""

from __future__ import annotations

import math

import pytest
import torch
from emulated import emulated, levels
from torch import Tensor

from mmkern.testing import LAYOUTS, assert_accurate, poisoned, randn

pytestmark = pytest.mark.skipif(not levels(), reason="needs g++, or a GPU and mmkern._C_cuda")
OPS = torch.ops.mmkern_cuda
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One of each instance of the launch tables, whole and ragged, and where a dim is not the last.
SHAPES = [
    ((7,), 0), ((5, 1), 1), ((3, 256), 1), ((6, 33), 1), ((2, 3, 1000), 2), ((2, 1024), 1), ((3, 513), 1),
    ((2, 4096), 1), ((2, 2049), 1), ((1, 8203), 1), ((2, 16392), 1), ((1, 25001), 1), ((3, 17, 5), 1),
    ((2, 3, 4, 5, 6), 2), ((0, 4), 1), ((4, 0), 1),
]  # fmt: skip


def formula(x: Tensor, dim: int, log: bool) -> Tensor:
    return torch.log_softmax(x, dim) if log else torch.softmax(x, dim)


def moved(x: Tensor) -> Tensor:
    """To the device under test, its strides with it."""
    if DEVICE == "cpu" or not x.numel():
        return x.to(DEVICE)
    extent = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    storage = x.as_strided((extent,), (1,), x.storage_offset()).to(DEVICE)
    return storage.as_strided(x.shape, x.stride())


def check(x: Tensor, dim: int, log: bool, grad: Tensor | None = None) -> None:
    """Forward, and given a gradient of the output, backward from the exact output rounded to x's dtype."""
    exact = formula(x.double(), dim, log)
    with poisoned():
        found = (OPS.log_softmax_fwd if log else OPS.softmax_fwd)(moved(x), dim).cpu()
    assert found.dtype == x.dtype
    assert found.is_contiguous()
    assert_accurate(found, exact, formula(x, dim, log))
    if grad is None:
        return
    y = formula(x.float(), dim, log).to(x.dtype)
    kernel = torch.ops.aten._log_softmax_backward_data if log else torch.ops.aten._softmax_backward_data
    with poisoned():
        found = (OPS.log_softmax_bwd if log else OPS.softmax_bwd)(moved(grad), moved(y), dim).cpu()
    exact = kernel(grad.double(), y.double(), dim, torch.float64)
    assert_accurate(found, exact, kernel(grad, y, dim, x.dtype), "gradient")


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_values(shape: tuple[int, ...], dim: int, level: str) -> None:
    with emulated(level) as lib:
        for i, dtype in enumerate(DTYPES):
            for log in (False, True):
                check(randn(*shape, dtype=dtype, seed=i, scale=3.0), dim, log, randn(*shape, dtype=dtype, seed=5))
        if lib is None:
            return
        assert lib.mmkern_launches() == (12 if math.prod(shape) else 0)
        assert lib.mmkern_shared_conflicts() == 0


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, level: str) -> None:
    with emulated(level):
        for dim in (0, 1, 2):
            x, grad = (randn(4, 3, 40, dtype=torch.float16, layout=layout, seed=s) for s in (1, 2))
            check(x, dim, dim == 1, grad)


@pytest.mark.parametrize("level", levels())
def test_six_dims_that_no_four_strides_tell(level: str) -> None:
    x = randn(2, 3, 2, 3, 2, 9).permute(4, 2, 0, 3, 1, 5)
    with emulated(level):
        check(x, 5, False, randn(2, 2, 2, 3, 3, 9))


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("width", [7, 40, 700, 5000, 20000])
def test_nan_infinity_and_large_numbers(width: int, level: str) -> None:
    x = randn(6, width, scale=20.0)
    x[0, 3], x[1, 2] = math.nan, math.inf
    x[2, :] = -math.inf
    x[3, 1:] = -math.inf
    x[4] = x[4].sign() * torch.finfo(torch.float32).max / 4
    x[5] = torch.finfo(torch.float32).min
    with emulated(level):
        for log in (False, True):
            check(x, 1, log)


@pytest.mark.parametrize("level", levels())
def test_every_order_of_threads_gives_the_same_bits(level: str) -> None:
    """So nothing depends on it; a race would be reported. More rows than blocks step over the grid."""
    for width in (40, 700, 3000, 20000):
        x, grad, results = moved(randn(9, width)), moved(randn(9, width, seed=1)), []
        for order in (0, 1, 2):
            with emulated(level, order):
                y = OPS.softmax_fwd(x, 1)
                results.append((y, OPS.softmax_bwd(grad, y, 1)))
        for y, g in results[1:]:
            assert torch.equal(y, results[0][0])
            assert torch.equal(g, results[0][1])


def test_more_rows_than_blocks() -> None:
    """The kernels step over the grid: with one block for all rows, the same result, and no race between rows."""
    for level in levels():
        for width in (40, 3000, 20000):
            x, grad = randn(5, width), randn(5, width, seed=1)
            with emulated(level) as lib:
                if lib is None:
                    continue
                lib.mmkern_most_blocks(1)
                try:
                    check(x, 1, False, grad)
                finally:
                    lib.mmkern_most_blocks(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with emulated(levels()[0]), pytest.raises(RuntimeError, match="input: the CUDA kernels take float32"):
        OPS.softmax_fwd(torch.ones(2, 3, dtype=dtype, device=DEVICE), 1)


@pytest.mark.parametrize("level", levels())
def test_in_place_overlapping_and_strided_outputs(level: str) -> None:
    base = randn(3, 45)
    with emulated(level):
        for width in (40, 3000, 20000):
            x = moved(randn(4, width))
            want = torch.softmax(x.double(), 1)
            OPS.softmax_out(x, 1, x)
            assert_accurate(x.cpu(), want.cpu())
        for out_of in (lambda t: t[:, 1:41], lambda t: t[:, 3:43], lambda t: t.t()[:40, :].t()):
            t = moved(base.clone())
            x, out = t[:, :40], out_of(t)
            want = torch.log_softmax(x.double(), 1).cpu()
            OPS.log_softmax_out(x, 1, out)
            assert_accurate(out.cpu(), want)
        out = torch.full((40, 3), float("nan"), device=DEVICE).t()
        OPS.softmax_out(moved(base[:, :40]), 1, out)
        assert_accurate(out.cpu(), torch.softmax(base[:, :40].double(), 1))
