"""What an Op is told once, its names and its kernels, and that everything reads it there."""

import re
from importlib.util import find_spec
from inspect import Parameter, signature

import pytest
import torch
from op_calls import CALLS, OpCall
from operator_calls import OPS, drawn

import mmkern
from mmkern.ops import _backends
from mmkern.ops.dispatch import CPU, CUDA, TRITON, Op
from mmkern.reference.attention import DIFFERENTIABLE as OF_ATTENTION
from mmkern.reference.gradients import bits, formula_gradients, in_order, of_bits, record
from mmkern.reference.linear_loss import DIFFERENTIABLE as OF_LINEAR
from mmkern.reference.loss import IN_FORWARD
from mmkern.reference.softmax import DIFFERENTIABLE as OF_SOFTMAX
from mmkern.testing import randn

BITS = {
    "attention_bwd": OF_ATTENTION,
    "masked_softmax_bwd": OF_SOFTMAX,
    "cross_entropy_fwd": IN_FORWARD,
    "linear_cross_entropy_fwd": OF_LINEAR,
    "linear_cross_entropy_bwd": OF_LINEAR,
}


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_an_argument_has_one_name_in_schema_reference_and_launcher(op: Op) -> None:
    fields = list(op.record._fields)
    parameters = signature(op.reference).parameters.values()
    named = [p.name for p in parameters if p.kind is not Parameter.VAR_POSITIONAL]
    if len(named) < len(parameters):  # the rest goes on to another formula
        assert op.name == "attention_bwd"
        named += [*record(mmkern.reference.attention)._fields, "wanted"]
    assert named == fields
    if find_spec("triton"):
        parameters = signature(op.kernels.launcher("triton")).parameters.values()
        named = [p.name for p in parameters if p.kind is not Parameter.VAR_POSITIONAL]
        assert named == fields[: len(named)]
    assert set(BITS.get(op.name, ())) <= set(fields)
    assert ("wanted" in fields) == (op.name in BITS)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_public_argument_keeps_its_name(call: OpCall) -> None:
    """Those that tensors are given by; `encoding` and `offset` are a table and offsets where they are tensors."""
    split = {"encoding": "table", "offset": "offsets"}
    names = {split.get(name, name) for name in call.tensors}
    ops = {choice.op for choice in mmkern.explain(call.run)}
    for name in ops:
        assert names & set(OPS[name].record._fields) == names, name


def test_errors_of_an_operator_name_its_arguments() -> None:
    """Of C++ and of formulas, for calls past our checks."""
    errors = []
    for number in range(20 * len(OPS)):
        name, args, _ = drawn(31_000_000 * len(OPS) + number)
        try:
            getattr(torch.ops.mmkern, name)(*args)
        except ValueError as error:
            errors.append((name, str(error)))
        except (TypeError, IndexError, RuntimeError, AttributeError):  # torch's own, or a formula's for a sparse tensor
            continue
    assert len(errors) > 5 * len(OPS)
    assert {op: error[:2] for op, error in errors if op.startswith("masked") and error[:2] in ("x:", "in")} == {
        "masked_softmax_fwd": "x:", "masked_softmax_bwd": "x:"
    }  # fmt: skip
    for name, error in errors:
        named = re.match(r"[\w, ]+(?=: )", error)
        assert set(named[0].split(", ") if named else [error]) <= set(OPS[name].record._fields), (name, error)


def test_bits_are_made_and_read_in_one_order() -> None:
    names = ("q", "k", "v")
    for wanted in (set(), {"q"}, {"v", "k"}, {"q", "k", "v"}, {"other", "v"}):
        assert of_bits(names, bits(names, wanted)) == [name for name in names if name in wanted]
    assert bits(names, {"q", "v"}) == 0b101
    found = in_order(names, {"v": torch.ones(2), "q": torch.zeros(1)}, torch.empty(3))
    assert [len(t) for t in found] == [1, 0, 2]


def test_gradients_of_a_formula_come_by_name() -> None:
    def formula(a, times, b):
        return a * times, (a * b).sum()

    a, b = randn(3), randn(3, seed=1)
    args = record(formula)(a, 2.0, b)
    found = formula_gradients(formula, [None, torch.tensor(3.0)], args, {"b", "a"})
    assert set(found) == {"a", "b"}
    torch.testing.assert_close(found["a"], 3 * b)
    torch.testing.assert_close(found["b"], 3 * a)
    assert set(formula_gradients(formula, [a, None], args, ["b"])) == {"b"}


