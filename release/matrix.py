"""One wheel under every torch that is promised: `make matrix`, which writes benchmarks/reports/matrix.md.

Each torch gets an environment of its own in build/matrix, and the wheel that `make wheel` left in dist. The tests run
beside the installed package, outside the checkout: a few cases of every test of the ops and what stands on them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/matrix"
TORCHES = ("2.11", "2.13", "2.14", "newest")
OPS = ("attention*", "softmax*", "loss*", "linear_loss", "position*", "rotary", "dispatch", "transforms", "parallel")
ABOVE = ("opinfo", "integrations", "nn_*", "model", "triton_softmax", "triton_loss", "triton_position", "vec")
NEEDS = ("expecttest", "hypothesis", "numpy", "pytest", "pytest-benchmark", "transformers", "tokenizers", "safetensors")
SECONDS = 1500  # of one environment's tests
FACTS = """
import sys, torch, mmkern, importlib.metadata as m
from mmkern import _C
triton = m.version("triton") if [d for d in m.distributions() if d.name == "triton"] else "none"
print(torch.__version__, triton, ".".join(map(str, sys.version_info[:3])), _C.isa(), mmkern.__file__, sep="|")
"""


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], check=False, cwd=WORK, env=os.environ | env, capture_output=True, text=True
    )


def environment(name: str) -> Path:
    """An interpreter with this torch as PyPI gives it, and the test tools as constraints.txt pins them."""
    folder = WORK / f"torch-{name}"
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
        torch = "torch" if name == "newest" else f"torch=={name}.*"
        for command in (
            (sys.executable, "-m", "venv", folder),
            (python, "-m", "pip", "install", "-q", torch),
            (python, "-m", "pip", "install", "-q", torch, *(f"{tool}=={pinned[tool]}" for tool in NEEDS)),
        ):
            done = run(*command)
            if done.returncode:
                sys.exit(f"{done.stderr}\nrelease/matrix.py: could not make the environment of torch {name}")
        if run(python, "-c", "import triton").returncode:  # a CPU build of torch brings none
            run(python, "-m", "pip", "install", "-q", f"triton=={pinned['triton']}")
        (folder / "ready").touch()
    return python


def copy_tests() -> None:
    """What the tests read of a checkout, less the package: what they import must be what was installed."""
    shutil.rmtree(WORK / "checkout", ignore_errors=True)
    shutil.copytree(ROOT / "tests", WORK / "checkout/tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "release/fast.py", WORK / "checkout/tests")
    shutil.copy(ROOT / "pyproject.toml", WORK / "checkout")


def files() -> Iterator[str]:
    for pattern in OPS + ABOVE:
        yield from sorted(f"tests/{path.name}" for path in (WORK / "checkout/tests").glob(f"test_{pattern}.py"))


def test(name: str, wheel: Path, cases: int) -> tuple[str, bool]:
    """One row of the table, and whether all is well."""
    python = environment(name)
    done = run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
    facts = run(python, "-W", "error", "-c", FACTS)
    if done.returncode or facts.returncode:
        sys.exit(f"{done.stderr}{facts.stderr}\nrelease/matrix.py: the wheel does not work with torch {name}")
    torch, triton, version, isa, where = facts.stdout.strip().split("|")
    assert "site-packages" in where, f"tested {where} instead of the wheel"
    log, checkout = WORK / f"torch-{name}.log", WORK / "checkout"
    command = [
        "timeout",
        "-s",
        "INT",
        str(SECONDS),
        str(python),
        "-m",
        "pytest",
        "-q",
        "-p",
        "fast",
        f"--cases={cases}",
        *files(),
    ]
    with log.open("w") as out:
        plugin = os.environ | {"PYTHONPATH": str(checkout / "tests")}
        subprocess.run(command, check=False, cwd=checkout, stdout=out, stderr=out, env=plugin)
    text = log.read_text()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", text.splitlines()[-1])}
    failed = re.findall(r"^FAILED (\S+)|^ERROR (\S+)", text, re.M)
    finished = "KeyboardInterrupt" not in text
    good = bool(counts.get("passed")) and not failed and finished
    verdict = "all pass" if good else ", ".join(a or b for a, b in failed) or "none failed"
    verdict += "" if finished else "; stopped before the last test"
    numbers = (counts.get("passed", 0), counts.get("failed", 0), counts.get("skipped", 0))
    return f"| {torch} | {triton} | {version} | {isa} | {' | '.join(map(str, numbers))} | {verdict} |", good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("torches", nargs="*", default=TORCHES, help="such as 2.11, or newest")
    parser.add_argument("--cases", type=int, default=3, help="cases of each test function")
    parser.add_argument("--jobs", type=int, default=1, help="environments tested at a time")
    options = parser.parse_args()
    cases = options.cases
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    found = sorted((ROOT / "dist").glob(f"mmkern-*-{tag}-*.whl"))
    if not found:
        sys.exit(f"release/matrix.py: no wheel for {tag} in dist: run `make wheel` first")
    WORK.mkdir(parents=True, exist_ok=True)
    copy_tests()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: test(name, found[-1], cases), options.torches))
    rows, right = [row for row, _ in results], all(good for _, good in results)
    print(*rows, sep="\n")
    titles = ("torch", "Triton", "Python", "kernels", "passed", "failed", "skipped", "verdict")
    head = f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|\n"
    report = ROOT / "benchmarks/reports/matrix.md"
    report.parent.mkdir(exist_ok=True)
    report.write_text(
        f"# {found[-1].name}\n\nUp to {cases} cases of each test (`make matrix`).\n\n{head}" + "\n".join(rows) + "\n"
    )
    sys.exit(not right)


if __name__ == "__main__":
    main()
