"""torch's tools around every op, over one table of calls: meta and fake tensors, traces, vmap, edits in place."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from op_calls import CALLS, OpCall, gradients
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmkern.testing import randn

EVERY = pytest.mark.parametrize("call", CALLS, ids=str)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def expected(call: OpCall) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    tensors = call.copies(requires_grad=True)
    out = call.run(tensors)
    return out, gradients(call, tensors, out)


@EVERY
def test_meta_tensors_have_the_shapes_forward_and_backward(call):
    tensors = {n: t.detach().to("meta").requires_grad_(t.requires_grad) for n, t in call.copies(True).items()}
    out = call.run(tensors)
    found = (*out, *gradients(call, tensors, out))
    for t, e in zip(found, sum(expected(call), ()), strict=True):
        assert (t.device.type, t.shape, t.dtype, t.stride()) == ("meta", e.shape, e.dtype, e.stride())


@EVERY
def test_fake_tensors_go_forward_and_backward(call):
    mode, copies = FakeTensorMode(), call.copies(requires_grad=True)
    tensors = {n: mode.from_tensor(t) for n, t in copies.items()}
    out = call.run(tensors)
    with mode:
        upstream = [torch.randn_like(t) for t in out]
    found = (*out, *torch.autograd.grad(out, [tensors[n] for n in call.leaves], upstream))
    for t, e in zip(found, sum(expected(call), ()), strict=True):
        assert (t.shape, t.dtype) == (e.shape, e.dtype)


@EVERY
@pytest.mark.parametrize("retain", [False, True])
def test_batched_gradients_are_those_of_each_in_turn(call, retain):
    tensors = call.copies(requires_grad=True)
    leaves = [tensors[n] for n in call.leaves]
    out = call.run(tensors)
    several = [randn(3, *t.shape, seed=i).to(t) for i, t in enumerate(out)]
    found = torch.autograd.grad(out, leaves, several, is_grads_batched=True, retain_graph=retain)
    for i in range(3):
        one = torch.autograd.grad(call.run(tensors), leaves, [g[i] for g in several])
        close([t[i] for t in found], list(one))
    if retain:
        pulled = torch.func.vmap(lambda *g: torch.autograd.grad(out, leaves, g, retain_graph=True))(*several)
        close(pulled, found)


@EVERY
def test_vmap_over_each_tensor_and_over_all(call):
    """Over one argument, the others as they are, and over all of them at once."""
    names = list(call.tensors)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return call.run(dict(zip(names, tensors, strict=True)))

    first = tuple(call.tensors.values())
    second = tuple(t.flip(0) if t.dtype == torch.int64 else t * 0.5 if t.is_floating_point() else ~t for t in first)
    for over in [*range(len(names)), None]:
        dims = tuple(0 if over in (None, i) else None for i in range(len(names)))
        given = [torch.stack(p) if d == 0 else p[0] for p, d in zip(zip(first, second, strict=True), dims, strict=True)]
        found = torch.func.vmap(run, dims)(*given)
        for i in range(2):
            close(
                [t[i] for t in found], list(run(*(t if d is None else t[i] for t, d in zip(given, dims, strict=True))))
            )


# What torch's own formula reads again in backward, so that it raises there, too; and what a kernel needs.
READ_AGAIN = {
    "attention": {"query", "key", "value"},
    "attention-all": {"query", "key", "value", "attn_mask", "temperature", "alibi_slopes", "sinks", "key_lengths"},
    "masked_softmax": {"mask", "bias"},
    "cross_entropy-none": {"target"},
    "linear_cross_entropy-none": {"hidden", "weight", "target", "bias"},
    "embed_tokens": {"tokens"},
}


@EVERY
def test_what_backward_does_not_read_may_be_written_into_after_forward(call):
    right = expected(call)[1]
    for name in call.tensors:
        tensors = call.copies(requires_grad=True)
        out = call.run(tensors)
        with torch.no_grad():
            tensors[name].zero_()
        if name in READ_AGAIN.get(call.name, ()):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(call, tensors, out)
        else:
            close(gradients(call, tensors, out), right)


@EVERY
def test_inference_tensors_are_taken_where_backward_does_not_read_them(call):
    right = dict(zip(call.leaves, expected(call)[1], strict=True))
    for name in set(call.tensors) - READ_AGAIN.get(call.name, set()):
        tensors = call.copies(requires_grad=True)
        with torch.inference_mode():
            tensors[name] = call.tensors[name].clone()
        leaves = [n for n in call.leaves if n != name]
        if leaves:
            out = call.run(tensors)
            upstream = [randn(*t.shape, seed=30).to(t) for t in out]
            found = torch.autograd.grad(out, [tensors[n] for n in leaves], upstream)
            close(list(found), [right[n] for n in leaves])


class Module(torch.nn.Module):
    """A call whose leaves are parameters."""

    def __init__(self, call: OpCall) -> None:
        super().__init__()
        self.call = call
        for name in call.leaves:
            setattr(self, f"{name}_", torch.nn.Parameter(call.tensors[name].clone()))

    def forward(self, *rest: Tensor) -> tuple[Tensor, ...]:
        given = iter(rest)
        names = self.call.tensors
        tensors = {n: getattr(self, f"{n}_") if n in self.call.leaves else next(given) for n in names}
        return self.call.run(tensors)

    def rest(self) -> tuple[Tensor, ...]:
        return tuple(t for n, t in self.call.tensors.items() if n not in self.call.leaves)


def module_gradients(module: Any, rest: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = module(*rest)
    loss = sum((t * randn(*t.shape, seed=30)).sum() for t in out)
    return (*(t.detach() for t in out), *torch.autograd.grad(loss, list(module.parameters())))


@EVERY
def test_jit_trace_with_trainable_parameters(call):
    module = Module(call)
    rest = module.rest()
    before = module(*rest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that jit is deprecated and that shapes are taken for constants
        traced = torch.jit.trace(module, rest, check_trace=False)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.25)  # the trace holds the parameters, not their values
        close(module_gradients(traced, rest), module_gradients(module, rest))
    assert not torch.equal(before[0], traced(*rest)[0])


@EVERY
def test_fx_records_the_call_and_plays_it_again(call):
    names = ", ".join(call.tensors)
    options = {**call.options, **call.numbers}
    given = ", ".join(f"{name}={name}" for name in call.tensors)
    traced = torch.fx.symbolic_trace(
        eval(f"lambda {names}: call({given}, **options)", {"call": call.fn, "options": options})
    )
    assert [n.target for n in traced.graph.nodes if n.op == "call_function"] == [call.fn]
    tensors = call.copies(requires_grad=True)
    out = traced(**tensors)
    close(
        (*call.run(tensors), *gradients(call, tensors, out if isinstance(out, tuple) else (out,))),
        sum(expected(call), ()),
    )


NUMBERS = [pytest.param(call, name, id=f"{call}-{name}") for call in CALLS for name in call.numbers]


@pytest.mark.parametrize(("call", "name"), NUMBERS)
def test_numbers_of_numpy_and_in_tensors(call, name):
    value = call.numbers[name]
    right = call.run()
    kinds = [
        torch.tensor(value),
        np.float32(value) if isinstance(value, float) else np.int32(value),
        np.array(value)[()],
    ]
    for kind in kinds:
        close(call.run(**{name: kind}), right)
    if isinstance(value, float) and name != "temperature":  # which may be learned
        with pytest.raises(TypeError, match=rf"{name}.*requires grad"):
            call.run(**{name: torch.tensor(value, requires_grad=True)})
    for wrong in ("1", torch.tensor([1.0, 2.0, 3.0]), True, 1j):
        with pytest.raises((TypeError, ValueError), match=name):
            call.run(**{name: wrong})


LAYOUTS = {
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(-1, t.shape[-1]).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY
def test_other_layouts_are_refused_by_name(call, layout, dtype):
    wide = {n: t.to(dtype) if t.is_floating_point() else t for n, t in call.tensors.items()}
    for name, t in wide.items():
        if t.dim() < 2 and layout in ("csr", "nested", "jagged"):
            continue
        if layout in ("mkldnn", "quantized") and t.dtype != torch.float32:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, that these layouts are experimental
            other = LAYOUTS[layout](t)
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
            call.run({**wide, name: other})
