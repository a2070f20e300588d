"""Positional encodings, against the formulas models write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkern
from mmkern.benchmarks.measure import DTYPES, Baseline, Case, Problem
from mmkern.testing import randn

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
    q = randn(batch, q_heads, length, dim, dtype=dtype, layout="transposed", seed=1).to(device)
    k = randn(batch, k_heads, length, dim, dtype=dtype, layout="transposed", seed=2).to(device)
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

    return Problem(
        partial(mmkern.rotary, q, k, positions, layout=layout),
        [Baseline("x * cos + rotate(x) * sin", partial(usual, q, k, *turn))],
        lambda: usual(q.double(), k.double(), *exact_turn),
    )


def _table(kind: str, length: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """What is added, (length, dim) in float64; a learned table has values of `dtype`."""
    if kind == "learned":
        return randn(length, dim, dtype=dtype, seed=3).to(device).double()
    positions = torch.arange(length, device=device).double()[:, None]
    if kind == "scalar":
        return (positions / 10000.0).sin() + (positions / 10000.0).cos().expand(length, dim)
    angles = positions * 10000.0 ** (-torch.arange(0, dim, 2, device=device).double() / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _add(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    batch, length, dim = shape
    x = randn(batch, length, dim, dtype=dtype, seed=1).to(device)
    table, scale = _table(kind, length, dim, dtype, device), math.sqrt(dim)
    rounded = table.to(dtype)
    encoding = rounded if kind == "learned" else kind
    return Problem(
        partial(mmkern.add_positional_encoding, x, encoding, scale=scale),
        [
            Baseline("x * scale + table", lambda: x * scale + rounded),
            Baseline("torch.add(table, x, alpha)", lambda: torch.add(rounded, x, alpha=scale)),
        ],
        lambda: x.double() * scale + table,
    )


def _embed(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    batch, length, dim, vocabulary = shape
    weight = randn(vocabulary, dim, dtype=dtype, seed=1).to(device)
    tokens = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
    table, scale = _table(kind, length, dim, dtype, device), math.sqrt(dim)
    rounded = table.to(dtype)
    encoding = rounded if kind == "learned" else kind
    return Problem(
        partial(mmkern.embed_tokens, tokens, weight, encoding, scale=scale),
        [
            Baseline("embedding * scale + table", lambda: F.embedding(tokens, weight) * scale + rounded),
            Baseline(
                "torch.add(table, embedding)", lambda: torch.add(rounded, F.embedding(tokens, weight), alpha=scale)
            ),
        ],
        lambda: F.embedding(tokens, weight).double() * scale + table,
    )


def _trained(op: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> Problem:
    """Gradients of what one of the builders above computes, by autograd on both sides."""
    new = partial(randn, dtype=dtype)
    if op == "rotary":
        batch, q_heads, k_heads, length, dim = shape
        inputs = [new(batch, h, length, dim, layout="transposed", seed=h) for h in (q_heads, k_heads)]
        table = _table("sinusoidal", length, dim, torch.float64, device)
        sin, cos = (table[:, i::2].repeat(1, 2) for i in (0, 1))

        def usual(q: Tensor, k: Tensor) -> Tensor:
            c, s = cos.to(q.dtype), sin.to(q.dtype)
            return torch.cat([x * c + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * s for x in (q, k)], 1)

        def ours(q: Tensor, k: Tensor) -> Tensor:
            return torch.cat(mmkern.rotary(q, k), 1)
    else:
        batch, length, dim = shape[:3]
        scale = math.sqrt(dim)
        fixed = _table(kind, length, dim, dtype, device)
        inputs = [fixed.to(dtype)] if kind == "learned" else []
        if op == "embed_tokens":
            tokens = torch.randint(shape[3], (batch, length), generator=torch.Generator().manual_seed(2)).to(device)
            inputs = [new(shape[3], dim, seed=1), *inputs]
        else:
            inputs = [new(batch, length, dim, seed=1), *inputs]

        def usual(x: Tensor, table: Tensor | None = None) -> Tensor:
            x = F.embedding(tokens, x) if op == "embed_tokens" else x
            return x * scale + (fixed.to(x.dtype) if table is None else table)

        def ours(x: Tensor, table: Tensor | None = None) -> Tensor:
            encoding = kind if table is None else table
            if op == "embed_tokens":
                return mmkern.embed_tokens(tokens, x, encoding, scale=scale)
            return mmkern.add_positional_encoding(x, encoding, scale=scale)

    grad = torch.randn(usual(*inputs).shape, generator=torch.Generator().manual_seed(3)).to(dtype)

    def gradients(call: Callable[..., Tensor], *leaves: Tensor, up: Tensor = grad) -> tuple[Tensor, ...]:
        leaves = tuple(t.detach().requires_grad_() for t in leaves)
        return torch.autograd.grad(call(*leaves), leaves, up)

    return Problem(
        partial(gradients, ours, *inputs),
        [Baseline("the usual formula", partial(gradients, usual, *inputs))],
        lambda: gradients(usual, *(t.double() for t in inputs), up=grad.double()),
        kind="gradient",
    )
