"""Triton's attention kernels, forward and every gradient, by the rule that the CPU's are held to.

On a GPU if there is one, else in Triton's interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from attention_cases import ALONE, Case, cases, formula, tensors
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.reference.philox import keep_mask
from mmkern.testing import LAYOUTS, accuracy, assert_accurate, poisoned, randn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOTALS = ("temperature", "alibi_slopes", "sinks")  # sums that cancel: see test_attention_gradients
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflow that is meant


@contextmanager
def triton() -> Iterator[None]:
    """The Triton kernels or an error; dropout seeds from the CPU's generator, as for the reference beside them."""
    draw = torch.randint

    def randint(*args: object, device: object = None, **kwargs: object) -> Tensor:
        return draw(*args, **kwargs).to(DEVICE)

    with mmkern.backend("triton", strict=True), mock.patch("torch.randint", randint), poisoned():
        yield


def to(x: object, device: str) -> object:
    """`x` on the device with its strides, which `.to` keeps only of dense tensors."""
    if not isinstance(x, Tensor) or x.device.type == device:
        return x
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    storage = x.as_strided((extent,), (1,), x.storage_offset()).to(device)
    return storage.as_strided(x.shape, x.stride(), 0)


def ours(q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, **options, return_lse=True)


def run(op, case: Case, grads: tuple[Tensor, Tensor] | None, device: str = "cpu") -> dict[str, Tensor]:
    """Output, log-sum-exp and, given theirs, the gradients of q, k, v and of every float option."""
    leaves = {"q": case.q, "k": case.k, "v": case.v}
    leaves |= {n: x for n, x in case.options.items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = {n: to(x.detach(), device).requires_grad_(grads is not None) for n, x in leaves.items()}
    options = {n: leaves.get(n, to(x, device)) for n, x in case.options.items()}
    torch.manual_seed(7)
    out, lse = op(leaves["q"], leaves["k"], leaves["v"], options)
    found = {"out": out, "lse": lse}
    if grads is not None:
        of_out, of_lse = (to(g, device).to(t.dtype) for g, t in zip(grads, (out, lse), strict=True))
        found |= zip(leaves, torch.autograd.grad((out, lse), list(leaves.values()), (of_out, of_lse)), strict=True)
    return {name: t.detach().cpu() for name, t in found.items()}


def check(case: Case, gradients: bool = True, layout: str = "contiguous") -> None:
    dtype, shape = case.q.dtype, (*case.q.shape[:-1], case.v.shape[-1])
    grads = (randn(*shape, dtype=dtype, seed=8, layout=layout), randn(*shape[:-1], seed=9)) if gradients else None
    with mmkern.backend("reference"):
        exact = run(ours, case.cast(torch.float64), grads)
    baseline = run(formula, case.cast(torch.float32), grads)
    with triton():
        found = run(ours, case, grads, DEVICE)
    for name, actual in found.items():
        kind = "forward" if name in ("out", "lse") else "gradient"
        expected = torch.float32 if name == "lse" else case.options[name].dtype if name in case.options else dtype
        assert actual.dtype == expected, name
        rule = torch.float32 if name == "lse" else dtype
        result = accuracy(actual, exact[name], baseline[name].to(rule), kind, rule)
        near = result.max_error <= result.bound
        # A gradient that is 0 but for float64's rounding has no relative error.
        average = result.relative_l2 <= result.limit or exact[name].norm() < 1e-12
        good = (near or average) if name in TOTALS else near and average
        assert good, f"{name}: {result}"
        assert result.same_nonfinite, f"{name}: {result}"


# In the interpreter a dtype each: what they share is the source, and the shapes below have all of them.
EACH = [(n, d) for i, n in enumerate(ALONE) for d in (DTYPES if DEVICE == "cuda" else (DTYPES[i % 3],))]


@pytest.mark.parametrize(("name", "dtype"), EACH, ids=str)
def test_alone(name: str, dtype: torch.dtype) -> None:
    check(Case(*tensors(dtype), {"enable_gqa": True, **ALONE[name]}))


# batch, heads, kv_heads, q_len, k_len, head_dim, value_dim
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 5, 7, 8, 8),
    (1, 2, 2, 6, 130, 3, 5),
    (1, 2, 1, 48, 257, 72, 72),
    (1, 4, 2, 63, 65, 16, 40),
    (1, 1, 1, 130, 70, 80, 1),
    (1, 1, 1, 70, 70, 20, 129),
    (1, 1, 1, 7, 37, 256, 256),
    (1, 1, 1, 17, 33, 520, 16),
    (5, 1, 1, 2, 2, 160, 20),
    (1, 8, 2, 1, 1200, 64, 64),
    (1, 2, 2, 3, 600, 128, 128),
    (2, 3, 3, 0, 5, 8, 8),
    (2, 3, 3, 5, 0, 8, 8),
    (0, 3, 3, 5, 6, 8, 8),
    (2, 0, 0, 5, 6, 8, 8),
    (1, 2, 2, 5, 6, 0, 8),
    (1, 2, 2, 5, 6, 8, 0),
]


def qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> list[Tensor]:
    batch, heads, kv_heads, q_len, k_len, dim, v_dim = shape
    sizes = ((batch, heads, q_len, dim), (batch, kv_heads, k_len, dim), (batch, kv_heads, k_len, v_dim))
    return [randn(*size, dtype=dtype, layout=layout, seed=seed) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], causal: bool) -> None:
    dtype = torch.bfloat16 if causal and shape[4] > 1 else torch.float32  # one key: gradients are rounding
    options = {"is_causal": causal, "causal_alignment": "lower_right", "enable_gqa": True}
    if shape[5] == 0:
        options["scale"] = 1.0
    check(Case(*qkv(shape, dtype), options), gradients=shape[4] != 1 and shape[0] * shape[1] > 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    check(Case(*qkv((2, 2, 2, 37, 40, 24, 24), torch.float16, layout), {"scale": 0.3}), layout=layout)


@pytest.mark.parametrize("lead", [(2, 3), (2, 1)], ids=str)
def test_five_dims(lead: tuple[int, int]) -> None:
    """Leading dims that no stride joins: keys broadcast over one of them, a mask over the other."""
    q, k, v = randn(2, 3, 4, 6, 8, seed=1), randn(*lead, 2, 7, 8, seed=2), randn(*lead, 2, 7, 5, seed=3)
    mask = randn(2, 1, 4, 1, 7, seed=4)
    grad, results = randn(2, 3, 4, 6, 5, seed=5), []
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (q, k, v, mask)]
        with triton() if dtype == torch.float32 else mmkern.backend("reference"):
            out = attention(*leaves, enable_gqa=True)
            results.append((out, *torch.autograd.grad(out, leaves, grad.to(out))))
    for actual, exact in zip(results[1], results[0], strict=True):
        assert_accurate(actual.cpu(), exact, kind="gradient")


