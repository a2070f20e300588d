"""Package map and native extensions; everything else is in pyproject.toml.

csrc/cpu/*.isa.cpp is compiled once per instruction set below, csrc/*.cpp once per Python, the rest once; the best set
the processor has is chosen when mmkern runs. csrc/cuda is a second library, built where nvcc is. torch is read for
headers and libtorch, never imported. Ninja, in build/, recompiles what changed: source, header or flag.
"""

import platform
import runpy
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from toolchain import check_build_tools, escaped, find_compiler, find_python_headers, find_torch, options, run_ninja

check_build_tools()
ROOT = Path(__file__).resolve().parent
SOABI = sysconfig.get_config_var("SOABI")
CUDA = runpy.run_path(str(ROOT / "csrc/cuda/build.py"))
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


class CheckedInfo(dist_info):
    """pip asks for this first: what is missing is said before gigabytes of torch are downloaded."""

    def run(self) -> None:
        find_compiler(), find_torch()
        super().run()


class NinjaBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cxx, torch, cuda = find_compiler(), find_torch(), ext.name == "mmkern._C_cuda"
        nvcc, without = CUDA["find_nvcc"]() if cuda else (None, "")
        if without:
            return print(f"mmkern: {ext.name} is not built: {without}")
        once = {"": options("-isystem ", torch / "include") + (" -DUSE_CUDA" if cuda else "")}
        per_python = {f".{SOABI}": options("-isystem ", torch / "include", *find_python_headers())}
        per_isa = {f".{isa}": f"{flags} -DMMKERN_ISA={isa}" for isa, flags in ISAS.items()}
        flags = FLAGS + options("-I", ROOT / "csrc")
        ninja, objects = RULES.format(cxx=cxx, flags=flags, torch=options("-L", torch / "lib")), []
        root = Path("../../..") if cuda else ROOT  # seen from `out`: nvcc takes a dollar in a path for a variable
        ninja += CUDA["rules"](nvcc, cxx, root / "csrc", torch, options) if cuda else ""
        for source in map(Path, ext.sources):
            host = per_python if source.parent.name == "csrc" else once
            for suffix, extra in (per_isa if source.name.endswith(".isa.cpp") else host).items():
                objects.append(f"{source.name}{suffix}.o")
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                ninja += f"build {objects[-1]}: {rule} {escaped(root / source)}\n extra = {extra}\n"
        library, link = Path(self.get_ext_fullpath(ext.name)).resolve(), "link_cuda" if cuda else "link"
        ninja += f"build {escaped(library)}: {link} {' '.join(objects)}\n"
        out = ROOT / "build" / sysconfig.get_platform() / ext.name
        out.mkdir(parents=True, exist_ok=True)
        (out / "build.ninja").write_text(ninja)
        run_ninja(out, cxx)


FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.c*") if path.suffix in (".cpp", ".cu"))
OF_CUDA = [file for file in FILES if file.startswith("csrc/cuda/")]
setup(
    ext_modules=[
        Extension("mmkern._C", [file for file in FILES if file not in OF_CUDA]),
        Extension("mmkern._C_cuda", OF_CUDA, optional=True),  # none without nvcc
    ],
    cmdclass={"build_ext": NinjaBuild, "dist_info": CheckedInfo},
    package_dir={"mmkern.kernels": "kernels", "mmkern.benchmarks": "benchmarks"},
)
