"""Compiled and exported calls of every op: shapes and numbers that change, explaining and forcing what runs."""

from typing import Any

import pytest
import torch
from op_calls import CALLS, OpCall, gradients
from torch import Tensor

import mmkern
from mmkern import _C
from mmkern.testing import randn

EVERY = pytest.mark.parametrize("call", CALLS, ids=str)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def compiled(call: OpCall, **options: Any) -> Any:
    return torch.compile(call.run, fullgraph=True, **options)


@EVERY
def test_shapes_that_change(call):
    """Without compiling again, forward and backward."""
    run = compiled(call, dynamic=True, backend="aot_eager")
    for i, tensors in enumerate((call.copies(True), call.larger(True))):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            found = run(tensors)
        close(list(found), list(call.run(tensors)))
        close(gradients(call, tensors, found), gradients(call, tensors, call.run(tensors)))


def other(name: str, value: float, i: int) -> float:
    """Another right value of a number."""
    if name == "dim":
        return -i
    if name == "rotary_dim":
        return 2 + 2 * (i % 2)
    if name in ("padding_idx", "ignore_index", "offset", "chunk_size"):
        return value + 2 * i if name != "ignore_index" else i
    return value * (1 - 0.25 * i)


@EVERY
def test_numbers_that_change(call):
    run = compiled(call, backend="aot_eager")
    with torch.no_grad():
        for i in range(3):
            numbers = {name: other(name, value, i) for name, value in call.numbers.items()}
            close(run(call.tensors, **numbers), call.run(**numbers))


class Exported(torch.nn.Module):
    def __init__(self, call: OpCall) -> None:
        super().__init__()
        self.call = call

    def forward(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self.call.run(tensors)


@EVERY
@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
def test_export_with_a_dynamic_batch(call, strict):
    batch = torch.export.Dim("batch", min=2)
    shapes = {name: {0: batch} if call.is_batched(name) else None for name in call.tensors}
    if call.name.startswith(("cross", "linear")):
        shapes = {n: s and {0: torch.export.Dim.DYNAMIC} for n, s in shapes.items()}
    program = torch.export.export(Exported(call), (call.copies(),), dynamic_shapes=(shapes,), strict=strict)
    tensors = call.larger()
    close(program.module()(tensors), call.run(tensors))
    leaves = call.larger(requires_grad=True)
    if not strict:  # the strict one is of a call without gradients
        close(gradients(call, leaves, program.module()(leaves)), gradients(call, leaves, call.run(leaves)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_explain_and_force_reach_a_compiled_function_at_each_call(backend):
    x = randn(3, 5).requires_grad_()
    run = torch.compile(lambda t: mmkern.softmax(t * 2, 1) + 1, fullgraph=True, backend=backend)
    close(run(x), (x * 2).softmax(1) + 1)
    for _ in range(2):
        (choice,) = mmkern.explain(run, x)
        assert (choice.op, choice.backend, choice.detail) == ("softmax_fwd", "cpu", _C.isa())
        forward, backward = mmkern.explain(lambda: run(x).sum().backward())
        assert (forward.op, backward.op) == ("softmax_fwd", "softmax_bwd")
    for _ in range(2):
        with mmkern.backend("reference"):
            assert [c.backend for c in mmkern.explain(run, x)] == ["reference"]
        with mmkern.backend("triton", strict=True), pytest.raises(RuntimeError, match="'triton' refused"):
            run(x.double())
        with mmkern.backend("cpu", strict=True), pytest.raises(RuntimeError, match=r"'cpu' refused: .*float64"):
            run(x.double())
    assert mmkern.explain(run, x.double())[0].backend == "reference"
    close(run(x.double()), (x.double() * 2).softmax(1) + 1)


@EVERY
def test_explain_of_a_compiled_function_lists_what_the_call_itself_does(call):
    run = compiled(call, backend="aot_eager")
    tensors = call.copies()
    plain = [(c.op, c.backend) for c in mmkern.explain(call.run, tensors)]
    for _ in range(2):
        assert [(c.op, c.backend) for c in mmkern.explain(run, tensors)] == plain
    tensors = call.copies(requires_grad=True)
    with mmkern.backend("reference"):
        out = run(tensors)
        close(gradients(call, tensors, out), gradients(call, tensors, call.run(tensors)))


def test_exported_and_traced_programs_are_explained_and_forced_when_they_run():
    x = randn(3, 5)
    exported = torch.export.export(Exported(CALLS[2]), (CALLS[2].copies(),)).module()
    assert [c.backend for c in mmkern.explain(exported, CALLS[2].copies())] == ["cpu"]
    traced = torch.jit.trace(lambda t: mmkern.softmax(t, 1), x)
    with mmkern.backend("reference"):
        assert [c.backend for c in mmkern.explain(traced, x)] == ["reference"]
    with mmkern.backend("cpu", strict=True), pytest.raises(RuntimeError, match=r"refused: .*float64"):
        traced(x.double())