MASK = randn(2, 4, 50, 70, seed=4)
MASKS = {
    "one for the batch": MASK[:1],
    "one for the heads": MASK[:, :1],
    "of keys": MASK[:, :, :1],
    "of keys, one for the batch": MASK[:1, :, :1],
    "of queries": MASK[:, :, :, :1],
    "of heads": MASK[:1, :, :1, :1],
    "a number": MASK[:1, :1, :1, :1],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_every_shape(name: str) -> None:
    options = {"attn_mask": MASKS[name], "enable_gqa": True, "is_causal": True, "dropout_p": 0.1}
    options["key_lengths"] = torch.tensor([70, 31])
    if DEVICE == "cuda" or len(name) % 2:  # in the interpreter, every other in its own dtype
        check(Case(*tensors(torch.float32, q_len=50, k_len=70), options))
    if DEVICE == "cuda" or not len(name) % 2:
        options["attn_mask"] = MASKS[name].bfloat16()
        check(Case(*tensors(torch.bfloat16, q_len=50, k_len=70), options))


@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean", "squared_euclidean"])
def test_all_at_once(similarity: str) -> None:
    """Every option together, keys over several blocks."""
    bias = randn(2, 1, 40, 90, seed=4)
    options = {
        "attn_mask": bias.masked_fill(bias < -1, -math.inf), "is_causal": True, "causal_alignment": "lower_right",
        "key_lengths": torch.tensor([90, 71]), "window": (60, None), "softcap": 3.0, "dropout_p": 0.2,
        "alibi_slopes": torch.tensor([0.1, 0.0, 0.02, 0.05]), "sinks": torch.tensor([0.0, 1.0, -math.inf, -2.0]),
        "temperature": torch.tensor([0.5, 1.0, 2.0, -1.0]), "similarity": similarity, "enable_gqa": True, "scale": 0.3,
    }  # fmt: skip
    check(Case(*tensors(torch.float32, q_len=40, k_len=90, dim=20, v_dim=12), options))


@pytest.mark.skipif(DEVICE == "cpu", reason="random calls up to head dim 256 take an interpreter minutes each")
@settings(max_examples=100, derandomize=True, deadline=None)
@given(cases(), st.sampled_from((0.0, 0.1, 0.5)), st.sampled_from(LAYOUTS))
def test_combined(drawn: tuple[Case, str], dropout_p: float, layout: str) -> None:
    case = drawn[0]
    assume(case.k.shape[2] != 1)
    check(Case(case.q, case.k, case.v, {**case.options, "dropout_p": dropout_p}), layout=layout)


@pytest.mark.parametrize("dropout_p", [0.1, 0.75, 1.0])
def test_dropped_elements(dropout_p: float) -> None:
    """Those that the generator says: the CPU's."""
    q, k, v = torch.zeros(2, 3, 7, 16), torch.zeros(2, 3, 101, 16), torch.eye(101).expand(2, 3, 101, 101)
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(seed, dropout_p, (2, 3, 7, 101), torch.device("cpu"))
    torch.manual_seed(11)
    with triton():
        weights = attention(q.to(DEVICE), k.to(DEVICE), to(v, DEVICE), dropout_p=dropout_p).cpu() * 101
    want = keep / (1 - dropout_p) if dropout_p < 1 else torch.zeros(keep.shape)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge(dtype: torch.dtype) -> None:
    """Scores of ten thousand, values whose sum overflows, and masks of the least finite number."""
    q, k, v = qkv((1, 2, 2, 40, 90, 64, 64), dtype)
    lowest = torch.zeros(40, 90).masked_fill(torch.arange(40)[:, None] % 3 == 0, torch.finfo(torch.float32).min)
    large = (v.sign() * torch.finfo(dtype).max / 128).to(dtype)
    for case in (
        Case(q * 30, k * 30, v, {"scale": 1.0}),
        Case(q, k, large, {}),
        Case(q, k, v, {"attn_mask": lowest}),
    ):
        check(case, gradients=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype: torch.dtype) -> None:
    """A NaN or an infinity reaches what sees it, and only that."""
    clean = [t.to(DEVICE) for t in qkv((1, 2, 2, 70, 80, 16, 16), dtype)]
    exact = attention(*(t.double().cpu() for t in clean), is_causal=True)
    with triton():
        want = attention(*clean, is_causal=True)
        q, k, v = (t.clone() for t in clean)
        q[0, 0, 33, 5] = math.nan
        out, lse = attention(q, k, v, is_causal=True, return_lse=True)
        hit = torch.zeros(1, 2, 70, dtype=torch.bool, device=DEVICE)
        hit[0, 0, 33] = True
        assert out.isnan().eq(hit[..., None]).all()
        assert lse.isnan().eq(hit).all()
        assert_accurate(out[~hit].cpu(), exact[~hit.cpu()], want[~hit])
        for value in (math.nan, math.inf, -math.inf):
            q, k, v = (t.clone() for t in clean)
            v[0, 1, 44, 3] = value
            out = attention(q, k, v, is_causal=True)
            expected = exact.clone()
            expected[0, 1, 44:, 3] = value
            assert_accurate(out.cpu(), expected, want)
            k[0, 1, 75:] = value  # seen by no query
            again = attention(q, k, v, is_causal=True)
            torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
        k = clean[1].clone()
        k[0, 1, 44] = math.nan
        hit = torch.zeros(1, 2, 70, dtype=torch.bool, device=DEVICE)
        hit[0, 1, 44:] = True
        assert attention(clean[0], k, clean[2], is_causal=True).isnan().eq(hit[..., None]).all()


@pytest.mark.parametrize("similarity", ["dot", "cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padding_may_hold_anything(similarity: str, dtype: torch.dtype) -> None:
    """NaN in padding changes no result and no gradient, not a bit of it with lengths; an empty row has gradient 0."""
    for exactly, options in enumerate((
        {"attn_mask": (torch.arange(9, device=DEVICE) < torch.tensor([[0], [6]], device=DEVICE))[:, None, None]},
        {"key_lengths": torch.tensor([0, 6], device=DEVICE)},
    )):  # fmt: skip
        found = []
        for fill in (0.0, math.nan):
            q, k, v = qkv((2, 2, 2, 4, 9, 8, 8), dtype)
            k[0], v[0], k[1, :, 6:], v[1, :, 6:] = fill, fill, fill, fill
            leaves = [t.to(DEVICE).requires_grad_() for t in (q, k, v)]
            with triton():
                out, lse = attention(*leaves, **options, similarity=similarity, return_lse=True)
                grads = torch.autograd.grad(out.float().square().sum(), leaves)
            assert lse[0].eq(-math.inf).all()
            found.append((out, *grads))
        for padded, zeros in zip(*reversed(found), strict=True):
            atol = 0 if exactly else 8 * torch.finfo(dtype).eps  # of values and gradients up to 4
            torch.testing.assert_close(padded, zeros, rtol=0, atol=atol)
            assert padded[0].eq(0).all()


def test_close_vectors_keep_their_distance() -> None:
    """Queries and keys a thousand from the origin and a thousandth apart."""
    q, k, v = (t.double() for t in qkv((1, 1, 1, 20, 30, 8, 8)))
    case = Case((1000 + q / 100).float(), (1000 + k / 100).float(), v.float(), {"similarity": "euclidean"})
    case.options["scale"] = 100.0
    check(case, gradients=False)


@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_gradients_where_the_formula_has_none(similarity: str) -> None:
    """A distance of 0 has gradient 0; a norm below 1e-12 counts as 1e-12, a constant."""
    x = randn(1, 1, 5, 8)
    x[:, :, 1] *= 0 if similarity == "euclidean" else 1e-13
    value, grad = randn(1, 1, 5, 8, seed=1), randn(1, 1, 5, 8, seed=2)
    found = []
    for backend, dtype, device in (("reference", torch.float64, "cpu"), ("triton", torch.float32, DEVICE)):
        leaf = x.to(device, dtype, copy=True).requires_grad_()
        with mmkern.backend(backend, strict=True):
            out = mmkern.scaled_dot_product_attention(leaf, leaf, value.to(device, dtype), similarity=similarity)
            found.append(torch.autograd.grad(out, leaf, grad.to(device, dtype))[0].cpu())
    for row in range(5):  # of 1e12 in one row
        torch.testing.assert_close(found[1][0, 0, row].double(), found[0][0, 0, row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 2, 35, 70, 16, 16), (3, 4, 1, 1, 600, 16, 16)], ids=str)
def test_deterministic(shape: tuple[int, ...]) -> None:
    """Bitwise the same over repeats and batch-mates; inputs stay as they were."""
    inputs = [t.to(DEVICE).requires_grad_() for t in qkv(shape, torch.bfloat16)]
    kept = [t.detach().clone() for t in inputs]
    grad = randn(*shape[:2], shape[3], shape[6], dtype=torch.bfloat16, seed=6).to(DEVICE)
    results = []
    for part in (slice(None), slice(None), slice(1, 2)):
        leaves = [t.detach()[part].requires_grad_() for t in inputs]
        with triton():
            out = attention(*leaves, enable_gqa=True)
            found = (out, *torch.autograd.grad(out, leaves, grad[part]))
        results.append([t if t.shape[0] == 1 else t[1:2] for t in found])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="16 GiB of memory where addresses alone do not suffice")
def test_offsets_beyond_32_bits() -> None:
    storage = torch.empty(2**32 + 128, dtype=torch.bfloat16)  # 8 GiB of addresses, four pages of memory
    far = storage.as_strided((1, 1, 2, 64), (0, 0, 2**32, 1))
    q, k, _ = qkv((1, 1, 1, 2, 2, 64, 64), torch.bfloat16)
    far.copy_(k)
    with mmkern.backend("triton", strict=True):
        assert torch.equal(attention(far, far, far), attention(k, k, k))
        assert torch.equal(attention(q, far, far, is_causal=True), attention(q, k, k, is_causal=True))


def test_refusals_say_why() -> None:
    q = torch.zeros(1, 1, 2, 8, dtype=torch.float64, device=DEVICE)
    wide = torch.zeros(1, 1, 2, 1025, device=DEVICE)
    with mmkern.backend("triton", strict=True):
        with pytest.raises(RuntimeError, match="float32, bfloat16 and float16, not torch"):
            attention(q, q, q)
        with pytest.raises(RuntimeError, match="head dims up to 1024, not 1025"):
            attention(wide, wide, wide)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(dtype: torch.dtype, dim: int) -> None:
    """Shapes that fill a GPU, where a wrong launch configuration shows."""
    q, k, v = (t.to(DEVICE) for t in qkv((2, 8, 2, 1000, 1500, dim, dim), dtype))
    for causal in (False, True):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        theirs = [t.detach().requires_grad_() for t in (q, k, v)]
        grad = randn(*q.shape, dtype=dtype, seed=5).to(DEVICE)
        outs = [attention(*leaves, is_causal=causal, enable_gqa=True)]
        for other in (wide, theirs):
            outs.append(F.scaled_dot_product_attention(*other, is_causal=causal, enable_gqa=True))
        assert_accurate(outs[0], outs[1], outs[2])
        groups = zip(outs, (leaves, wide, theirs), strict=True)
        mine, exact, base = (torch.autograd.grad(out, of, grad.to(out)) for out, of in groups)
        for a, e, b in zip(mine, exact, base, strict=True):
            assert_accurate(a, e, b, "gradient")
