"""torch's machinery around every op: torch.func, forward-mode AD, second derivatives, against torch's formulas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

import mmkern
from mmkern.testing import accuracy, randn

B, H, L, S, D = 2, 2, 3, 4, 4
TOKENS = torch.tensor([[0, 2, 1], [4, 2, 2]])
HIDDEN = torch.tensor([[False, True, False, True], [False, False, False, True], [True, True, False, False]])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    similarity: str = "dot",
    temperature: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    behind = torch.arange(q.size(-2))[:, None] - torch.arange(k.size(-2))
    if similarity == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if similarity in ("dot", "cosine"):
        scores = q @ k.transpose(-1, -2) / (math.sqrt(q.size(-1)) if similarity == "dot" else 1.0)
    else:
        square = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
        scores = -square if similarity == "squared_euclidean" else -square.sqrt()
    if temperature is not None:
        scores = scores * temperature.view(-1, 1, 1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.view(-1, 1, 1) * behind.abs()
    if attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        scores = scores.masked_fill(behind < 0, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., : k.size(-2)] @ v


def masked_softmax(x: Tensor, bias: Tensor, mask: Tensor, scale: float) -> Tensor:
    return (x * scale + bias).masked_fill(~mask, -torch.inf).softmax(-1)


def sinusoidal(x: Tensor) -> Tensor:
    position, i = torch.arange(x.size(-2), dtype=torch.float64)[:, None], torch.arange(x.size(-1) // 2)
    angle = position / 10000 ** (2 * i / x.size(-1))
    return x + torch.stack([angle.sin(), angle.cos()], -1).flatten(-2).to(x.dtype)


def rotate(x: Tensor, layout: str) -> Tensor:
    angle = torch.arange(x.size(-2), dtype=torch.float64)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    if layout == "half":
        cos, sin = (torch.cat([t, t], -1) for t in (cos, sin))
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@dataclass(frozen=True)
class Row:
    """One op as a function of the leaves that get gradients, of the shapes given, and torch's formula for it."""

    name: str
    ours: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]


