"""Settings that have to be made before a test imports anything: Triton's interpreter, and threads of each process.

`pytest --ptx 90 tests/test_softmax.py -k triton` runs, in the interpreter's place, what Triton compiles for sm_90.

A kernel takes Triton's interpreter, or the emulator of CUDA C++, some hundred times as long as a CPU. So of the cases
of one test that differ in dtype alone these run one, another from row to row of the table, and none of a row marked
`large`. `pytest -m interpreter` runs the rest; on a GPU nothing is left out.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import pytest
import torch

ROOT = Path(__file__).parents[1]
T = TypeVar("T")

# pytest-xdist starts several processes: threads of all of them together are as many as the cores.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))

# What inductor compiled holds the strides that mmkern's fakes told then: a cache for each state of the sources.
_state = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "mmkern").rglob("*.py")))).hexdigest()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "build/inductor" / _state[:12]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx", type=int, help="run Triton's kernels as compiled for this compute capability")


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available() and config.getoption("--ptx") is None:
        os.environ["TRITON_INTERPRET"] = "1"


def turn(row: int) -> int:
    """Which dtype a row takes: the sum of its ternary digits, so that it changes along every axis of a table."""
    return row % 3 + turn(row // 3) if row else 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests: dict[object, dict[object, list[pytest.Item]]] = {}  # -> row of its table -> the cases of each dtype
    for item in items:
        spec = getattr(item, "callspec", None)
        if spec is None or not getattr(spec.params.get("backend"), "slow", False):
            continue
        if item.get_closest_marker("large"):
            item.add_marker("interpreter")
        elif "dtype" in spec.params:
            given = {name: repr(value) for name, value in spec.params.items() if name != "dtype"}
            rows = tests.setdefault((item.path, item.originalname, given.pop("backend")), {})
            rows.setdefault(tuple(given.items()), []).append(item)
    for rows in tests.values():
        for i, cases in enumerate(rows.values()):
            for left_out in set(cases) - {cases[turn(i) % len(cases)]}:
                left_out.add_marker("interpreter")


class Once:
    """once(compute): what a case needs on every backend alike, computed for the first of them and kept for the next."""

    case: tuple[object, ...] | None = None
    kept: list[object]

    def __init__(self, case: tuple[object, ...]) -> None:
        if Once.case != case:
            Once.case, Once.kept = case, []
        self._next = 0

    def __call__(self, compute: Callable[[], T]) -> T:
        if self._next == len(Once.kept):
            Once.kept.append(compute())
        self._next += 1
        return cast("T", Once.kept[self._next - 1])


@pytest.fixture
def once(request: pytest.FixtureRequest) -> Once:
    rest = {name: str(value) for name, value in request.node.callspec.params.items() if name != "backend"}
    return Once((request.path, request.function.__name__, *sorted(rest.items())))


@pytest.fixture(autouse=True)
def _triton_as_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    capability = request.config.getoption("--ptx")
    if capability is None:
        yield
        return
    from ptx_runner import running_triton

    with running_triton(capability):
        yield
