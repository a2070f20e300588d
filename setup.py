"""Package map and native extensions; everything else is in pyproject.toml.

csrc/cpu/*.isa.cpp is compiled once per instruction set below, the rest of csrc once; the best set the
processor has is chosen when mmkern runs. torch is only read for headers and libtorch, never imported, so
`pip install .` builds against the torch of the environment it installs into.
"""

import importlib.util
import os
import platform
import re
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
    ISAS = {"baseline": "-march=x86-64-v2", "avx2": AVX2, "avx512": AVX512}
    ISAS["avx512_bf16"] = f"{AVX512} -mavx512bf16"


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
    """Write one build.ninja per extension and run it: parallel, incremental, flags per instruction set."""

    def build_extension(self, ext: Extension) -> None:
        torch, out = find_torch(), Path(self.build_temp).resolve() / ext.name
        out.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cxx, suffix = (
            os.environ.get("CXX", "g++"),
            "-undefined dynamic_lookup" if sys.platform == "darwin" else "",
        )
        include = [torch / "include", pybind11.get_include(), sysconfig.get_path("include"), ROOT / "csrc"]
        flags = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -fno-math-errno -ffp-contract=off "
        flags += "-Wno-maybe-uninitialized -Wno-uninitialized "  # GCC 12 warns of its own AVX-512 headers
        flags += "-DTORCH_TARGET_VERSION=0x020b000000000000 " + " ".join(f"-isystem {p}" for p in include[:3])
        flags += f" -I{include[3]} -DMMKERN_ISAS='\"{' '.join(ISAS)}\"'"
        rules = [
            f"rule cxx\n command = {cxx} -MMD -MF $out.d {flags} $isa -c $in -o $out\n deps = gcc\n depfile = $out.d"
        ]
        rules[0] += "\n description = $in $isa"
        rules += [
            f"rule link\n command = {cxx} -shared {suffix} $in -L{torch}/lib -ltorch_cpu -lc10 -o $out\n description = $out"
        ]
        objects = []
        for source in map(Path, ext.sources):
            for isa in ISAS if source.name.endswith(".isa.cpp") else [""]:
                objects.append(out / f"{source.name}.{isa}.o")
                rules.append(f"build {objects[-1]}: cxx {ROOT / source}")
                rules.append(f" isa = {ISAS[isa]} -DMMKERN_ISA={isa}" if isa else " isa =")
        rules.append(f"build {target}: link {' '.join(map(str, objects))}\n")
        (out / "build.ninja").write_text("\n".join(rules))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(out)], check=True)
        except subprocess.CalledProcessError:
            sys.exit(f"mmkern: compiling failed (see above); a C++17 compiler is needed, tried `{cxx}`")


SOURCES = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
setup(
    ext_modules=[Extension("mmkern._C", SOURCES)],
    cmdclass={"build_ext": NinjaBuild},
    package_dir={"mmkern.kernels": "kernels", "mmkern.benchmarks": "benchmarks"},
)