def attending(name: str, *leaves: str, **options: Any) -> Row:
    """Attention whose leaves after query, key and value are the named arguments: a mask, or a number for each head."""

    def call(fn: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return fn(*tensors[:3], **dict(zip(leaves, tensors[3:], strict=True)), **options)

    added = [(L, S) if leaf == "attn_mask" else (H,) for leaf in leaves]
    shapes = (B, H, L, D), (B, H, S, D), (B, H, S, D), *added
    ours = partial(call, mmkern.scaled_dot_product_attention)
    return Row(f"attention-{name}", ours, partial(call, attention), shapes)


ROWS = [
    attending("dot"),
    attending("causal", is_causal=True),
    attending("cosine", similarity="cosine"),
    attending("euclidean", similarity="euclidean"),
    attending("squared_euclidean", similarity="squared_euclidean"),
    attending("mask", "attn_mask"),
    attending("temperature", "temperature", similarity="cosine"),
    attending("alibi", "alibi_slopes"),
    attending("sinks", "sinks"),
    attending("softcap", softcap=1.5),
    attending("all", "attn_mask", "temperature", "alibi_slopes", "sinks", is_causal=True, softcap=2.0),
    Row("softmax", partial(mmkern.softmax, dim=-1), partial(torch.softmax, dim=-1), ((3, 5),)),
    Row("softmax-dim", partial(mmkern.softmax, dim=0), partial(torch.softmax, dim=0), ((3, 5),)),
    Row("log_softmax", partial(mmkern.log_softmax, dim=-1), partial(torch.log_softmax, dim=-1), ((3, 5),)),
    Row(
        "masked_softmax",
        lambda x, bias: mmkern.masked_softmax(x, ~HIDDEN, scale=0.7, bias=bias),
        partial(masked_softmax, mask=~HIDDEN, scale=0.7),
        ((2, L, S), (L, S)),
    ),
    Row("masked_softmax-mask", mmkern.masked_softmax, lambda x, mask: (x + mask).softmax(-1), ((2, L, S), (L, S))),
    Row("positions-sinusoidal", mmkern.add_positional_encoding, sinusoidal, ((2, L, D),)),
    Row(
        "positions-table",
        lambda x, table: mmkern.add_positional_encoding(x, table, offset=1, scale=1.5),
        lambda x, table: 1.5 * x + table[1 : 1 + L],
        ((2, L, D), (6, D)),
    ),
    Row(
        "embed_tokens",
        lambda weight, table: mmkern.embed_tokens(TOKENS, weight, table, scale=2.0),
        lambda weight, table: 2.0 * F.embedding(TOKENS, weight) + table[:3],
        ((5, D), (4, D)),
    ),
    Row(
        "embed_tokens-padding",  # whose row gets no gradient, although the result depends on it
        lambda weight: mmkern.embed_tokens(TOKENS, weight, padding_idx=2),
        lambda weight: F.embedding(TOKENS, weight, padding_idx=2),
        ((5, D),),
    ),
    *(
        Row(
            f"rotary-{layout}",
            lambda q, k, layout=layout: torch.cat(mmkern.rotary(q, k, layout=layout), 1),
            lambda q, k, layout=layout: torch.cat([rotate(q, layout), rotate(k, layout)], 1),
            ((2, 3, L, D), (2, 1, L, D)),
        )
        for layout in ("half", "interleaved")
    ),
]
target = torch.tensor([1, 4, 0])
options = {"label_smoothing": 0.1, "reduction": "none"}
calls = [partial(fn, target=target, **options) for fn in (mmkern.cross_entropy, F.cross_entropy)]
ROWS.append(Row("cross_entropy", *calls, ((3, 5),)))

Function = Callable[..., Tensor]
Leaves = Sequence[Tensor]


def others(leaves: Leaves) -> list[Tensor]:
    """Directions of the leaves' shapes."""
    return [randn(*t.shape, dtype=t.dtype, seed=50 + i) for i, t in enumerate(leaves)]


def stacked(leaves: Leaves) -> list[Tensor]:
    return [torch.stack([a, b]) for a, b in zip(leaves, others(leaves), strict=True)]


def scalar(fn: Function) -> Function:
    def loss(*leaves: Tensor) -> Tensor:
        out = fn(*leaves)
        factors = torch.arange(out.numel()).sin().view(out.shape)  # not random: vmap lets nothing be drawn
        return (out * factors).sum() + out.square().sum()

    return loss


def every(leaves: Leaves) -> tuple[int, ...]:
    return tuple(range(len(leaves)))


def dual(fn: Function, leaves: Leaves) -> Tensor:
    with forward_ad.dual_level():
        duals = (forward_ad.make_dual(t, tangent) for t, tangent in zip(leaves, others(leaves), strict=True))
        return forward_ad.unpack_dual(fn(*duals)).tangent


def twice(fn: Function, leaves: Leaves) -> tuple[Tensor, ...]:
    """Gradients of a function of the gradients: through the backward kernels, where there are any."""
    leaves = [t.clone().requires_grad_() for t in leaves]
    first = torch.autograd.grad(scalar(fn)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum((g.sin()).sum() for g in first), leaves)


TRANSFORMS: dict[str, Callable[[Function, Leaves], Any]] = {
    "grad": lambda fn, x: torch.func.grad(scalar(fn), every(x))(*x),
    "jvp": lambda fn, x: torch.func.jvp(fn, tuple(x), tuple(others(x))),
    "forward_ad": dual,
    "jacfwd": lambda fn, x: torch.func.jacfwd(fn, every(x))(*x),
    "jacrev": lambda fn, x: torch.func.jacrev(fn, every(x))(*x),
    "hessian": lambda fn, x: torch.func.hessian(scalar(fn), every(x))(*x),
    "vmap": lambda fn, x: torch.func.vmap(fn)(*stacked(x)),
    "vmap_one": lambda fn, x: torch.func.vmap(fn, (0, *[None] * (len(x) - 1)), 1)(stacked(x)[0], *x[1:]),
    "vmap_grad": lambda fn, x: torch.func.vmap(torch.func.grad(scalar(fn), every(x)))(*stacked(x)),
    "twice": twice,
}


def inputs(row: Row, dtype: torch.dtype) -> list[Tensor]:
    return [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(row.shapes)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_transform(row, transform, dtype):
    x = inputs(row, dtype)
    apply = TRANSFORMS[transform]
    found, tree = torch.utils._pytree.tree_flatten(apply(row.ours, x))
    expected, expected_tree = torch.utils._pytree.tree_flatten(apply(row.formula, [t.double() for t in x]))
    assert tree == expected_tree
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype
        limit = accuracy(a, e, kind="gradient").limit
        assert (a - e).norm() <= limit * e.norm().clamp_min(1.0)


@pytest.mark.parametrize("row", [r for r in ROWS if r.name != "embed_tokens-padding"], ids=lambda row: row.name)
def test_numerical_derivatives(row):
    """Of first and second order, reverse and forward mode, batched."""
    x = [t.requires_grad_() for t in inputs(row, torch.float64)]
    checks = {"check_batched_grad": True, "fast_mode": True}
    torch.autograd.gradcheck(row.ours, x, check_forward_ad=True, check_batched_forward_grad=True, **checks)
    torch.autograd.gradgradcheck(row.ours, x, check_fwd_over_rev=True, check_rev_over_rev=True, **checks)


@pytest.mark.parametrize("op", ["scaled_dot_product_attention", "masked_softmax", "add_positional_encoding"])
def test_dropout_draws_under_vmap_as_told(op):
    x = torch.ones(3, 2, 8, 16)
    rest = (x[0], x[0]) if op == "scaled_dot_product_attention" else ()
    call = partial(getattr(mmkern, op), dropout_p=0.5)
    same, different = (torch.vmap(lambda t: call(t, *rest), randomness=how)(x) for how in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda t: call(t, *rest))(x)
