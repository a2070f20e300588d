"""Settings that have to be made before a test imports anything: Triton's interpreter, and threads of each process.

`pytest --ptx 90 tests/test_triton_softmax.py` runs, in the interpreter's place, what Triton compiles for a capability.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

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


@pytest.fixture(autouse=True)
def _triton_as_compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    capability = request.config.getoption("--ptx")
    if capability is None:
        yield
        return
    from ptx_runner import running_triton

    with running_triton(capability):
        yield
