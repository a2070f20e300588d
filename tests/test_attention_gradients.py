"""Attention's gradients: every kernel against the float64 reference, which finite differences hold to its own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import ALONE, BIAS, DTYPES, KEEP, Case, cases, formula, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.testing import LAYOUTS, accuracy, assert_accurate, isas, poisoned, randn

# Sums over all rows and keys that largely cancel: rounding a bfloat16 output alone can cost 1% of what is left, and
# how far torch's float32 sum is off is luck. One of the two limits of the rule must hold.
TOTALS = ("temperature", "alibi_slopes", "sinks")


def ours(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, **options, return_lse=True)


def gradients(op: Callable, case: Case, grad_out: Tensor, grad_lse: Tensor) -> dict[str, Tensor]:
    """Gradients of q, k, v and every float option, the same elements dropped each time."""
    leaves = {"q": case.q, "k": case.k, "v": case.v}
    leaves |= {n: x for n, x in case.options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}
    options = {n: leaves.get(n, x) for n, x in case.options.items()}
    torch.manual_seed(7)
    out, lse = op(leaves["q"], leaves["k"], leaves["v"], options)
    grads = grad_out.to(out.dtype), grad_lse.to(lse.dtype)
    found = torch.autograd.grad((out, lse), list(leaves.values()), grads)
    return dict(zip(leaves, found, strict=True))


def check(case: Case, which: tuple[str, ...] = (), layout: str = "contiguous") -> None:
    """Every instruction set (or `which`) against the reference in float64; torch's ops in float32 are the yardstick."""
    dtype, shape = case.q.dtype, (*case.q.shape[:-1], case.v.shape[-1])
    grads = randn(*shape, dtype=dtype, seed=8, layout=layout), randn(*shape[:-1], seed=9)
    exact = gradients(ours, case.cast(torch.float64), *grads)
    baseline = gradients(formula, case.cast(torch.float32), *grads)
    for isa in which or isas():
        with mmkern.backend("cpu", isa=isa, strict=True), poisoned():
            found = gradients(ours, case, *grads)
        for name, gradient in found.items():
            result = accuracy(gradient, exact[name], baseline[name].to(dtype), "gradient", dtype)
            near, average = result.max_error <= result.bound, result.relative_l2 <= result.limit
            good = (near or average) if name in TOTALS else near and average
            assert good, f"{name} on {isa}: {result}"
            assert result.same_nonfinite, f"{name} on {isa}: {result}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str, dtype: torch.dtype) -> None:
    check(Case(*tensors(dtype), {"enable_gqa": True, **ALONE[name]}))


MASK = randn(2, 4, 150, 600, seed=4)  # several blocks of rows and of keys
MASKS = {
    "its own for all": MASK,
    "one for the batch": MASK[:1],
    "one for the heads": MASK[:, :1],
    "one for all": MASK[0, 0],
    "of keys": MASK[:, :, :1],
    "of keys, one for the batch": MASK[:1, :, :1],
    "of queries": MASK[:, :, :, :1],
    "of heads": MASK[:1, :, :1, :1],
    "a number": MASK[:1, :1, :1, :1],
}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal, padded, dropout"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_shape(name: str, causal: bool) -> None:
    """Reduced to the mask's own shape in float32, whatever the dtype of query."""
    options: dict = {"attn_mask": MASKS[name], "enable_gqa": True}
    if causal:
        options |= {"is_causal": True, "key_lengths": torch.tensor([600, 31]), "dropout_p": 0.1}
    for dtype in (torch.float32, torch.bfloat16):
        check(Case(*tensors(dtype, q_len=150, k_len=600), options), isas()[-1:])
    mask = MASKS[name].bfloat16()
    check(Case(*tensors(torch.bfloat16, q_len=150, k_len=600), options | {"attn_mask": mask}), isas()[-1:])


@st.composite
def calls(draw: st.DrawFn) -> tuple[Case, str]:
    case, isa = draw(cases())
    assume(case.k.shape[-2] != 1)  # see test_single_key
    if draw(st.booleans()):
        case.options["dropout_p"] = draw(st.sampled_from((0.1, 0.5, 0.9)))
    return case, isa or "baseline"


