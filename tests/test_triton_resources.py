"""What can be known of the Triton kernels' binaries without a GPU: compiled in a process that does not interpret."""

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")


def fresh(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("target", "instruction", "calls"),
    [
        (80, "HMMA", ["forward bf16 128", "backward bf16 128 causal"]),
        (90, "HGMMA", ["forward bf16 128", "backward bf16 64 dropout"]),
        (100, "UTCHMMA", ["forward bf16 64 bias"]),
    ],
)
def test_attention_fits_and_runs_on_the_tensor_cores(target, instruction, calls):
    found = fresh(f"""
from mmkern.kernels.resources import SHARED_LIMIT, measure
for usage in measure({target}, {calls}):
    assert usage.spills == 0, usage
    assert usage.shared <= SHARED_LIMIT[{target}] * 1024, usage
    print(usage.kernel, *usage.matrix)
""")
    kernels = dict.fromkeys(line.split()[0] for line in found.splitlines())
    assert "attention_fwd" in kernels
    for line in found.splitlines():
        name, *matrix = line.split()
        if name in ("attention_fwd", "queries", "keys"):
            assert instruction in matrix, line


@pytest.mark.parametrize(("target", "dtype"), [(80, "bf16"), (100, "f32")])
def test_row_kernels_stay_in_registers(target, dtype):
    calls = [f"{name} {dtype}" for name in ("softmax 1024", "softmax 131072", "position", "rotary")]
    found = fresh(f"""
from mmkern.kernels.resources import measure
for usage in measure({target}, {calls}):
    assert usage.spills == 0, usage
    print(usage.kernel)
""")
    kernels = {"softmax", "softmax_bwd", "masked", "add", "table_gradient", "embedding_gradient", "rotary"}
    assert kernels <= set(found.split())


def test_lengths_do_not_compile_again():
    found = fresh("""
import torch
from mmkern.kernels.launch import compiling
from mmkern.kernels.resources import _backward, _forward
with compiling(90) as found:
    for n in (*range(1000, 1012), 1024, 2048, 4095):
        _forward(torch.bfloat16, 64, q_len=n, k_len=n + 3)
    print(len(found.kernels))
with compiling(90) as found:
    for n in (33, 100, 512, 1024, 1025):
        _backward(torch.bfloat16, 64, q_len=n, k_len=2 * n)
    print(len(found.kernels))
""")
    forward, backward = map(int, found.split())
    assert forward == 1
    assert backward <= 5  # rows, sums of far rows for both products, queries, keys


def test_the_command_prints_a_table():
    found = fresh("import sys; sys.argv = ['r', 'decode bf16', '--target', '90']\n"
                  "from mmkern.kernels.resources import main; main()")  # fmt: skip
    header, *rows = found.splitlines()
    assert header.split()[:3] == ["call", "kernel", "target"]
    assert [row.split()[4] for row in rows] == ["attention_fwd", "merge"]
    assert all("sm_90" in row for row in rows)
