"""Package map and native extensions; everything else is in pyproject.toml.

csrc/cpu/*.isa.cpp is compiled once per instruction set below, the rest of csrc once; the best set the
processor has is chosen when mmkern runs. torch is only read for headers and libtorch, never imported, so
`pip install .` builds against the torch of the environment it installs into. Objects stay in build/, where
ninja recompiles what changed: a source, a header it includes, or a flag.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
ISAS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS = {"baseline": "-march=x86-64-v2", "avx2": AVX2, "avx512": AVX512, "avx512_bf16": f"{AVX512} -mavx512bf16"}
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=off -Wall -Wextra"
FLAGS += " -Wno-maybe-uninitialized -Wno-uninitialized"  # GCC 12 warns of its own AVX-512 headers
FLAGS += f" -I{ROOT}/csrc -DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11


def find_torch() -> Path:
    """The folder of the torch to build against; a build in isolation sees it only through purelib."""
    spec = importlib.util.find_spec("torch")
    found = Path(spec.origin).parent if spec else Path(sysconfig.get_path("purelib"), "torch")
    version = found / "version.py"
    if not version.exists():
        sys.exit("mmkern: install torch >= 2.11 first, then `pip install --no-build-isolation .`")
    have = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", version.read_text())
    if not have or (int(have[2]), int(have[3])) < (2, 11):
        sys.exit(f"mmkern: needs torch >= 2.11, found {have[1] if have else 'no version'} in {found}")
    return found


class NinjaBuild(build_ext):
    """Write one build.ninja per extension and run it."""

    def build_extension(self, ext: Extension) -> None:
        torch, cxx = find_torch(), os.environ.get("CXX", "g++")
        if not shutil.which(cxx.split()[0]):
            sys.exit(f"mmkern: no C++ compiler `{cxx}`; install g++ >= 11, or name a C++17 compiler in CXX")
        python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        python += f" -DMMKERN_ISAS='\"{' '.join(ISAS)}\"'"
        out = ROOT / "build" / sysconfig.get_config_var("SOABI") / ext.name
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        lines = [f"rule cxx\n command = {cxx} {FLAGS} -isystem {torch}/include $flags -MMD -MF $out.d -c $in -o $out"]
        lines += [f" deps = gcc\n depfile = $out.d\n description = compile $out\nrule link\n command = {cxx} -shared $in -L{torch}/lib -ltorch_cpu -lc10 -o $out"]
        objects = []
        for source in map(Path, ext.sources):
            by_isa = {f".{isa}": f"{flags} -DMMKERN_ISA={isa}" for isa, flags in ISAS.items()}
            once = {"": python if source.name == "module.cpp" else ""}
            for suffix, flags in (by_isa if source.name.endswith(".isa.cpp") else once).items():
                objects.append(f"{source.name}{suffix}.o")
                lines.append(f"build {objects[-1]}: cxx {ROOT / source}\n flags = {flags}")
        lines.append(f"build {library}: link {' '.join(objects)}\n")
        out.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        (out / "build.ninja").write_text("\n".join(lines))
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(out)], check=False).returncode:
            sys.exit(f"mmkern: compiling failed (see above); it needs g++ >= 11 or another C++17 compiler, not `{cxx}`")


SOURCES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
setup(
    ext_modules=[Extension("mmkern._C", SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
    package_dir={"mmkern.kernels": "kernels", "mmkern.benchmarks": "benchmarks"},
)
