"""Whether dist/ may be released: `make release-check`. Prints every fault, and its exit status tells if any."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"mmkern": "mmkern", "kernels": "mmkern/kernels", "benchmarks": "mmkern/benchmarks"}  # here -> in a wheel


def version() -> str:
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "mmkern/__init__.py").read_text(), re.M)
    assert found, "mmkern/__init__.py has no __version__"
    return found[1]


def faults_of_texts(number: str) -> Iterator[str]:
    if not re.search(rf"^## \[{re.escape(number)}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M):
        yield f"CHANGELOG.md has no section `## [{number}] - YYYY-MM-DD`"
    if f"version: {number}\n" not in (ROOT / "CITATION.cff").read_text():
        yield f"CITATION.cff has another version than {number}"
    tagged = subprocess.run(
        ["git", "tag", "--points-at", "HEAD"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    if f"v{number}" not in tagged.stdout.split():
        yield f"the commit has no tag v{number}"


def faults_of_wheel(path: Path, number: str) -> Iterator[str]:
    """One compiled file, every module, the licence, and nothing that is not ours: no library of others is bundled."""
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        info = f"mmkern-{number}.dist-info"
        if not path.name.startswith(f"mmkern-{number}-") or f"{info}/METADATA" not in names:
            yield f"{path.name}: not of version {number}"
            return
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    if metadata["License-Expression"] != "Apache-2.0" or f"{info}/licenses/LICENSE" not in names:
        yield f"{path.name}: its licence or the text of it is missing"
    if strange := sorted(name for name in names if name.split("/")[0] not in ("mmkern", info)):
        yield f"{path.name}: holds what is not ours: {', '.join(strange[:3])}"
    libraries = [name for name in names if name.endswith(".so") or ".so." in name]
    if len([name for name in libraries if name.startswith("mmkern/_C.")]) != 1 or any(
        "/_C" not in n for n in libraries
    ):
        yield f"{path.name}: expected mmkern/_C and no library of others, found {libraries}"
    wanted = {
        f"{there}/{source.relative_to(ROOT / here)}"
        for here, there in PACKAGES.items()
        for source in (ROOT / here).rglob("*")
        if source.suffix in (".py", ".pyi", ".typed")
    }
    modules = {name for name in names if name.endswith((".py", ".pyi", ".typed"))}
    if wanted != modules:
        yield f"{path.name}: modules differ from the checkout: {sorted(wanted ^ modules)[:3]}"
    if "manylinux_2_28" not in path.name and "macosx" not in path.name:
        yield f"{path.name}: no platform that others can install"


def faults_of_source(path: Path) -> Iterator[str]:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("setup.py", "csrc/toolchain.py", "csrc/module.cpp", "LICENSE", "tests/test_install.py"):
        if wanted not in names:
            yield f"{path.name}: {wanted} is missing"


def main() -> None:
    number, files = version(), sorted((ROOT / "dist").glob("mmkern-*"))
    faults = list(faults_of_texts(number))
    for path in files:
        faults += faults_of_wheel(path, number) if path.suffix == ".whl" else faults_of_source(path)
    if not any(path.suffix == ".whl" for path in files):
        faults.append("dist holds no wheel: run `make wheel`")
    described = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)],
        check=False,
        capture_output=True,
        text=True,
    )
    if described.returncode:
        faults.append(f"the long description does not render: {described.stdout}{described.stderr}".strip())
    print(*faults or [f"{number}: {len(files)} files may be released"], sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
