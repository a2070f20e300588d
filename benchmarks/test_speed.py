"""The same cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only -k "softmax and float32"`.

Each case is held against float64 before either side is timed. `mmkern bench` is the one to trust for ratios: it
interleaves both sides, which pytest-benchmark does not.
"""

from typing import Any

import pytest

from mmkern.benchmarks.measure import check, screen
from mmkern.benchmarks.records import Case
from mmkern.benchmarks.suite import select


@pytest.mark.parametrize("side", ["mmkern", "torch"])
@pytest.mark.parametrize("case", select(), ids=lambda case: case.id)
def test_speed(benchmark: Any, case: Case, side: str) -> None:
    problem = case.build(case.dtype, "cpu")
    found = check(problem)
    assert found.accuracy.ok, f"{found.accuracy}; ran {found.ran}"
    benchmark.group = case.id
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes, "ran": [str(choice) for choice in found.ran]}
    if side == "mmkern":
        benchmark(problem.ours)
        return
    seconds = {name: s for name, s in screen(problem).items() if not isinstance(s, str)}
    best = next(b for b in problem.baselines if b.name == min(seconds, key=seconds.__getitem__))
    benchmark.extra_info["baseline"] = best.name
    with best.context():
        benchmark(best.call)
