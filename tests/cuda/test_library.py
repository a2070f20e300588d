"""mmkern._C_cuda as it is built, beside a torch without CUDA: it loads, its kernels are registered under the schemas of
mmkern's ops, and it asks of other libraries only what it may."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkern

ROOT = Path(__file__).parents[2]
LIBRARY = next(iter(sorted((ROOT / "mmkern").glob("_C_cuda*.so"))), None)
BUILD = runpy.run_path(str(ROOT / "csrc/cuda/build.py"))
built = pytest.mark.skipif(LIBRARY is None, reason="mmkern._C_cuda is not built here")
# The C shim that libtorch keeps stable, and the C and C++ libraries; the CUDA runtime is linked in.
ALLOWED = re.compile(
    r"(aoti_torch_|torch_)\w+|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ZN?K?St\w+|__gmon_start__|_ITM_\w+"
)
WEAK = {"aoti_torch_get_current_cuda_stream"}  # in libtorch_cuda alone


def fresh(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@built
def test_every_op_with_a_cuda_kernel_has_it_registered() -> None:
    found = fresh(f"""
import torch, mmkern
names = [n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("mmkern_cuda::")]
torch.ops.load_library({str(LIBRARY)!r})
for name in sorted(names):
    has = torch._C._dispatch_has_kernel_for_dispatch_key("mmkern_cuda::" + name, "CUDA")
    ours = getattr(torch.ops.mmkern_cuda, name).default._schema
    assert str(ours).split("::")[1] == str(getattr(torch.ops.mmkern, name).default._schema).split("::")[1]
    print(name, has)
""")
    registered = dict(line.split() for line in found.splitlines())
    assert {"softmax_fwd", "softmax_bwd", "log_softmax_fwd", "log_softmax_bwd"} <= set(registered)
    assert set(registered.values()) == {"True"}


@built
@pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")
def test_undefined_symbols_are_on_the_list() -> None:
    table = subprocess.run(["nm", "-D", "--undefined-only", str(LIBRARY)], check=True, capture_output=True, text=True)
    kinds = [line.split() for line in table.stdout.splitlines()]
    assert [name for _, name in kinds if not ALLOWED.fullmatch(name)] == []
    assert {name for kind, name in kinds if kind == "w" and "torch" in name} == WEAK
    assert not any("cuda" in name and kind == "U" and name != "aoti_torch_device_type_cuda" for kind, name in kinds)


@built
def test_nothing_spills() -> None:
    """Registers and stack of every kernel and architecture in the binary, as `mmkern.kernels.resources` prints them."""
    pytest.importorskip("triton")
    found = fresh("""
from mmkern.kernels.resources import SHARED_LIMIT, measure_library
for target in SHARED_LIMIT:
    for usage in measure_library(target):
        assert usage.spills == 0 and usage.shared <= SHARED_LIMIT[target] * 1024, usage
        assert usage.registers <= 65536 // 1024 or "1024" not in usage.kernel, usage
        print(usage.kernel)
""")
    assert {"softmax<float, 32, 8>", "softmax_bwd<bf16, 1024, 16>", "softmax_wide<f16>"} <= set(found.splitlines())


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_explain_says_why_not() -> None:
    choice = mmkern.explain(mmkern.softmax, torch.zeros(3), dim=0)[0]
    assert choice.refused["cuda"] == "tensors are on cpu"
    with mmkern.backend("cuda", strict=True), pytest.raises(RuntimeError, match="softmax_fwd: backend 'cuda' refused"):
        mmkern.softmax(torch.zeros(3), dim=0)
    assert mmkern.ops.dispatch.CUDA.missing() == "this torch is built without CUDA"


def test_forcing_cuda_runs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a CPU's tensors in the place of its own: forced, it runs; by default Triton goes first."""
    from emulated import emulated, levels

    if "g++" not in levels():
        pytest.skip("the emulator needs g++")
    dispatch = mmkern.ops.dispatch
    monkeypatch.setattr(dispatch.CUDA, "missing", lambda: None)
    monkeypatch.setattr(dispatch.CUDA, "device", "cpu")
    monkeypatch.setattr(dispatch.CPU, "device", "cuda")
    x = torch.randn(4, 40, requires_grad=True)
    with emulated("g++") as lib:
        with mmkern.backend("cuda", strict=True):
            choices = mmkern.explain(lambda: mmkern.softmax(x, 1).square().sum().backward())
        assert [c.backend for c in choices] == ["cuda", "cuda"]
        assert lib.mmkern_launches() == 2
    want = torch.autograd.grad(torch.softmax(x, 1).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, want)
    default = mmkern.explain(mmkern.softmax, torch.zeros(3), dim=0)[0]
    assert default.refused["cuda"].startswith("not yet measured on this GPU")


@pytest.mark.parametrize(
    ("listed", "options"),
    [
        ("8.0", "-gencode arch=compute_80,code=sm_80"),
        ("9.0a;12.0+PTX", "-gencode arch=compute_90a,code=sm_90a -gencode arch=compute_120,code=sm_120 "
                          "-gencode arch=compute_120,code=compute_120"),
    ],
)  # fmt: skip
def test_architectures(listed: str, options: str) -> None:
    assert BUILD["codes"](listed) == options


def test_architectures_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    assert BUILD["architectures"](tmp_path) == "8.0"
    (tmp_path / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    assert BUILD["architectures"](tmp_path) == "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert BUILD["architectures"](tmp_path) == "9.0a"
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST: expected numbers such as 8\.0"):
        BUILD["codes"]("Hopper")


def test_without_a_compiler_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert BUILD["find_nvcc"]() == (None, f"nvcc was not found in {tmp_path}/bin")
    (tmp_path / "bin").mkdir()
    old = tmp_path / "bin/nvcc"
    old.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    old.chmod(0o755)
    assert BUILD["find_nvcc"]() == (None, f"{old} is of CUDA 12.4, older than 12.8")
