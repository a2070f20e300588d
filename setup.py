"""Package map and native extensions; everything else is in pyproject.toml, flags and tools in csrc/toolchain.py.

*.isa.cpp is compiled once per instruction set, csrc/*.cpp once per Python, the rest once; the best set the processor
has is chosen when mmkern runs. csrc/cuda is a second library, built where nvcc is. torch is read for headers and
libtorch, never imported. Ninja, in build/, recompiles what changed (source, header or flag), each object where its
source lies below csrc.
"""

import runpy
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))

import toolchain
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from toolchain import escaped, find_compiler, find_torch, options

toolchain.check_build_tools()
ROOT = Path(__file__).resolve().parent
SOABI = sysconfig.get_config_var("SOABI")
CUDA = runpy.run_path(str(ROOT / "csrc/cuda/build.py"))


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
        per_python = {f".{SOABI}": options("-isystem ", torch / "include", *toolchain.find_python_headers())}
        per_isa = {f".{isa}": f"{flags} -DMMKERN_ISA={isa}" for isa, flags in toolchain.ISAS.items()}
        flags = toolchain.FLAGS + options("-I", ROOT / "csrc")
        ninja, objects = toolchain.RULES.format(cxx=cxx, flags=flags, torch=options("-L", torch / "lib")), []
        root = Path("../../..") if cuda else ROOT  # seen from `out`: nvcc takes a dollar in a path for a variable
        ninja += CUDA["rules"](nvcc, cxx, root / "csrc", torch, options) if cuda else ""
        for source in map(Path, ext.sources):
            host = per_python if source.parent.name == "csrc" else once
            for suffix, extra in (per_isa if source.name.endswith(".isa.cpp") else host).items():
                objects.append(escaped(source.relative_to("csrc")) + f"{suffix}.o")
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                ninja += f"build {objects[-1]}: {rule} {escaped(root / source)}\n extra = {extra}\n"
        library, link = Path(self.get_ext_fullpath(ext.name)).resolve(), "link_cuda" if cuda else "link"
        ninja += f"build {escaped(library)}: {link} {' '.join(objects)}\n"
        out = ROOT / "build" / sysconfig.get_platform() / ext.name
        out.mkdir(parents=True, exist_ok=True)
        (out / "build.ninja").write_text(ninja)
        toolchain.run_ninja(out, cxx)


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
