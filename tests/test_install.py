"""What a newcomer meets first: a missing compiler, another folder, an old torch, each told in one sentence."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")
make = pytest.mark.skipif(not (ROOT / "Makefile").exists() or not shutil.which("make"), reason="make is not installed")

# Stands in for g++: every file and folder that it is given must exist, and it writes what it is told to.
COMPILER = """#!/bin/sh
case " $* " in *" -fsyntax-only "*) exit 0;; esac
{first}
missing() {{ echo "error: no such path: $1" >&2; exit 1; }}
while [ $# -gt 0 ]; do
  case "$1" in
    -o) shift; : > "$1";;
    -MF) shift; printf 'x.o: %s\\n' "$0" | sed 's/ /\\\\ /g;s/:\\\\ /: /' > "$1";;
    -c) shift; [ -f "$1" ] || missing "$1";;
    -isystem) shift; [ -d "$1" ] || missing "$1";;
    -I*) [ -d "${{1#-I}}" ] || missing "$1";;
    -L*) [ -d "${{1#-L}}" ] || missing "$1";;
    -*) ;;
    *) [ -f "$1" ] || missing "$1";;
  esac
  shift
done
"""


def compiler(folder: Path, first: str = "") -> str:
    """A command for CXX; `first` is what it does when it compiles."""
    path = folder / "fake-compiler"
    path.write_text(COMPILER.format(first=first))
    path.chmod(0o755)
    return str(path)


def copy_of_the_checkout(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("build", ".*", "*.so", "*.egg-info", "tests", "__pycache__")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


IMPORT = """
import sys, warnings
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]  # would find _C elsewhere
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import mmkern, torch
    choice, = mmkern.explain(mmkern.softmax, torch.zeros(2, 3), 1)
    mmkern.softmax(torch.zeros(2, 3), 1)
warned, = [str(w.message) for w in caught if "mmkern" in str(w.message)]
assert choice.backend == "reference" and choice.refused["cpu"] in warned, (choice, warned)
print(warned)
"""


@checkout
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (None, "{0} is a checkout that was not compiled: run `make build` there; or, to use an installed mmkern, "),
        ("_C.cpython-399-riscv64-linux-gnu.so", "compiled for another Python or processor (_C.cpython-399-riscv64"),
        (f"_C{SUFFIX}", "the compiled part of mmkern in {0} could not be loaded ("),
    ],
)
def test_import_without_the_compiled_part_warns_once_and_explain_says_the_same(tmp_path, file, reason):
    """As Python does inside the clone after `pip install .`: the folder it runs in comes before what is installed."""
    shutil.copytree(ROOT / "mmkern", tmp_path / "mmkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    if file:
        (tmp_path / "mmkern" / file).write_text("no library")
    done = run(sys.executable, "-c", IMPORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mmkern runs slow reference formulas on the CPU." in done.stdout
    assert reason.format(tmp_path / "mmkern") in done.stdout
    assert "start Python in another folder" in done.stdout


@pytest.mark.parametrize(
    ("torch", "sentence"),
    [
        ("raise ModuleNotFoundError('no torch', name='torch')", "and torch is not installed here: pip install torch"),
        ("__version__ = '2.9.1+cpu'", "and this is 2.9.1+cpu: pip install -U torch"),
    ],
)
def test_import_without_a_torch_that_is_new_enough_is_one_sentence(tmp_path, torch, sentence):
    (tmp_path / "torch.py").write_text(torch)
    done = run(sys.executable, "-c", "import mmkern", cwd=tmp_path)
    assert done.stderr.strip().splitlines()[-1] == f"ImportError: mmkern needs torch >= 2.11, {sentence}"
    assert "During handling" not in done.stderr


@checkout
def test_paths_with_a_space_or_a_dollar_build(tmp_path):
    folder = copy_of_the_checkout(tmp_path / "a $dollar and a space")
    build, command = (sys.executable, "setup.py", "build_ext", "--inplace"), compiler(tmp_path)
    done = run(*build, cwd=folder, CXX=command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "mmkern" / f"_C{SUFFIX}").exists()
    again = run(*build, cwd=folder, CXX=command)
    assert "no work to do" in again.stdout


@checkout
@pytest.mark.parametrize(
    ("complaint", "sentence"),
    [
        ("x.cpp:3:1: error: 'spam' was not declared", "failed: x.cpp:3:1: error: 'spam' was not declared"),
        ("cannot write /tmp/x.s: No space left on device", "failed: cannot write /tmp/x.s: No space left on device"),
        ("fatal error: Killed signal terminated program cc1plus", "failed: fatal error: Killed signal"),
    ],
)
def test_a_failed_compilation_ends_with_what_the_compiler_said(tmp_path, complaint, sentence):
    folder = copy_of_the_checkout(tmp_path / "copy")
    command = compiler(tmp_path, f'echo "in x.cpp:\n{complaint}" >&2; exit 1')
    said = last_line(run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=folder, CXX=command))
    assert said.startswith(f"mmkern: compiling with `{command}` {sentence}")


@checkout
@pytest.mark.parametrize(
    ("complaint", "sentence"),
    [
        ("<stdin>:2:10: fatal error: Python.h: No such file or directory", "mmkern: no Python.h in "),
        ("error: unrecognized option '-std=c++17'", "cannot compile C++17: error: unrecognized option '-std=c++17'"),
    ],
)
def test_a_compiler_that_lacks_something_is_named_before_anything_is_downloaded(tmp_path, complaint, sentence):
    """pip asks for the metadata before it downloads torch; make runs csrc/toolchain.py before pip."""
    command = tmp_path / "cxx"
    command.write_text(f'#!/bin/sh\necho "{complaint}" >&2; exit 1\n')
    command.chmod(0o755)
    metadata = f"import setuptools.build_meta as b; b.prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    for script in ("-c", metadata), ("csrc/toolchain.py",):
        assert sentence in last_line(run(sys.executable, *script, cwd=ROOT, CXX=str(command)))


@checkout
def test_old_build_tools_are_one_sentence(tmp_path):
    (tmp_path / "setuptools-65.5.0.dist-info").mkdir()
    (tmp_path / "setuptools-65.5.0.dist-info/METADATA").write_text("Name: setuptools\nVersion: 65.5.0\n")
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert last_line(done) == (
        "mmkern: needs setuptools >= 77 to build, found 65.5.0: pip install 'setuptools>=77' 'pybind11>=2' 'ninja>=1'"
    )


@make
def test_make_checks_the_compiler_before_it_makes_anything(tmp_path):
    done = run("make", "build", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}", "CXX=/nonexistent/c++", cwd=ROOT)
    assert "mmkern: no C++ compiler `/nonexistent/c++`; install g++ >= 11" in done.stderr
    assert not (tmp_path / "venv").exists()


@make
def test_make_without_a_network_is_one_sentence(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    offline = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    base = getattr(sys, "_base_executable", sys.executable)
    done = run("make", "build", f"PYTHON={base}", cwd=tmp_path, **offline, PIP_CONFIG_FILE=os.devnull)
    assert "mmkern: pip could not install the build tools: is there a network?" in done.stderr
    assert "conflict" not in done.stderr
