"""How mmkern is compiled, and what that needs, asked before anything is fetched; each lack is one sentence.

setup.py imports this. `make` runs it first, with an interpreter that may be any Python 3 and have no packages.
"""

import importlib.util
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

BUILD_TOOLS = {"setuptools": 77, "pybind11": 2, "ninja": 1}  # name -> oldest major version
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS = {"baseline": "-march=x86-64-v2", "avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
elif platform.machine() in ("aarch64", "arm64"):
    ISAS = {"baseline": "", "neon_bf16": "-march=armv8.2-a+bf16"}
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra "
FLAGS += "-Wno-maybe-uninitialized -Wno-uninitialized "  # GCC 12 warns of its own AVX-512 headers
FLAGS += "-DTORCH_TARGET_VERSION=0x020b000000000000 "  # the stable ABI of torch 2.11
RULES = """
rule cxx
 command = {cxx} {flags} $extra -MMD -MF $out.d -c $in -o $out
 deps = gcc
 depfile = $out.d
 description = compile $out
rule link
 command = {cxx} -shared $in {torch} -ltorch_cpu -lc10 -o $out
 description = link $out
"""
PROBE = """
#include <Python.h>
#include <optional>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 11
#error "g++ is older than 11"
#endif
"""


def check_python() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("mmkern: needs Python >= 3.11, got " + sys.version.split()[0])


def check_build_tools() -> None:
    """A build without isolation uses what the environment has: setuptools 65, of Python 3.11's venv, is too old."""
    for name, oldest in BUILD_TOOLS.items():
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            have = "none"
        if have == "none" or int(have.split(".")[0]) < oldest:
            wanted = " ".join(f"'{tool}>={version}'" for tool, version in BUILD_TOOLS.items())
            sys.exit(f"mmkern: needs {name} >= {oldest} to build, found {have}: pip install {wanted}")


def first_error(text: str) -> str:
    """What a compiler complained of first."""
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if re.search(r"\berror\b|cannot|No space left|Killed", line)]
    return (found or [line for line in lines if line] or ["it said nothing"])[0]


def find_compiler() -> str:
    """CXX, or g++, once it has compiled C++17 with the standard library and Python's headers."""
    cxx, include = os.environ.get("CXX") or "g++", sysconfig.get_path("include")
    command = [*shlex.split(cxx), "-std=c++17", "-I", include, "-x", "c++", "-fsyntax-only", "-"]
    try:
        tried = subprocess.run(command, input=PROBE, check=False, capture_output=True, text=True)
    except OSError:
        sys.exit(f"mmkern: no C++ compiler `{cxx}`; install g++ >= 11, or name a C++17 compiler in CXX")
    if "Python.h" in tried.stderr and tried.returncode:
        sys.exit(f"mmkern: no Python.h in {include}; install Python's headers (python3-dev, or python3-devel)")
    if tried.returncode:
        said = first_error(tried.stderr)
        sys.exit(f"mmkern: `{cxx}` cannot compile C++17: {said}; install g++ >= 11, or name another compiler in CXX")
    return cxx


def find_torch() -> Path:
    """The folder of the torch to build against; a build in isolation sees it only through purelib."""
    spec = importlib.util.find_spec("torch")
    found = Path(spec.origin).parent if spec else Path(sysconfig.get_path("purelib"), "torch")
    version = found / "version.py"
    have = re.search(r"'((\d+)\.(\d+)\S*)'", version.read_text() if version.exists() else "")
    if not have or (int(have[2]), int(have[3])) < (2, 11):
        problem = f"found {have[1] if have else 'none'} in {found.parent}"
        sys.exit(f"mmkern: needs torch >= 2.11 to build, {problem}; install it, then build with --no-build-isolation")
    return found.resolve()


def find_python_headers() -> list[Path]:
    import pybind11  # here, since check_build_tools tells when it is missing

    return [Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]


def options(flag: str, *folders: object) -> str:
    """`flag` before each folder, quoted for the shell and for ninja: a path may hold a space or a dollar."""
    return " ".join(flag + shlex.quote(str(folder)) for folder in folders).replace("$", "$$")


def escaped(path: Path) -> str:
    """A path of a build line, in which ninja ends a name at a space or a colon."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(folder: Path, cxx: str) -> None:
    """Run build.ninja of `folder`, showing what it says; if it fails, end with the compiler's own complaint."""
    command, said = [sys.executable, "-m", "ninja", "-C", str(folder)], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as ninja:
        for line in ninja.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if ninja.returncode:
        text = "".join(line for line in said if not line.startswith(("FAILED:", "[", cxx)))
        sys.exit(f"mmkern: compiling with `{cxx}` failed: {first_error(text)}")


if __name__ == "__main__":
    check_python()
    find_compiler()
