"""Without a GPU, Triton's kernels are tested in its interpreter, which has to be on before they are imported.

`pytest --ptx 90 tests/test_triton_softmax.py` runs instead what Triton compiles for that capability, on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


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
