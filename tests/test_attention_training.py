"""Attention while training: dropout, determinism, memory, and torch's machinery around backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.reference.philox import keep_mask, philox
from mmkern.testing import assert_accurate, isas, poisoned, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def leaves(*shape: int, dtype: torch.dtype = torch.float32, heads: int = 2) -> list[Tensor]:
    """query (2, heads, q_len, dim), key and value (2, 2, k_len, dim) that require grad; shape: q_len, k_len, dim."""
    q_len, k_len, dim = shape
    sizes = (2, heads, q_len, dim), (2, 2, k_len, dim), (2, 2, k_len, dim)
    return [randn(*size, dtype=dtype, seed=seed).requires_grad_() for seed, size in enumerate(sizes)]


def backward(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, randn(*out.shape, dtype=out.dtype, seed=5))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, words: tuple) -> None:
    """The vectors that its authors publish with Random123."""
    found = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in found) == words


def weights(dropout_p: float, q_len: int = 37, k_len: int = 301) -> Tensor:
    """Attention weights of equal scores times k_len: 0 where dropped, 1 / (1 - dropout_p) where kept."""
    q = torch.zeros(2, 3, q_len, 16)
    k, v = torch.zeros(2, 3, k_len, 16), torch.eye(k_len).expand(2, 3, k_len, k_len)
    torch.manual_seed(11)
    return attention(q, k, v, dropout_p=dropout_p) * k_len


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.75, 1.0])
def test_dropped_elements(dropout_p: float) -> None:
    """Those that the generator says, by every instruction set and number of threads; the rest grow."""
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(seed, dropout_p, (2, 3, 37, 301), torch.device("cpu"))
    assert abs(keep.double().mean().item() - (1 - dropout_p)) < 4 * math.sqrt(0.25 / keep.numel())
    want = keep / (1 - dropout_p) if dropout_p < 1 else torch.zeros(keep.shape)
    threads = torch.get_num_threads()
    try:
        for isa in isas():
            for n in (1, 2, 4):
                torch.set_num_threads(n)
                with mmkern.backend("cpu", isa=isa, strict=True):
                    torch.testing.assert_close(weights(dropout_p), want, rtol=1e-5, atol=0)
    finally:
        torch.set_num_threads(threads)


def test_dropout_follows_the_default_generator() -> None:
    q, k, v = leaves(20, 40, 16)
    torch.manual_seed(1)
    first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(2)
    assert torch.equal(attention(q, k, v, dropout_p=0.5), second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_drops_the_same_again(reentrant: bool) -> None:
    q, k, v = leaves(33, 70, 24)
    found = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out = wrap(lambda *a: attention(*a, dropout_p=0.3, is_causal=True), q, k, v)
        out.backward(randn(*out.shape, seed=5))
        found.append((out, *(t.grad for t in (q, k, v))))
        q.grad = k.grad = v.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


OPTIONS = {
    "plain": {},
    "causal, dropout": {"is_causal": True, "dropout_p": 0.2},
    "bias of the batch": {"attn_mask": randn(1, 4, 150, 600, seed=4)},
    "bias of all": {"attn_mask": randn(150, 600, seed=4), "similarity": "cosine", "temperature": torch.rand(4)},
    "euclidean": {"similarity": "euclidean", "alibi_slopes": torch.rand(4) / 50, "sinks": torch.rand(4)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_deterministic(name: str) -> None:
    """Gradients have the same bits over 50 repeats on 1, 2 and 4 threads, and inputs stay as they were."""
    options = {n: x.clone().requires_grad_() if isinstance(x, Tensor) else x for n, x in OPTIONS[name].items()}
    inputs = [*leaves(150, 600, 24, heads=4), *(x for x in options.values() if isinstance(x, Tensor))]
    kept = [t.detach().clone() for t in inputs]
    found, threads = [], torch.get_num_threads()
    try:
        for i in range(50):
            torch.set_num_threads((1, 2, 4)[i % 3])
            torch.manual_seed(2)
            found.append(backward(attention(*inputs[:3], **options, enable_gqa=True), *inputs))
            assert all(torch.equal(a, b) for a, b in zip(found[-1], found[0], strict=True)), f"run {i}"
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_mates_change_nothing(dtype: torch.dtype) -> None:
    inputs = leaves(150, 600, 24, dtype=dtype)
    together = backward(attention(*inputs, is_causal=True), *inputs)
    first = [t.detach()[:1].requires_grad_() for t in inputs]
    out = attention(*first, is_causal=True)
    alone = torch.autograd.grad(out, first, randn(2, *out.shape[1:], dtype=dtype, seed=5)[:1])
    assert all(torch.equal(a, b[:1]) for a, b in zip(alone, together, strict=True))


def test_saves_the_output_and_one_number_a_row() -> None:
    q, k, v = leaves(64, 512, 32)
    mask = randn(1, 1, 64, 512)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, lse = attention(q, k, v, mask, dropout_p=0.5, return_lse=True)
    beside = sum(t.numel() for t in saved) - sum(t.numel() for t in (q, k, v, mask, out, lse))
    assert beside == 1  # the seed of dropout


def test_a_gradient_for_a_mask_makes_nothing_larger() -> None:
    """No allocation in backward comes near batch x heads x q_len x k_len."""
    q, k, v = leaves(128, 2048, 16)
    for mask in (randn(2048).requires_grad_(), randn(1, 2, 128, 2048).requires_grad_()):
        out = attention(q, k, v, mask)
        with torch.profiler.profile(profile_memory=True) as profile:
            out.sum().backward()
        largest = max(event.self_cpu_memory_usage for event in profile.events())
        assert 0 < largest <= 8 * max(mask.numel(), q.numel(), k.numel())  # sums over batch and heads: in double


def test_what_ran() -> None:
    q, k, v = leaves(5, 6, 8)
    ran = mmkern.explain(lambda: attention(q, k, v, dropout_p=0.1).sum().backward())
    assert [(choice.op, choice.backend) for choice in ran] == [("attention_fwd", "cpu"), ("attention_bwd", "cpu")]


def test_second_derivatives_of_kernels() -> None:
    """float32, by kernels and then one batch entry at a time, against float64 through the formula as a whole."""
    mask, heads = randn(1, 2, 9, 11, seed=3), torch.rand(2) + 0.5
    results = []
    for dtype, name in ((torch.float32, "cpu"), (torch.float64, "reference"), (torch.float32, "reference")):
        given = *leaves(9, 11, 8), mask, heads, heads.log(), heads / 9
        shared = [t.detach().to(dtype).requires_grad_() for t in given]
        torch.manual_seed(1)
        options = dict(zip(("attn_mask", "temperature", "sinks", "alibi_slopes"), shared[3:], strict=True))
        with mmkern.backend(name):
            out, lse = attention(*shared[:3], is_causal=True, dropout_p=0.25, return_lse=True, **options)
            first = torch.autograd.grad(out.square().sum() + lse.sum(), shared, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), shared))
    for found, exact, baseline in zip(*results, strict=True):
        assert_accurate(found, exact, baseline, "gradient")


def test_second_derivative_with_a_bool_mask() -> None:
    q, k, v = leaves(5, 7, 8)
    keep, found = randn(5, 7, seed=3) > -1, []
    for name in ("cpu", "reference"):
        with mmkern.backend(name):
            (grad,) = torch.autograd.grad(attention(q, k, v, keep).square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (q, k, v)))
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_opcheck(dropout_p: float) -> None:
    op, (q, k, v) = torch.ops.mmkern, (t.detach() for t in leaves(5, 7, 8, heads=4))
    seed = torch.tensor([3]) if dropout_p else None
    mask, per_head = randn(1, 4, 5, 7), torch.rand(4)
    rest = (mask, dropout_p, True, 0.5, 1, per_head, -1, -1, 0.0, per_head.expand(2, 4), None, per_head, False, seed)
    torch.library.opcheck(op.attention_fwd.default, (q, k, v, *rest))
    out, lse = op.attention_fwd(q, k, v, *rest)
    strided = q.mT.contiguous().mT  # no unit stride: the gradient is made contiguous
    for bits in (127, 0b1000101):
        for query in (q, strided):
            torch.library.opcheck(op.attention_bwd.default, (out, lse, out, lse, query, k, v, *rest, bits))


def test_compiles_whole() -> None:
    q, k, v = leaves(33, 33, 24)
    bias = randn(2, 33, 33, seed=4).requires_grad_()

    def block(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attention(q * 1.5, k, v, bias, is_causal=True, similarity="cosine", scale=3.0).tanh()

    found = backward(torch.compile(block, fullgraph=True)(q, k, v, bias), q, k, v, bias)
    want = backward(block(q, k, v, bias), q, k, v, bias)
    for actual, expected in zip(found, want, strict=True):
        torch.testing.assert_close(actual, expected)
    dropped = torch.compile(lambda *a: attention(*a, dropout_p=0.5), fullgraph=True)
    torch.manual_seed(1)
    out = dropped(q, k, v)
    first = torch.autograd.grad(out, v, torch.ones_like(out), retain_graph=True)[0].sum((0, 1, 3))
    # Each weight is dropped or doubled: what value receives is what the output was made of.
    torch.testing.assert_close((first * v.detach().new_ones(33)).sum(), _kept_total(out, q, k, v))


def _kept_total(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sum over value's gradient of a sum, found another way: by a value of ones, whose output it must equal."""
    grad = torch.autograd.grad(out, v, torch.ones_like(out))[0]
    return grad.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_behind_a_mask_reaches_no_gradient(dtype: torch.dtype) -> None:
    """In padded keys and values, whatever the similarity and the instruction set; one that is seen reaches its rows."""
    keep = torch.ones(2, 1, 1, 40, dtype=torch.bool)
    keep[..., 30:] = False
    for similarity in ("dot", "cosine", "euclidean", "squared_euclidean"):
        for isa in isas():
            found = []
            for fill in (0.0, math.nan, math.inf):
                q, k, v = (t.detach().clone() for t in leaves(20, 40, 16, dtype=dtype))
                k[:, :, 30:], v[:, :, 30:] = fill, fill
                q, k, v = (t.requires_grad_() for t in (q, k, v))
                with mmkern.backend("cpu", isa=isa, strict=True), poisoned():
                    found.append(backward(attention(q, k, v, keep, similarity=similarity, scale=0.2), q, k, v))
            for clean, nan, inf in zip(*found, strict=True):
                assert torch.equal(clean, nan)
                assert torch.equal(clean, inf)
    q, k, v = (t.detach().clone() for t in leaves(20, 20, 16, dtype=dtype))
    k[0, 0, 12, 3] = math.nan
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    (grad,) = backward(attention(q, k, v, is_causal=True), q)
    hit = torch.zeros(2, 2, 20, dtype=torch.bool)
    hit[0, 0, 12:] = True
    assert grad.isnan().any(-1).eq(hit).all()


def test_autocast() -> None:
    q, k, v = leaves(33, 70, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad(attention(*wide), wide, torch.ones_like(out, dtype=torch.float64))
    for actual, expected in zip(found, exact, strict=True):
        assert actual.dtype == torch.float32
        if expected is exact[2]:
            assert_accurate(actual, expected, kind="gradient", dtype=torch.bfloat16)


def test_inference_tensors() -> None:
    """They go in like others; where a gradient would need one saved, torch's error comes, as from torch's op."""
    q, k, v = leaves(9, 11, 8)
    want = attention(q, k, v)
    with torch.inference_mode():
        inner = [t.clone() for t in (q, k, v)]
        assert torch.equal(attention(*inner), want)
        assert torch.equal(attention(q, k, v), want)
    assert torch.equal(attention(*inner), want)
    for op in (attention, torch.nn.functional.scaled_dot_product_attention):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            op(q, inner[1], inner[2])
