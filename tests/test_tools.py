"""torch's tools around every op, over one table of calls: meta and fake tensors, traces, vmap, edits in place."""

import io
import subprocess
import sys
import warnings
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_calls import CALLS, OpCall, gradients
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import mmkern
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
    "linear_cross_entropy-none": {"hidden", "weight", "target"},
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


def edited(fn, term: str, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """Gradients after mask or bias was written into between forward and backward."""
    mask = randn(5, 7, seed=1)
    mask[0, 2], mask[3, :5] = -torch.inf, -torch.inf
    leaves = {"x": randn(8, 5, 7, seed=3), "mask": mask, "bias": randn(7, seed=2)}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    given = {name: t * 1 for name, t in leaves.items()}
    torch.manual_seed(0)
    out = fn(**given, dropout_p=dropout_p)
    if term:
        given[term].detach().fill_(9.0)
    return torch.autograd.grad(out, list(leaves.values()), randn(8, 5, 7, seed=9))


@pytest.mark.parametrize("term", ["mask", "bias"])
def test_broadcast_terms_of_masked_softmax_may_be_written_into_after_forward(term):
    def formula(x, mask, bias, dropout_p):
        return (x + mask + bias).softmax(-1)

    close(edited(mmkern.masked_softmax, term), edited(formula, term))
    close(edited(mmkern.masked_softmax, term, 0.3), edited(mmkern.masked_softmax, "", 0.3))


@pytest.mark.parametrize("fn", [F.scaled_dot_product_attention, mmkern.scaled_dot_product_attention])
def test_a_mask_of_attention_that_was_written_into_raises_as_in_torch(fn):
    q, mask = randn(1, 1, 3, 4).requires_grad_(), randn(3, 3)
    out = fn(q, q, q, attn_mask=mask)
    mask.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


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
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(module, rest, check_trace=False), file)
        file.seek(0)
        traced = torch.jit.load(file)
        with torch.no_grad():
            for p in (*module.parameters(), *traced.parameters()):
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


def test_flops_are_counted_as_torch_counts_its_own():
    """Forward, and with backward; grouped heads, a value dim of its own; the mode made before the first call."""
    q, k, v = (randn(2, h, n, d).requires_grad_() for h, n, d in ((4, 3, 8), (4, 5, 8), (4, 5, 6)))
    hidden, weight = randn(7, 4).requires_grad_(), randn(9, 4).requires_grad_()
    target = torch.arange(7)
    for call, forward, both in (
        (lambda: mmkern.scaled_dot_product_attention(q, k, v), 2 * 8 * 15 * 14, 2 * 8 * 15 * (14 + 3 * 8 + 2 * 6)),
        (lambda: mmkern.linear_cross_entropy(hidden, weight, target), 2 * 7 * 4 * 9, 3 * 2 * 7 * 4 * 9),
        (lambda: mmkern.linear_cross_entropy(hidden, weight, target, reduction="none"), 504, 504 + 3 * 504),
    ):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            call().sum().backward()
        assert counter.get_total_flops() == both
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(F.linear(hidden, weight), target).backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 4 * 9
    args = (2, 4, 3, 8), (2, 4, 5, 8), (2, 4, 5, 6)
    assert sdpa_flop_count(*args) == 2 * 8 * 15 * 14
    assert sdpa_backward_flop_count((2, 4, 3, 6), *args) == 2 * 8 * 15 * (3 * 8 + 2 * 6)


def test_flop_formulas_reach_a_mode_made_before_the_first_call(tmp_path):
    script = """
import sys, mmkern, torch
assert "torch.utils.flop_counter" not in sys.modules and "torch.distributed.tensor" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.zeros(1, 1, 2, 4)
with FlopCounterMode(display=False) as counter:
    mmkern.scaled_dot_product_attention(q, q, q)
assert counter.get_total_flops() == 2 * 2 * 4 * 2 * 2, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, timeout=240)


@pytest.mark.parametrize("call", [c for c in CALLS if c.name in ("softmax", "log_softmax")], ids=str)
def test_lazily_negated_views_are_read_and_written(call):
    x = torch.complex(randn(3, 4), randn(3, 4, seed=1)).conj().imag
    assert x.is_neg()
    right = call.fn(x.resolve_neg(), 1)
    assert torch.equal(call.fn(x, 1), right)
    for fill in (x, randn(3, 4)):
        base = torch.zeros(3, 4, dtype=torch.complex64)
        out = base.conj().imag
        assert out.is_neg()
        assert call.fn(fill, 1, out=out) is out
        assert torch.equal(out.resolve_neg(), call.fn(fill, 1))
        assert torch.equal(base.imag, -call.fn(fill, 1))


def test_negated_views_reach_every_op():
    for call in CALLS:
        tensors = call.copies(requires_grad=True)
        negated = dict(tensors)
        for name in call.leaves:
            plain = tensors[name].detach()
            negated[name] = torch.complex(plain, -plain).conj().imag.requires_grad_()
            assert negated[name].is_neg()
        out = call.run(negated)
        close((*out, *gradients(call, negated, out)), sum(expected(call), ()))


def test_masks_of_the_other_16_bit_dtype_under_autocast():
    for dtype, other in ((torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)):
        q, mask = randn(1, 2, 4, 8, dtype=dtype), randn(4, 4, dtype=other)
        with torch.autocast("cpu", dtype=dtype):
            found = mmkern.scaled_dot_product_attention(q, q, q, mask)
            weights = mmkern.masked_softmax(q[..., :4], mask, bias=mask)
        assert torch.equal(found, mmkern.scaled_dot_product_attention(q, q, q, mask.float()))
        assert torch.equal(weights, mmkern.masked_softmax(q[..., :4], mask.float(), bias=mask.float()))
        with pytest.raises(TypeError, match="mask"):
            mmkern.masked_softmax(q[..., :4], mask)


def test_positions_and_offsets_of_other_shapes_and_integers():
    q, ids = randn(2, 4, 3, 8), torch.tensor([[5, 1, 2]])
    for positions in (ids, ids.int(), ids[0].int(), ids.expand(2, 3).int()):
        assert torch.equal(mmkern.rotary(q, q, positions)[1], mmkern.rotary(q, None, ids[0]))
    x, table = randn(2, 3, 4), randn(9, 4)
    for encoding in ("sinusoidal", table):
        right = mmkern.add_positional_encoding(x, encoding, offset=2)
        for offset in (torch.tensor(2), torch.tensor([2]), torch.tensor([2, 2], dtype=torch.int32)):
            assert torch.equal(mmkern.add_positional_encoding(x, encoding, offset=offset), right)
        assert torch.equal(mmkern.add_positional_encoding(x[0], encoding, offset=torch.tensor(2)), right[0])


def test_function_modes_and_subclasses_see_the_call():
    class Seeing(torch.Tensor):
        seen: ClassVar[list[Any]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    for call in CALLS:
        tensors = {n: t.as_subclass(Seeing) for n, t in call.copies().items()}
        Seeing.seen.clear()
        out = call.run(tensors)
        assert Seeing.seen[0] is call.fn
        assert all(type(t) is Seeing for t in out)
        close([t.as_subclass(torch.Tensor) for t in out], list(call.run()))
