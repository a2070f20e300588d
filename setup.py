"""Package map and native extensions; everything else is in pyproject.toml.

csrc/cpu/*.isa.cpp is compiled once per instruction set below, the rest of csrc once; the best set the
processor has is chosen when mmkern runs. csrc/cuda is a second library, built where nvcc is. torch is read for
headers and libtorch, never imported. Ninja, in build/, recompiles what changed: source, header or flag.
"""

import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = runpy.run_path(str(ROOT / "csrc/cuda/build.py"))
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS = {"baseline": "-march=x86-64-v2", "avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
FLAGS = f"-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra -I{ROOT}/csrc "
FLAGS += "-Wno-maybe-uninitialized -Wno-uninitialized "  # GCC 12 warns of its own AVX-512 headers
FLAGS += "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11
RULES = """
rule cxx
 command = {cxx} {flags} $extra -MMD -MF $out.d -c $in -o $out
 deps = gcc
 depfile = $out.d
 description = compile $out
rule link
 command = {cxx} -shared $in -L{torch}/lib -ltorch_cpu -lc10 -o $out
 description = link $out
"""


def find_torch() -> Path:
    """The folder of the torch to build against; a build in isolation sees it only through purelib."""
    spec = importlib.util.find_spec("torch")
    found = Path(spec.origin).parent if spec else Path(sysconfig.get_path("purelib"), "torch")
    version = found / "version.py"
    have = re.search(r"'((\d+)\.(\d+)\S*)'", version.read_text() if version.exists() else "")
    if not have or (int(have[2]), int(have[3])) < (2, 11):
        problem = f"found {have[1] if have else 'none'} in {found.parent}"
        sys.exit(f"mmkern: needs torch >= 2.11 to build, {problem}; install it, then build with --no-build-isolation")
    return found


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch, cxx, cuda = find_torch(), os.environ.get("CXX", "g++"), ext.name == "mmkern._C_cuda"
        if not shutil.which(cxx.split()[0]):
            sys.exit(f"mmkern: no C++ compiler `{cxx}`; install g++ >= 11, or name a C++17 compiler in CXX")
        nvcc, without = CUDA["find_nvcc"]() if cuda else (None, "")
        if without:
            return print(f"mmkern: {ext.name} is not built: {without}")
        include = [torch / "include", pybind11.get_include(), sysconfig.get_path("include")]
        once = {"": " ".join(f"-isystem {path}" for path in include) + (" -DUSE_CUDA" if cuda else "")}
        per_isa = {f".{isa}": f"{flags} -DMMKERN_ISA={isa}" for isa, flags in ISAS.items()}
        ninja, objects = RULES.format(cxx=cxx, flags=FLAGS, torch=torch), []
        ninja += CUDA["rules"](nvcc, cxx, ROOT / "csrc", torch) if cuda else ""
        for source in map(Path, ext.sources):
            for suffix, extra in (per_isa if source.name.endswith(".isa.cpp") else once).items():
                objects.append(f"{source.name}{suffix}.o")
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                ninja += f"build {objects[-1]}: {rule} {ROOT / source}\n extra = {extra}\n"
        link = "link_cuda" if cuda else "link"
        ninja += f"build {Path(self.get_ext_fullpath(ext.name)).resolve()}: {link} {' '.join(objects)}\n"
        out = ROOT / "build" / sysconfig.get_config_var("SOABI") / ext.name  # one for each Python
        out.mkdir(parents=True, exist_ok=True)
        (out / "build.ninja").write_text(ninja)
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(out)], check=False).returncode:
            sys.exit(f"mmkern: compiling failed (see above); it needs g++ >= 11 or another C++17 compiler, not `{cxx}`")


FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.c*") if path.suffix in (".cpp", ".cu"))
OF_CUDA = [file for file in FILES if file.startswith("csrc/cuda/")]
setup(
    ext_modules=[
        Extension("mmkern._C", [file for file in FILES if file not in OF_CUDA]),
        Extension("mmkern._C_cuda", OF_CUDA, optional=True),  # none without nvcc
    ],
    cmdclass={"build_ext": NinjaBuild},
    package_dir={"mmkern.kernels": "kernels", "mmkern.benchmarks": "benchmarks"},
)
