"""The same cases under pytest-benchmark: `pytest benchmarks/ --benchmark-only -k "softmax and float32"`.

Each case is held against float64 before either side is timed. `mmkern bench` is the one to trust for ratios: it
interleaves both sides, which pytest-benchmark does not.
"""

from typing import Any

import pytest

from mmkern.benchmarks.measure import Case, check, screen
from mmkern.benchmarks.suite import select


@pytest.mark.parametrize("side", ["mmkern", "torch"])
@pytest.mark.parametrize("case", select(), ids=lambda case: case.id)
def test_speed(benchmark: Any, case: Case, side: str) -> None:
    problem = case.build(case.dtype, "cpu")
    found, ran = check(problem)
    assert found.ok, f"{found}; ran {ran}"
    benchmark.group = case.id
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes, "ran": [str(choice) for choice in ran]}
    if side == "mmkern":
        benchmark(problem.ours)
        return
    seconds = {name: s for name, s in screen(problem.baselines).items() if not isinstance(s, str)}
    best = next(b for b in problem.baselines if b.name == min(seconds, key=seconds.__getitem__))
    benchmark.extra_info["baseline"] = best.name
    with best.context():
        benchmark(best.call)
