"""The native build: no code of a newer processor where an older one runs it, clear errors, nothing compiled twice."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import timeit
from pathlib import Path

import pytest
import torch

import mmkern
from mmkern import _C

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build" / sysconfig.get_platform() / "mmkern._C"
built = pytest.mark.skipif(not OBJECTS.exists(), reason=f"no objects in {OBJECTS}: not built in this checkout")
linux = pytest.mark.skipif(not shutil.which("nm"), reason="nm is not installed")


def leaked(path: Path, isa: str) -> list[str]:
    """Mangled names that other objects could link to or be merged with, outside mmkern::<isa>."""
    table = subprocess.run(
        ["nm", "--defined-only", "--extern-only", str(path)], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in table.stdout.splitlines()]
    return [name for name in names if f"6mmkern{len(isa)}{isa}" not in name]


@built
@linux
@pytest.mark.parametrize("isa", _C.build()["isas"])
def test_code_of_an_instruction_set_stays_in_its_namespace(isa):
    sources = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*.isa.cpp")]
    objects = [OBJECTS / f"{source}.{isa}.o" for source in sources]
    assert {"cpu/attention/forward.isa.cpp", "cpu/softmax/forward.isa.cpp"} <= set(map(str, sources))
    assert {path.name: found for path in objects if (found := leaked(path, isa))} == {}


@linux
def test_the_leak_check_finds_a_leak(tmp_path):
    source = tmp_path / "leak.cpp"
    source.write_text("""
        template <class T> T twice(T x) { return x + x; }
        namespace mmkern::avx2 { float kernel(float x) { return twice(x); } }""")
    compiled = subprocess.run(["g++", "-c", "-O0", str(source), "-o", str(tmp_path / "leak.o")], check=False)
    if compiled.returncode:
        pytest.skip("g++ is not installed")
    assert leaked(tmp_path / "leak.o", "avx2") == ["_Z5twiceIfET_S0_"]


@linux
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_the_library_needs_no_newer_glibc_than_torch():
    """2.28, whatever the machine has that it was compiled on: csrc/cpu/glibc.cpp."""
    command = ["nm", "-D", "--undefined-only", "--with-symbol-versions", _C.__file__]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"@GLIBC_([\d.]+)", table)}
    assert (2, 2, 5) <= max(versions) <= (2, 28), table


def build(**env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


@built
def test_nothing_changed_compiles_nothing():
    done = build()
    assert done.returncode == 0, done.stderr
    assert "no work to do" in done.stdout


@built
def test_missing_compiler_is_one_sentence():
    done = build(CXX="/nonexistent/c++")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "mmkern: no C++ compiler `/nonexistent/c++`; install g++ >= 11, or name a C++17 compiler in CXX"
    )
    assert "Traceback" not in done.stderr


@built
def test_old_torch_is_one_sentence(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = build(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"mmkern: needs torch >= 2.11 to build, found 2.9.1+cpu in {tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not (ROOT / "Makefile").exists() or not shutil.which("make"), reason="make is not installed")
def test_old_python_is_one_sentence(tmp_path):
    old = tmp_path / "python3.9"  # answers for itself as Python 3.9 would, otherwise as this one
    old.write_text(f"""#!/bin/sh
exec {sys.executable} -c "import runpy, sys; sys.version_info = (3, 9, 0); sys.version = '3.9.0'
runpy.run_path(sys.argv[1], run_name='__main__')" "$1"
""")
    old.chmod(0o755)
    command = ["make", "build", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "mmkern: needs Python >= 3.11, got 3.9.0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "venv").exists()


def test_source_distribution_can_be_built_from(tmp_path):
    copy = shutil.copytree(
        ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".venv", "build", ".git", "*.so", ".*_cache")
    )
    script = "import setuptools.build_meta as b; b.build_sdist('.')"
    subprocess.run([sys.executable, "-c", script], cwd=copy, check=True, capture_output=True, timeout=120)
    (archive,) = copy.glob("mmkern-*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = [p for folder in ("csrc", "kernels", "benchmarks", "mmkern") for p in (ROOT / folder).rglob("*")]
    wanted = {str(p.relative_to(ROOT)) for p in tracked if p.suffix in {".py", ".pyi", ".cpp", ".h", ".cu", ".typed"}}
    assert wanted - names == set()
    assert {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "tests/test_build.py"} <= names


def test_facts():
    facts = _C.build()
    assert set(_C.isas()) <= set(facts["isas"])
    assert _C.isa() in _C.isas()
    assert facts["torch_target"] == "2.11"
    assert facts["cuda_architectures"] == []
    assert re.match(r"(GCC|.*[Cc]lang).* \d+\.\d+", facts["compiler"])
    assert _C.processor()


def test_ceilings_are_not_below_what_torch_does():
    """A ceiling that a matrix product or a copy beats is none; noise gets five tries, best against best."""
    a, big = torch.randn(768, 768), torch.ones(1 << 24)
    out, to = torch.empty_like(a), torch.empty_like(big)
    fma = copy = read = product = copied = 0.0
    for _ in range(5):
        fma, copy, read = max(fma, _C.fma_gflops(0.1)), max(copy, _C.copy_gbs(1 << 26, 0.2)), _C.read_gbs(1 << 26, 0.1)
        product = max(product, 2e-9 * 768**3 / min(timeit.repeat(lambda: torch.mm(a, a, out=out), number=1, repeat=9)))
        copied = max(copied, 8e-9 * big.numel() / min(timeit.repeat(lambda: to.copy_(big), number=1, repeat=5)))
        if 0.95 * product < fma < 10 * product and 0.8 * copied < copy < 10 * copied and read > 0.4 * copied:
            return
    pytest.fail(f"{fma=} against matmul {product}; {copy=} and {read=} against copy_ {copied}")


def test_bf16_ceiling_is_that_of_its_instruction():
    for isa in _C.isas():
        with mmkern.backend("cpu", isa=isa):
            rates = [(_C.fma_gflops(0.05), _C.bf16_dot_gflops(0.05)) for _ in range(5)]
        fma, bf16 = max(f for f, _ in rates), [b for _, b in rates]
        assert bf16 == [None] * 5 if "bf16" not in isa else 1.5 < max(b or 0 for b in bf16) / fma < 4.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _C.fma_gflops(0.0), "seconds"),
        (lambda: _C.bf16_dot_gflops(float("nan")), "seconds"),
        (lambda: _C.copy_gbs(16, 0.1), "bytes"),
        (lambda: _C.read_gbs(-1, 0.1), "bytes"),
        (lambda: _C.set_isa("mmx"), "not 'mmx'"),
    ],
)
def test_facts_name_a_bad_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