@settings(max_examples=100, derandomize=True, deadline=None)
@given(calls(), st.sampled_from(LAYOUTS))
def test_combined(drawn: tuple[Case, str], layout: str) -> None:
    case, isa = drawn
    check(case, (isa,), layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 300, 300, 64), (1, 2, 1, 700, 128), (3, 2, 49, 49, 32)], ids=str)
def test_as_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Plain and causal attention against torch's own backward, with the gradient of a sum: of stride 0."""
    batch, heads, q_len, k_len, dim = shape
    sizes = [(batch, heads, q_len, dim), (batch, heads, k_len, dim), (batch, heads, k_len, dim)]
    for causal in (False, True)[: 2 if q_len == k_len else 1]:
        q, k, v = (randn(*s, dtype=dtype, seed=i, layout="transposed").requires_grad_() for i, s in enumerate(sizes))
        found = torch.autograd.grad(attention(q, k, v, is_causal=causal).sum(), (q, k, v))
        theirs = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum(), (q, k, v))
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        exact = torch.autograd.grad(F.scaled_dot_product_attention(*wide, is_causal=causal).sum(), wide)
        # The gradient of one sum cancels in q and k: what is exactly 0 there is rounding on both sides.
        for name, mine, wanted, base in zip("qkv", found, exact, theirs, strict=True):
            result = accuracy(mine, wanted, base, "gradient")
            assert result.ok if name == "v" else result.max_error <= result.bound, f"{name}: {result}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_key(dtype: torch.dtype) -> None:
    """One weight, always 1: q and k get a gradient of 0, or the rounding that torch's kernel leaves too."""
    q, k, v = (randn(2, 3, n, 40, dtype=dtype, seed=n).requires_grad_() for n in (33, 1, 1))
    grad_out = randn(2, 3, 33, 40, dtype=dtype, seed=8)
    found, theirs = (
        torch.autograd.grad(op(q, k, v), (q, k, v), grad_out) for op in (attention, F.scaled_dot_product_attention)
    )
    for mine, their in zip(found[:2], theirs[:2], strict=True):
        assert mine.abs().max() <= 3 * their.abs().max() + 4 * torch.finfo(torch.float32).eps * 40
    assert_accurate(found[2], grad_out.double().sum(2, keepdim=True), theirs[2], "gradient")


def test_only_what_is_asked_for() -> None:
    """Each input alone gets the gradient that it gets beside all the others."""
    case = Case(*tensors(), {"enable_gqa": True, "attn_mask": BIAS, "temperature": torch.rand(4), "sinks": randn(4)})
    grads = randn(2, 4, 33, 24, seed=8), torch.zeros(2, 4, 33)
    names = {"q": "query", "k": "key", "v": "value"}
    for name, want in gradients(ours, case, *grads).items():
        given = {"query": case.q, "key": case.k, "value": case.v, **case.options}
        leaf = given[names.get(name, name)].clone().requires_grad_()
        out = attention(**given | {names.get(name, name): leaf})
        assert torch.equal(torch.autograd.grad(out, leaf, grads[0])[0], want), name


SMALL = {
    "plain": {},
    "causal, float mask with holes": {"attn_mask": BIAS[:, :2, :3, :4].masked_fill(~KEEP[:, :2, :3, :4], -math.inf)},
    "cosine": {"similarity": "cosine", "temperature": torch.tensor([2.0, -3.0])},
    "euclidean": {"similarity": "euclidean", "window": (2, 1)},
    "squared_euclidean": {"similarity": "squared_euclidean", "key_lengths": torch.tensor([0, 3])},
    "the rest": {"softcap": 1.5, "is_causal": True, "alibi_slopes": randn(2).abs(), "sinks": randn(2, seed=9)},
}


@pytest.mark.parametrize("name", SMALL)
def test_finite_differences(name: str) -> None:
    small = tensors(heads=2, kv_heads=1, q_len=3, k_len=4, dim=2, v_dim=2)
    case = Case(*small, {"enable_gqa": True, **SMALL[name]}).cast(torch.float64)
    names = [n for n, x in case.options.items() if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = [x.requires_grad_() for x in (case.q, case.k, case.v, *(case.options[n] for n in names))]

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        options = {**case.options, **dict(zip(names, rest, strict=True)), "return_lse": True}
        out, lse = mmkern.scaled_dot_product_attention(q, k, v, **options)
        return out, lse.clamp_min(-1e9)  # finite differences cannot subtract infinities

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(lambda *x: call(*x)[0], leaves)
