"""The chunks of linear_cross_entropy: sums over very many, forked processes, and the dtype they multiply in."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import mmkern
from mmkern import testing
from mmkern.ops import _linear_chunks


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_16384_chunks_lose_no_more_digits_than_torch(reduction, backend, monkeypatch):
    """Of one sign, so that the sums grow: in float32 one after the other, 5e-6 of the loss were lost."""
    if backend == "gpu":
        monkeypatch.setattr(_linear_chunks, "host_reads", lambda t: False)
    rows, classes, dim = 16384, 5, 3
    leaves = [
        testing.randn(rows, dim, seed=1).abs(),
        testing.randn(classes, dim, seed=2),
        testing.randn(classes, seed=3),
    ]
    target = torch.full((rows,), 2)
    weight = testing.randn(classes, seed=4).abs() + 0.1

    def run(dtype, ours=False):
        h, w, b = (t.to(dtype).requires_grad_() for t in leaves)
        if ours:
            options = {"class_weight": weight, "reduction": reduction, "chunk_size": 1}
            loss = mmkern.linear_cross_entropy(h, w, target, b, **options)
        else:
            loss = F.cross_entropy(F.linear(h, w, b), target, weight.to(dtype), reduction=reduction)
        return loss.detach(), *torch.autograd.grad(loss, (h, w, b))

    exact, baseline = run(torch.float64), run(torch.float32)
    for i, (a, e, b) in enumerate(zip(run(torch.float32, ours=True), exact, baseline, strict=True)):
        testing.assert_accurate(a, e, b, "gradient" if i else "forward")
        assert (a - e).norm() <= 3e-7 * e.norm()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_what_an_ignored_row_holds_reaches_no_gradient(reduction, backend, monkeypatch):
    if backend == "gpu":
        monkeypatch.setattr(_linear_chunks, "host_reads", lambda t: False)
    weight, bias = testing.randn(5, 3, seed=2), testing.randn(5, seed=3)
    target = torch.tensor([1, -100, 4, -100])
    found = []
    for fill in (0.0, float("nan"), float("inf")):
        hidden = testing.randn(4, 3).index_fill(0, torch.tensor([1, 3]), fill)
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = mmkern.linear_cross_entropy(*leaves[:2], target, leaves[2], reduction=reduction, chunk_size=2)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), leaves)])
    assert found[0][2].abs().sum() > 0.1
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_ignored_rows_count_for_nothing(backend, monkeypatch):
    """In the divisor of a mean, when nothing else is there, and where their loss has an infinite gradient."""
    if backend == "gpu":
        monkeypatch.setattr(_linear_chunks, "host_reads", lambda t: False)
    leaves = [testing.randn(4, 3).requires_grad_(), testing.randn(5, 3, seed=2).requires_grad_()]
    weights = [None, torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1])]

    def gradients(target, grad=None, **options):
        loss = mmkern.linear_cross_entropy(*leaves, target, chunk_size=2, **options)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, grad)]

    target = torch.tensor([1, 3, 4, 3])
    for weight in weights:
        found = gradients(target, ignore_index=3, class_weight=weight)
        loss = F.cross_entropy(leaves[0] @ leaves[1].t(), target, weight, ignore_index=3)
        torch.testing.assert_close(found, [loss.detach(), *torch.autograd.grad(loss, leaves)])
        nothing = gradients(torch.full((4,), 3), ignore_index=3, class_weight=weight)
        assert nothing[0].isnan()
        assert all(not g.any() for g in nothing[1:])
    options = {"ignore_index": 3, "reduction": "none"}
    finite, infinite = (gradients(target, torch.tensor([1.0, x, 2.0, x]), **options) for x in (1.0, float("inf")))
    assert all(torch.equal(a, b) for a, b in zip(finite, infinite, strict=True))


def test_second_derivatives_sum_chunks_in_float64():
    hidden, weight = testing.randn(4096, 3, seed=1).abs(), testing.randn(5, 3, seed=2)
    target = torch.full((4096,), 2)

    def second(dtype, call):
        h, w = (t.to(dtype).requires_grad_() for t in (hidden, weight))
        (g,) = torch.autograd.grad(call(h, w), h, create_graph=True)
        return torch.autograd.grad(g.abs().sum(), w)[0]

    exact, baseline = (
        second(d, lambda h, w: F.cross_entropy(F.linear(h, w), target)) for d in (torch.float64, torch.float32)
    )
    found = second(torch.float32, lambda h, w: mmkern.linear_cross_entropy(h, w, target, chunk_size=2))
    testing.assert_accurate(found, exact, baseline, "gradient")


def test_a_forked_child_goes_on_after_its_parent_used_threads(tmp_path):
    script = """
