"""Attention's gradients beside torch's, of masks over several blocks, and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BIAS, EACH, KEEP, Case, alone, hold, ours, run, tensors
from backends import DTYPES, Backend
from torch import Tensor

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.testing import accuracy, assert_accurate, randn

LAST = [backend for backend in EACH if backend.values[0].name == "cpu"][-1:]


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


@pytest.mark.parametrize("backend", LAST)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal, padded, dropout"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_over_several_blocks(name: str, causal: bool, backend: Backend) -> None:
    """Reduced to the mask's own shape in float32, whatever the dtype of query."""
    options: dict = {"attn_mask": MASKS[name], "enable_gqa": True}
    if causal:
        options |= {"is_causal": True, "key_lengths": torch.tensor([600, 31]), "dropout_p": 0.1}
    for dtype in (torch.float32, torch.bfloat16):
        hold(backend, alone, Case(*tensors(dtype, q_len=150, k_len=600), options))
    options |= {"attn_mask": MASKS[name].bfloat16()}
    hold(backend, alone, Case(*tensors(torch.bfloat16, q_len=150, k_len=600), options))


@pytest.mark.parametrize("backend", EACH)
def test_a_mask_in_float32_of_bfloat16_queries(backend: Backend, once) -> None:
    hold(backend, once, Case(*tensors(torch.bfloat16), {"attn_mask": BIAS, "enable_gqa": True}))


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


@pytest.mark.parametrize("backend", EACH)
def test_only_what_is_asked_for(backend: Backend) -> None:
    """Each input alone gets the gradient that it gets beside all the others."""
    case = Case(*tensors(), {"enable_gqa": True, "attn_mask": BIAS, "temperature": torch.rand(4), "sinks": randn(4)})
    grads = randn(2, 4, 33, 24, seed=8), torch.zeros(2, 4, 33)
    names = {"q": "query", "k": "key", "v": "value"}
    given = {"query": case.q, "key": case.k, "value": case.v, **case.options}
    given = {name: backend.to(x) for name, x in given.items()}
    for name, want in list(run(ours, case, grads, backend).items())[2:]:
        leaf = given[names.get(name, name)].clone().requires_grad_()
        with backend:
            out = attention(**given | {names.get(name, name): leaf})
            (found,) = torch.autograd.grad(out, leaf, backend.to(grads[0]))
        assert torch.equal(found.cpu(), want), name


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
