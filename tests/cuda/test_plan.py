"""What the host decides about a launch: pure arithmetic, so sizes that no machine holds cost nothing."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated import levels, library

pytestmark = pytest.mark.skipif("g++" not in levels(), reason="needs g++")
MOST_BLOCKS = 2**31 - 1


def plan(rows: int, width: int) -> list[int]:
    found = (ctypes.c_int64 * 5)()
    library().mmkern_plan_rows(ctypes.c_int64(rows), ctypes.c_int64(width), found)
    return list(found)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 512, 1024, 1025, 2048, 4096, 4097, 16384, 16385, 2**40])
def test_a_row_fits_its_instance(width: int) -> None:
    threads, per, block, grid, shared = plan(1001, width)
    assert per == 0 or threads * per >= width
    assert (per == 0) == (width > 16384)
    assert 128 <= block <= 1024
    assert grid * (block // threads) >= 1001
    assert shared == (256 if threads > 32 else 0)


def test_the_grid_has_a_limit() -> None:
    assert plan(2**40, 40)[3] == MOST_BLOCKS
    assert plan(MOST_BLOCKS, 3000)[3] == MOST_BLOCKS
    assert plan(1, 40)[3] == 1


def collapse(sizes: tuple[int, ...], strides: tuple[int, ...], dim: int) -> list[int] | None:
    found, rank = (ctypes.c_int64 * 9)(), len(sizes)
    array = ctypes.c_int64 * rank
    library().mmkern_collapse.restype = ctypes.c_bool
    ok = library().mmkern_collapse(array(*sizes), array(*strides), rank, ctypes.c_int64(dim), found)
    return list(found) if ok else None


def test_dims_merge_where_one_stride_tells_both() -> None:
    assert collapse((2, 3, 4, 5), (60, 20, 5, 1), 3) == [24, 1, 1, 24, 5, 0, 0, 0, 5]
    assert collapse((2, 3, 4, 5), (60, 20, 5, 1), 1) == [40, 1, 2, 20, 3, 0, 0, 60, 1]
    assert collapse((1, 7), (7, 1), 1) == [1, 1, 1, 1, 7, 0, 0, 0, 0]
    assert collapse((3, 2**33), (2**34, 1), 1) == [3, 1, 1, 3, 2**33, 0, 0, 0, 2**34]


def test_every_row_is_found_once() -> None:
    x = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6).permute(3, 0, 4, 2, 1)
    rows, n1, n2, inner, width, *steps = collapse(tuple(x.shape), x.stride(), 2)
    starts = []
    for row in range(rows):
        i, outer = row % inner, row // inner
        place = (outer // n2 // n1, outer // n2 % n1, outer % n2, i)
        starts.append(sum(a * b for a, b in zip(place, steps, strict=True)))
    assert starts == x.select(2, 0).flatten().tolist()
    assert width == 6


def test_five_strides_do_not_collapse() -> None:
    x = torch.empty(2, 3, 2, 3, 2, 9).permute(4, 2, 0, 3, 1, 5)
    assert collapse(tuple(x.shape), x.stride(), 5) is None
