"""What Triton's compiler made of mmkern's kernels, run on the CPU by the PTX runner and held to the op tests' own rule.

The interpreter shows that the Python of a kernel is right; this shows the compiled program, for GPUs that are not here.
It calibrates the runner too: code that is right on hardware every day must give right numbers, without a race. All op
tests at one capability: `pytest --ptx 90 tests/test_softmax.py -k triton`, and so on; here, a few of each op.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the runner needs g++")
TESTS = Path(__file__).parents[1]
# one of each kernel: dtypes, a dim that is not the last, masks, dropout, gradients, ragged and grouped attention
FEW = [
    "test_softmax.py::test_values[(7, 33)-0-torch.float16-softmax-triton]",
    "test_softmax.py::test_values[(4, 9, 2, 64)-1-torch.bfloat16-log_softmax-triton]",
    "test_softmax.py::test_masked_shapes[(2, 3, 9, 5)-1-torch.float32-0.3-triton]",
    "test_loss.py::test_values[(7, 33)-index-torch.float32-mean-triton]",
    "test_position.py::test_add_positional_encoding[wide-torch.float32-0.4-triton]",
    "test_position.py::test_embed_tokens[(2, 65)-torch.float16-torch.int64-None-0.4-triton]",
    "test_rotary.py::test_values[half of the dim-torch.float32-half-triton]",
    "test_attention.py::test_alone[float mask-torch.float16-triton]",
    "test_attention.py::test_shapes[(1, 2, 1, 20, 130, 72, 72)-torch.bfloat16-causal-triton]",
]
# Where another target's compiler could differ: matrix instructions, packed floats.
FEWER = [FEW[2], FEW[-1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the op tests run the kernels themselves")
@pytest.mark.parametrize(("capability", "tests"), [(80, FEWER), (90, FEW), (120, FEWER)], ids=["80", "90", "120"])
def test_compiled_kernels_are_right(capability: int, tests: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = f"-m pytest -q -p no:cacheprovider -p no:xdist --ptx {capability}".split()
    done = subprocess.run(
        [sys.executable, *options, *(str(TESTS / test) for test in tests)],
        check=False, cwd=TESTS.parent, capture_output=True, text=True, timeout=900, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert f"{len(tests)} passed" in done.stdout, done.stdout[-2000:]