import os, signal, torch, mmkern
torch.set_num_threads(2)
h, w = torch.randn(4000, 64, requires_grad=True), torch.randn(800, 64, requires_grad=True)
target = torch.arange(4000, dtype=torch.int32) % 800
def run(reduction, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = mmkern.linear_cross_entropy(h, w, target, reduction=reduction)
    for _ in range(2):  # what torch does around the op, too: scaling, adding to .grad, casting back
        (loss * 0.5).sum().backward(retain_graph=True)
    found = h.grad.clone(), w.grad.clone()
    h.grad = w.grad = None
    return found
CALLS = ("mean", False), ("none", False), ("mean", True)
right = [run(*call) for call in CALLS]
(torch.randn(600, 600) @ torch.randn(600, 600)).sum()
child = os.fork()
if child == 0:
    signal.alarm(40)
    found = [run(*call) for call in CALLS]
    same = all(torch.allclose(a, b, atol=1e-6) for r, f in zip(right, found) for a, b in zip(r, f))
    os._exit(0 if same and torch.get_num_threads() == 1 else 3)
status = os.waitpid(child, 0)[1]
assert (status, torch.get_num_threads()) == (0, 2), status
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=240)


class Processor:
    def __init__(self, *isas: str) -> None:
        self.isas = lambda: isas


def multiplied_in(monkeypatch, dtype, *isas):
    """The dtypes of the matmuls of a call."""
    seen = set()

    def watched(name):
        plain = getattr(torch, name)

        def call(*args, **kwargs):
            seen.add(args[-1].dtype)
            return plain(*args, **kwargs)

        return call

    monkeypatch.setattr(_linear_chunks, "_C", Processor(*isas))
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, watched(name))
    leaves = [testing.randn(5, 8, dtype=dtype).requires_grad_(), testing.randn(6, 8, dtype=dtype).requires_grad_()]
    for chunk_size in (2, None):
        loss = mmkern.linear_cross_entropy(*leaves, torch.arange(5), chunk_size=chunk_size)
        grads = torch.autograd.grad(loss, leaves)
        assert [g.dtype for g in grads] == [dtype, dtype]
    monkeypatch.undo()
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wide = torch.autograd.grad(F.cross_entropy(F.linear(*exact), torch.arange(5)), exact)
    for a, e in zip(grads, wide, strict=True):
        assert (a - e).norm() <= 1e-2 * e.norm()
    return seen


@pytest.mark.parametrize(
    ("dtype", "isas", "expected"),
    [
        (torch.bfloat16, ("baseline", "avx2"), torch.float32),
        (torch.bfloat16, ("baseline", "avx2", "avx512"), torch.float32),
        (torch.bfloat16, ("baseline", "avx2", "avx512", "avx512_bf16"), torch.bfloat16),
        (torch.float16, ("baseline", "avx2", "avx512", "avx512_bf16"), torch.float32),
        (torch.float32, ("baseline",), torch.float32),
    ],
)
def test_the_processor_decides_the_dtype_of_the_matmuls(monkeypatch, dtype, isas, expected):
    """torch's bfloat16 matmul is slow where the processor has no dot product for it."""
    assert multiplied_in(monkeypatch, dtype, *isas) == {expected}
