"""Positional encodings, against the formulas models write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkern
from mmkern.benchmarks.inputs import ELEMENTS, normal, sample
from mmkern.benchmarks.records import DTYPES, Baseline, Call, Case, Outputs, Problem

# op, name, shape, layout or encoding, level; rotary: batch, query heads, key heads, length, head dim;
# add: batch, length, dim; embed: batch, length, dim, vocabulary
SHAPES: list[tuple[str, str, tuple[int, ...], str, str]] = [
    ("rotary", "smallest", (1, 1, 1, 16, 64), "half", "quick"),
    ("rotary", "Llama decode", (8, 32, 8, 1, 128), "half", "quick"),
    ("rotary", "Llama prefill 512", (1, 32, 8, 512, 128), "half", "quick"),
    ("rotary", "Llama prefill 4096", (1, 32, 8, 4096, 128), "half", "default"),
    ("rotary", "GPT-J 1024 interleaved", (2, 12, 12, 1024, 64), "interleaved", "default"),
    ("rotary", "8x12x1024", (8, 12, 12, 1024, 64), "half", "default"),
    ("add_positional_encoding", "smallest", (1, 16, 64), "sinusoidal", "quick"),
    ("add_positional_encoding", "Transformer 512", (8, 512, 512), "sinusoidal", "quick"),
    ("add_positional_encoding", "8x1024x768", (8, 1024, 768), "sinusoidal", "default"),
    ("add_positional_encoding", "ViT-B/16 learned", (32, 197, 768), "learned", "default"),
    ("add_positional_encoding", "8x1024x768 scalar", (8, 1024, 768), "scalar", "default"),
    ("embed_tokens", "BERT-base 128", (32, 128, 768, 30522), "learned", "default"),
    ("embed_tokens", "Transformer 512", (8, 512, 512, 37000), "sinusoidal", "quick"),
]
# the same with the gradient that training adds, forward and backward timed together
TRAINED: list[tuple[str, str, tuple[int, ...], str, str]] = [
    ("rotary-training", "Llama prefill 512", (1, 32, 8, 512, 128), "half", "quick"),
    ("add_positional_encoding-training", "ViT-B/16 learned", (32, 197, 768), "learned", "quick"),
    ("embed_tokens-training", "BERT-base 128", (32, 128, 768, 30522), "learned", "quick"),
    ("embed_tokens-training", "Transformer 512", (8, 512, 512, 37000), "sinusoidal", "full"),
]


def cases() -> Iterator[Case]:
    for op, name, shape, kind, level in TRAINED:
        for dtype in (DTYPES["float32"], DTYPES["bfloat16"]):
            elements = math.prod(shape[:3]) if not op.startswith("rotary") else shape[0] * 40 * 512 * 128
            written = shape[3] * shape[2] if op.startswith("embed") else 0  # the gradient of the weight
            dims = "x".join(map(str, shape))
            moved = (4.0 * elements + written) * dtype.itemsize
            build = partial(_trained, op.split("-")[0], shape, kind)
            yield Case("position", op, name, dims, dtype, build, 4.0 * elements, moved, "copy", level)
    for op, name, shape, kind, level in SHAPES:
        for dtype in (DTYPES["float32"], DTYPES["bfloat16"]):
            if op == "rotary":
                batch, q_heads, k_heads, length, dim = shape
                elements = batch * (q_heads + k_heads) * length * dim
                dims = f"{batch}x{q_heads}/{k_heads}x{length}x{dim}"
            else:
                elements = math.prod(shape[:3])
                dims = "x".join(map(str, shape[:3]))
            table = math.prod(shape[1:3]) if kind == "learned" else 0
            moved = (2.0 * elements + table) * dtype.itemsize
            build = partial({"rotary": _rotary, "embed_tokens": _embed}.get(op, _add), shape, kind)
            flops = (3.0 if op == "rotary" else 2.0) * elements
            yield Case("position", op, name, dims, dtype, build, flops, moved, "copy", level)


def _rotary(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Problem:
    batch, q_heads, k_heads, length, dim = shape
    q = normal(batch, q_heads, length, dim, dtype=dtype, layout="transposed", seed=1).to(device)
    k = normal(batch, k_heads, length, dim, dtype=dtype, layout="transposed", seed=2).to(device)
    first = 777 if length == 1 else 0  # decode: one token, late in the sequence
    positions = torch.arange(first, first + length, device=device)
    # a model makes these once per step and shares them over its layers, so making them is not timed
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=device).double() / dim)
    angles = torch.cat([angles, angles], -1) if layout == "half" else angles.repeat_interleave(2, -1)
    exact_turn = angles.cos(), angles.sin()
    turn = exact_turn[0].to(dtype), exact_turn[1].to(dtype)

    def rotate_half(x: Tensor) -> Tensor:
        if layout == "half":
            return torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)

    def usual(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    some = _positions(length, batch * (q_heads + k_heads) * dim)

    def exact() -> tuple[Tensor, Tensor]:
        return usual(q[:, :, some].double(), k[:, :, some].double(), *(t[some] for t in exact_turn))

    return Problem(
        partial(mmkern.rotary, q, k, positions, layout=layout),
        [Baseline("x * cos + rotate(x) * sin", partial(usual, q, k, *turn))],
        exact,
        compared=lambda outputs: tuple(t[:, :, some] for t in outputs),
        inputs=[q, k],
    )


def _positions(length: int, elements: int) -> Tensor:
    """Those compared with float64, of `elements` elements each."""
    return sample(length, max(2, ELEMENTS // elements))


def _table(kind: str, length: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """What is added, (length, dim) in float64; a learned table has values of `dtype`."""
    if kind == "learned":
        return normal(length, dim, dtype=dtype, seed=3).to(device).double()
    positions = torch.arange(length, device=device).double()[:, None]
    if kind == "scalar":
        return (positions / 10000.0).sin() + (positions / 10000.0).cos().expand(length, dim)
    angles = positions * 10000.0 ** (-torch.arange(0, dim, 2, device=device).double() / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _add(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    batch, length, dim = shape
    x = normal(batch, length, dim, dtype=dtype, seed=1).to(device)
    table, scale = _table(kind, length, dim, dtype, device), math.sqrt(dim)
    rounded = table.to(dtype)
    encoding = rounded if kind == "learned" else kind
    some = _positions(length, batch * dim)
    return Problem(
        partial(mmkern.add_positional_encoding, x, encoding, scale=scale),
        [
            Baseline("x * scale + table", lambda: x * scale + rounded),
            Baseline("torch.add(table, x, alpha)", lambda: torch.add(rounded, x, alpha=scale)),
        ],
        lambda: x[:, some].double() * scale + (rounded[some].double() if kind == "learned" else table[some]),
        compared=lambda outputs: (outputs[0][:, some],),
        inputs=[x, rounded] if kind == "learned" else [x],
    )


def _embed(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    batch, length, dim, vocabulary = shape
    weight = normal(vocabulary, dim, dtype=dtype, seed=1).to(device)
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
    table, scale = _table(kind, length, dim, dtype, device), math.sqrt(dim)
    rounded = table.to(dtype)
    encoding = rounded if kind == "learned" else kind
    some = _positions(length, batch * dim)
    return Problem(
        partial(mmkern.embed_tokens, tokens, weight, encoding, scale=scale),
        [
            Baseline("embedding * scale + table", lambda: F.embedding(tokens, weight) * scale + rounded),
            Baseline(
                "torch.add(table, embedding)", lambda: torch.add(rounded, F.embedding(tokens, weight), alpha=scale)
            ),
        ],
        lambda: (
            F.embedding(tokens[:, some], weight).double() * scale
            + (rounded[some].double() if kind == "learned" else table[some])
        ),
        compared=lambda outputs: (outputs[0][:, some],),
        inputs=[weight, rounded] if kind == "learned" else [weight],
    )


def _gradients(call: Callable[..., Tensor], up: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in given)
    return torch.autograd.grad(call(*leaves), leaves, up)


def _trained(op: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    """Gradients of what one of the builders above computes, by autograd on both sides."""
    build = {"rotary": _rotary_trained, "embed_tokens": _embed_trained}.get(op, _add_trained)
    ours, usual, inputs, grad, exact, compared = build(shape, kind, dtype, device)
    return Problem(
        partial(_gradients, ours, grad, *inputs),
        [Baseline("the usual formula", partial(_gradients, usual, grad, *inputs))],
        exact,
        compared,
        kind="gradient",
        inputs=[grad, *inputs],
    )


# ours, the usual formula, what both take, the gradient of their output, and the problem's `exact` and `compared`
Trained = tuple[
    Callable[..., Tensor], Callable[..., Tensor], list[Tensor], Tensor, Call, Callable[[Outputs], Outputs]
]  # fmt: skip


def _rotary_trained(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Trained:
    batch, q_heads, k_heads, length, dim = shape
    heads = q_heads, k_heads
    q, k = (normal(batch, h, length, dim, dtype=dtype, layout="transposed", seed=h).to(device) for h in heads)
    grad = normal(batch, sum(heads), length, dim, dtype=dtype, seed=3).to(device)
    table = _table("sinusoidal", length, dim, torch.float64, device)
    sin, cos = (table[:, i::2].repeat(1, 2) for i in (0, 1))

    rounded = cos.to(dtype), sin.to(dtype)

    def usual(q: Tensor, k: Tensor, cos: Tensor = rounded[0], sin: Tensor = rounded[1]) -> Tensor:
        return torch.cat([x * cos + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin for x in (q, k)], 1)

    some = _positions(length, batch * sum(heads) * dim)

    def exact() -> tuple[Tensor, ...]:
        q_some, k_some, up = (t[:, :, some].double() for t in (q, k, grad))
        return _gradients(partial(usual, cos=cos[some], sin=sin[some]), up, q_some, k_some)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(mmkern.rotary(q, k), 1)

    return ours, usual, [q, k], grad, exact, lambda outputs: tuple(t[:, :, some] for t in outputs)


def _add_trained(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Trained:
    batch, length, dim = shape
    scale = math.sqrt(dim)
    x, grad = (normal(*shape, dtype=dtype, seed=seed).to(device) for seed in (1, 3))
    table = _table(kind, length, dim, dtype, device).to(dtype)

    def usual(x: Tensor, table: Tensor) -> Tensor:
        return x * scale + table

    some = _positions(length, batch * dim)

    def exact() -> tuple[Tensor, ...]:
        return _gradients(usual, grad[:, some].double(), x[:, some].double(), table[some].double())

    ours = partial(mmkern.add_positional_encoding, scale=scale)
    return ours, usual, [x, table], grad, exact, lambda outputs: (outputs[0][:, some], outputs[1][some])


def _embed_trained(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Trained:
    batch, length, dim, vocabulary = shape
    scale = math.sqrt(dim)
    weight = normal(vocabulary, dim, dtype=dtype, seed=1).to(device)
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
    grad = normal(batch, length, dim, dtype=dtype, seed=3).to(device)
    fixed = _table(kind, length, dim, dtype, device).to(dtype)
    learned = [fixed] if kind == "learned" else []

    def usual(weight: Tensor, table: Tensor = fixed) -> Tensor:
        return F.embedding(tokens, weight) * scale + table

    def ours(weight: Tensor, table: Tensor | None = None) -> Tensor:
        return mmkern.embed_tokens(tokens, weight, kind if table is None else table, scale=scale)

    # words that occur, and some that most probably do not: their gradient is 0
    words = torch.cat([tokens.flatten()[sample(tokens.numel(), 128)], sample(vocabulary, 32).to(device)]).unique()

    def exact() -> tuple[Tensor, ...]:
        up = grad.reshape(-1, dim)
        rows = [scale * up[tokens.flatten() == word].double().sum(0) for word in words]
        return torch.stack(rows), *([grad.double().sum(0)] if learned else [])

    return ours, usual, [weight, *learned], grad, exact, lambda outputs: (outputs[0][words], *outputs[1:])