def test_a_gradient_of_a_name_that_the_schema_has_not_is_an_error() -> None:
    op = Op(
        "test_misnamed(Tensor a) -> Tensor",
        reference=lambda a: a * 2,
        fake=torch.empty_like,
        kernels=[_backends.Kernel(CPU)],
        backward=lambda grads, args, outputs, wanted: {"b": grads[0]},
    )
    with pytest.raises(KeyError, match="b"):
        op(randn(2).requires_grad_()).sum().backward()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CPU tensors in the place of CUDA ones, both kernels of softmax replaced; the names of those that ran."""
    ran: list[str] = []

    def stand_in(name: str):
        return lambda x, dim: ran.append(name) or torch.softmax(x, dim)

    for backend, device in ((CPU, "cuda"), (CUDA, "cpu"), (TRITON, "cpu")):
        monkeypatch.setattr(backend, "device", device)
        monkeypatch.setattr(backend, "missing", lambda: None)
    monkeypatch.setattr(_backends, "_capability", lambda device: (9, 0))
    op = OPS["softmax_fwd"]
    stood_in = {name: stand_in(name) for name in ("cuda", "triton", "reference")}
    monkeypatch.setattr(op.kernels, "launchers", stood_in)
    monkeypatch.setattr(op, "reference", stood_in["reference"])
    monkeypatch.setattr(op, "_cpu_always", False)
    monkeypatch.setattr(op, "_dispatch", as_of_cuda)
    return ran


def as_of_cuda(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The operator as a graph or a caller's hand reaches it, where torch's dispatcher finds CUDA tensors."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return torch.ops.mmkern.softmax_fwd.default.redispatch(keys, x, dim)


HOPPER, AMPERE = {"softmax_fwd": ((9, 0),)}, {"softmax_fwd": ((8, 0), (8, 6))}


@pytest.mark.parametrize(
    ("measured", "forced", "dtype", "backend"),
    [
        ({}, None, torch.float32, "triton"),
        (HOPPER, None, torch.float32, "cuda"),
        (AMPERE, None, torch.float32, "triton"),
        ({"softmax_bwd": ((9, 0),)}, None, torch.float32, "triton"),
        ({}, "cuda", torch.float32, "cuda"),
        (HOPPER, "triton", torch.float32, "triton"),
        (HOPPER, "reference", torch.float32, "reference"),
        (HOPPER, None, torch.float64, "reference"),
    ],
)
def test_a_call_a_graph_and_explain_agree_on_a_gpu(gpu, monkeypatch, measured, forced, dtype, backend) -> None:
    """Of two kernels for a device CUDA C++ goes first where it was measured; the operator called by hand chooses so."""
    monkeypatch.setattr(_backends, "MEASURED", measured)
    x, op = randn(2, 3).to(dtype), OPS["softmax_fwd"]

    def everywhere() -> list[mmkern.Choice]:
        told = mmkern.explain(mmkern.softmax, x, 1)
        mmkern.softmax(x, 1)
        as_of_cuda(x, 1)
        op.direct(x, 1)
        return told

    if forced is None:
        (choice,) = everywhere()
    else:
        with mmkern.backend(forced, strict=True):
            (choice,) = everywhere()
    assert choice.backend == backend
    assert gpu == [backend] * 4
    if backend == "triton" and forced is None:
        assert choice.refused["cuda"] == "not yet measured on this GPU; backend('cuda') forces it"
    if backend == "cuda" and forced is None:
        assert choice.refused["triton"] == "cuda goes first"


def test_strict_holds_for_an_operator_called_by_hand(gpu) -> None:
    with mmkern.backend("cuda", strict=True), pytest.raises(RuntimeError, match=r"'cuda' refused: .*float64"):
        as_of_cuda(randn(2, 3).double(), 1)
    assert gpu == []


def test_a_tensor_that_a_transform_left_is_a_constant() -> None:
    """As to torch's op: what it wraps requires no gradient."""
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(torch.ones(2, 3))
    assert left[0].requires_grad
    other = randn(2, 3).requires_grad_()
    for softmax in (torch.softmax, mmkern.softmax):
        assert not softmax(left[0], 1).requires_grad
        assert softmax(left[0] + other, 1).requires_grad


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dropout_of_everything(backend: str) -> None:
    """Backends agree on what becomes of a NaN: weights of a softmax are 0, what is multiplied by 0 stays NaN."""
    x = randn(2, 4)
    x[0, 1] = torch.nan
    with mmkern.backend(backend, strict=True):
        assert not mmkern.masked_softmax(x, dropout_p=1.0).any()
        placed = mmkern.add_positional_encoding(x, dropout_p=1.0)
        attended = mmkern.scaled_dot_product_attention(x[None], randn(1, 3, 4), randn(1, 3, 5), dropout_p=1.0)
    assert placed.isnan().nonzero().tolist() == [[0, 1]]
    assert not placed.nan_to_num().any()
    assert attended[0].isnan().all(-1).tolist() == [True, False]
    assert not attended.nan_to_num().any()


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_a_meta_tensor_gets_shapes_whatever_is_in_force(backend: str) -> None:
    """Also where Triton's interpreter takes tensors of any device."""
    x = torch.empty(2, 3, device="meta")
    with mmkern.backend(backend):
        out = mmkern.softmax(x, 1)
    assert (out.shape, out.device.type) == (x.shape, "meta")
