"""Threads: torch's own settings hold, results do not depend on them, and a forked child works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkern
from mmkern.testing import isas, randn

# Each script runs in a process of its own: forking and counting threads need a known start.
PRELUDE = """
import os, torch, mmkern
x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
def threads(): return len(os.listdir("/proc/self/task"))
"""

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in Linux's /proc")


def fresh(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("isa", isas())
def test_bits_do_not_depend_on_threads(isa):
    x = randn(257, 300)
    before = torch.get_num_threads()
    with mmkern.backend("cpu", strict=True, isa=isa):
        try:
            results = []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results += [mmkern.softmax(x, 1), mmkern.softmax(x, 1)]
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_one_thread_means_one_thread():
    script = """
torch.set_num_threads(1)
before = threads()
mmkern.softmax(x, 1)
print(threads() - before)
"""
    assert fresh(script) == "0"


def test_three_threads_mean_three_threads():
    script = """
torch.set_num_threads(3)
before = threads()
mmkern.softmax(x, 1)
print(threads() - before)
"""
    assert fresh(script) == "2"  # and the calling one


@pytest.mark.parametrize("how", ["os.fork", "multiprocessing"])
def test_forked_child_runs_and_gets_the_same_bits(how):
    """torch's own OpenMP kernels hang in a child once the parent has used its threads."""
    child = """
def child():
    mmkern.softmax(x[:1], 1)  # tells torch to keep to one thread, for which it makes a pool of its own
    before = threads()
    # compared outside torch, whose own parallel comparison is what would hang here
    ok = mmkern.softmax(x, 1).numpy().tobytes() == expected.numpy().tobytes() and threads() == before
    from mmkern import _C
    ok = ok and _C.fma_gflops(0.01) > 0
    os._exit(0 if ok else 3)
torch.set_num_threads(2)
expected = mmkern.softmax(x, 1)
assert threads() > 1
"""
    fork = """
pid = os.fork()
if pid == 0: child()
import time
for _ in range(600):
    done, status = os.waitpid(pid, os.WNOHANG)
    if done: break
    time.sleep(0.1)
else:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise SystemExit("child hangs")
print(os.waitstatus_to_exitcode(status))
"""
    process = """
import multiprocessing
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join(60)
if process.exitcode is None: process.kill(); raise SystemExit("child hangs")
print(process.exitcode)
"""
    assert fresh(child + (fork if how == "os.fork" else process)) == "0"


def test_a_forked_child_copies_and_casts_around_the_kernels():
    """By torch's own ops, whose threads stayed behind: one that waits for them is ended by the alarm."""
    script = """
import signal
torch.set_num_threads(2)
leaf = x.clone().requires_grad_()
def run():
    leaf.grad = None
    t = leaf.t().reshape(1, 1, 1024, 512).mT.reshape(1, 1, 512, 1024)[..., ::2]  # nothing is contiguous
    out = mmkern.scaled_dot_product_attention(t, t, t)
    loss = mmkern.cross_entropy(out[0, 0].double().float(), torch.arange(512, dtype=torch.int32).long() % 256)
    (mmkern.softmax(leaf[:, ::2], 0).sum() + loss).backward()
    return leaf.grad.numpy().tobytes()
expected = run()
if (pid := os.fork()) == 0:
    signal.alarm(60)
    mmkern.softmax(x[:1], 1)  # the first op: from here on torch keeps to one thread
    os._exit(0 if run() == expected else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), torch.get_num_threads())
"""
    assert fresh(script) == "0 2"


def test_parent_keeps_its_threads_after_a_fork():
    script = """
torch.set_num_threads(2)
expected = mmkern.softmax(x, 1)
if (pid := os.fork()) == 0: os._exit(0)
os.waitpid(pid, 0)
torch.set_num_threads(3)
before = threads()
assert torch.equal(mmkern.softmax(x, 1), expected)
print(threads() - before)
"""
    assert fresh(script) == "1"


def test_runs_inside_python_threads():
    script = """
from concurrent.futures import ThreadPoolExecutor
torch.set_num_threads(2)
expected = mmkern.softmax(x, 1)
with ThreadPoolExecutor(4) as pool:
    print(all(pool.map(lambda _: torch.equal(mmkern.softmax(x, 1), expected), range(32))))
"""
    assert fresh(script) == "True"


@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
def test_turns_have_no_race(tmp_path):
    """tests/turns_race.cpp says what it runs; without the memory order of a turn, ThreadSanitizer must see a race."""
    root = Path(__file__).parents[1]
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{root}/csrc", "-pthread"]
    program = tmp_path / "turns_race"
    command = ["g++", *flags, root / "tests/turns_race.cpp", "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "tsan" in built.stderr:
        pytest.skip("this g++ has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    for how in ([], ["poor"]):  # poor: a thread without memory for its scratch holds up nobody
        right = subprocess.run([program, *how], capture_output=True, text=True, check=False, timeout=120)
        assert (right.returncode, right.stdout, right.stderr) == (0, "every sum is right\n", "")
    assert "data race" in subprocess.run([program, "race"], capture_output=True, text=True, check=False).stderr
