"""How mmkern._C_cuda is built, for setup.py: kernels by nvcc, their hosts by the C++ compiler, the runtime linked in.

Where nvcc >= 12.8 is not found, nothing is built and one line says so. The driver is not needed, nor is a torch with
CUDA; beside such a torch, which cannot run it, one architecture is built for the checks that need no GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

ALL = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
ONE = "8.0"
RULES = """
rule nvcc
 command = {nvcc} -std=c++17 -O3 {codes} -Xcompiler=-fPIC,-fvisibility=hidden {csrc} $
  -MD -MF $out.d -c $in -o $out
 deps = gcc
 depfile = $out.d
 description = compile $out
rule link_cuda
 command = {cxx} -shared $in {libraries} -ltorch_cpu -lc10 -lcudart_static -ldl -lrt -lpthread $
  -Wl,--exclude-libs,ALL -o $out
 description = link $out
"""


def find_nvcc() -> tuple[Path | None, str]:
    """nvcc and "", or None and why there is none that will do."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home, "bin/nvcc")) if home else shutil.which("nvcc")
    if not found or not Path(found).exists():
        return None, "nvcc was not found" + (f" in {home}/bin" if home else "")
    text = subprocess.run([found, "--version"], check=False, capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", text)
    if not release or (int(release[1]), int(release[2])) < (12, 8):
        return None, f"{found} is of CUDA {'.'.join(release.groups()) if release else 'unknown'}, older than 12.8"
    return Path(found), ""


def architectures(torch: Path) -> str:
    """TORCH_CUDA_ARCH_LIST, as torch's own extensions read it; else all, or one beside a torch without CUDA."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given
    return ONE if re.search(r"^cuda[^=]*= None$", (torch / "version.py").read_text(), re.M) else ALL


def codes(listed: str) -> str:
    """nvcc's options for a list such as "8.0;9.0a+PTX"."""
    options = []
    for name in re.split(r"[;\s]+", listed.strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise SystemExit(f"mmkern: TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0 or 9.0a+PTX, got {name!r}")
        number = name.removesuffix("+PTX").replace(".", "")
        options.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(options)


def toolkit(nvcc: Path) -> Path:
    """The folder that nvcc belongs to, which a wrapper in another one does not tell by its own path."""
    text = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], check=False, capture_output=True, text=True
    )
    top = re.search(r"TOP=(\S+)", text.stderr)
    return Path(top[1]).resolve() if top else nvcc.resolve().parents[1]


def rules(nvcc: Path, cxx: str, csrc: Path, torch: Path, options: Callable[..., str]) -> str:
    """Ninja's rules; `options` is that of csrc/toolchain.py, which quotes paths."""
    libraries = options("-L", torch / "lib", toolkit(nvcc) / "lib64")
    listed = codes(architectures(torch))
    return RULES.format(nvcc=options("", nvcc), cxx=cxx, codes=listed, csrc=options("-I", csrc), libraries=libraries)
