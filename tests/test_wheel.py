"""The wheel in an environment that has torch and nothing else: installed, every op run, removed without a trace."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import mmkern

ROOT = Path(__file__).parents[1]
OBJECTS = ROOT / "build" / sysconfig.get_platform() / "mmkern._C"
pytestmark = pytest.mark.skipif(not OBJECTS.exists(), reason="not built in this checkout: a wheel would take minutes")

EVERY_OP = """
import torch, mmkern
x, table, ids = torch.randn(2, 4, 6, 8), torch.randn(9, 8), torch.tensor([[1, 2, 3]])
calls = {
    "scaled_dot_product_attention": (x, x, x), "softmax": (x, -1), "log_softmax": (x, -1), "masked_softmax": (x,),
    "cross_entropy": (table, torch.arange(9) % 8),
    "linear_cross_entropy": (table, torch.randn(5, 8), torch.arange(9) % 5),
    "add_positional_encoding": (x,), "embed_tokens": (ids, table), "rotary": (x, x), "alibi_slopes": (4,),
}
others = {"Choice", "backend", "explain"}
assert set(calls) == set(mmkern.__all__) - others, set(mmkern.__all__) - others - set(calls)
for name, arguments in calls.items():
    op = getattr(mmkern, name)
    for choice in mmkern.explain(op, *arguments):
        assert choice.backend == "cpu", choice
    results = [op(*arguments)]
    with mmkern.backend("reference"):
        results.append(op(*arguments))
    torch.testing.assert_close(*results)
print(mmkern.__file__)
"""


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], check=False, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def test_wheel_installs_runs_every_op_and_leaves_nothing(tmp_path):
    pytest.importorskip("pip")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    # A folder named in a .pth file is searched, but .pth files in it are not read: this checkout stays out of sight.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    before = sorted(p for p in (tmp_path / "empty").rglob("*") if p.suffix != ".pyc" and p.name != "__pycache__")
    run(*pip, "--python", python, "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    assert Path(run(python, "-W", "error", "-c", EVERY_OP, cwd=tmp_path)).is_relative_to(site)
    run(*pip, "--python", python, "uninstall", "-q", "-y", "mmkern", cwd=tmp_path)
    assert (
        sorted(p for p in (tmp_path / "empty").rglob("*") if p.suffix != ".pyc" and p.name != "__pycache__") == before
    )
    assert mmkern.__version__ in wheel.name
