"""Arm's vector vocabulary and kernels, cross-compiled and run under qemu: `make test-arm`.

No file of this folder is named test_*: compiling takes minutes, so a plain `make test` leaves them out.
"""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_vec import *  # noqa: F403, the vocabulary's tests, here with another `probe`

ROOT = Path(__file__).parents[2]
CXX, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = ["-std=c++17", "-O2", "-static", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # as csrc/toolchain.py has them
SETS = {"baseline": [], "neon_bf16": ["-march=armv8.2-a+bf16"]}
PROCESSORS = {"baseline": "cortex-a57", "neon_bf16": "max"}  # the first lacks bfloat16
pytestmark = pytest.mark.skipif(
    not shutil.which(CXX) or not shutil.which(QEMU), reason=f"needs {CXX} and {QEMU}: g++-aarch64-linux-gnu, qemu-user"
)


def compile_for(isa: str, source: Path, out: Path, *more: str) -> Path:
    flags = [*FLAGS, *SETS[isa], f"-DMMKERN_ISA={isa}", "-I", str(ROOT / "csrc"), *more]
    subprocess.run([CXX, *flags, str(source), "-o", str(out)], check=True)
    return out


def emulate(isa: str, program: Path, *arguments: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [QEMU, "-cpu", PROCESSORS[isa], str(program), *map(str, arguments)]
    return subprocess.run(command, check=False, input=data, capture_output=True, timeout=600)


class Probe:
    """tests/vec_probe.cpp behind an emulator, with the calls of a ctypes library."""

    fused = True

    def __init__(self, isa: str, program: Path) -> None:
        self.isa, self.program = isa, program

    def call(self, to: ctypes.c_void_p, *arguments: object, data: list[bytes]) -> int:
        done = emulate(self.isa, self.program, *arguments, data=b"".join(data))
        assert done.returncode == 0, done.stderr
        ctypes.memmove(to, done.stdout, len(done.stdout))
        return 0

    def lanes(self) -> int:
        return int(emulate(self.isa, self.program).stdout)

    def apply(self, op, x, y, z, out, count) -> int:
        return self.call(
            out, op.decode(), count.value, data=[ctypes.string_at(p.value, 4 * count.value) for p in (x, y, z)]
        )

    def reduce(self, x, flags, n, out) -> int:
        lanes = self.lanes()
        return self.call(
            out, "reduce", n, data=[ctypes.string_at(x.value, 4 * lanes), ctypes.string_at(flags.value, lanes)]
        )

    def __getattr__(self, name: str):
        size = 4 if name.startswith("f32") else 2
        return lambda x, out, n: self.call(out, name, n.value, data=[ctypes.string_at(x.value, size * n.value)])


@pytest.fixture(scope="module", params=SETS)
def probe(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("arm") / request.param
    return Probe(request.param, compile_for(request.param, ROOT / "tests/arm/vec_main.cpp", out))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    once = [ROOT / f"csrc/cpu/{name}.cpp" for name in ("isa", "pages", "position/turns")]
    jobs = [(isa, path) for path in sorted((ROOT / "csrc/cpu").rglob("*.isa.cpp")) for isa in SETS]
    jobs += [("baseline", path) for path in (ROOT / "tests/arm/kernels.cpp", *once)]
    with ThreadPoolExecutor(2) as pool:
        compiled = [
            pool.submit(compile_for, isa, path, folder / f"{number}.o", "-c") for number, (isa, path) in enumerate(jobs)
        ]
    objects = [job.result() for job in compiled]
    subprocess.run([CXX, "-static", *map(str, objects), "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


@pytest.mark.parametrize("isa", SETS)
def test_kernels_against_float64(kernels, isa):
    done = emulate(isa, kernels)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, "\n".join(lines)
    assert lines[-1] == "all right"
    ran = {line.split("error")[0].split()[-1] for line in lines[:-1]}
    assert ran == set(list(SETS)[: list(SETS).index(isa) + 1])  # chosen at run time, by what the processor has
