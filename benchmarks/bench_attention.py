"""Attention as models use it, against scaled_dot_product_attention and the usual formulas around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmkern
from mmkern.benchmarks.inputs import SCORES, normal, sample
from mmkern.benchmarks.records import DTYPES, Baseline, Call, Case, Problem
from mmkern.testing import FEATURES, Sizes

ALL, TWO, F32 = tuple(DTYPES), ("float32", "bfloat16"), ("float32",)
FEWEST = 16  # queries of each head that are compared with float64, however long the keys


@dataclass(frozen=True)
class Shape:
    """One row of the table below: (batch, query heads / key heads, queries x keys, head dim) and the rest."""

    op: str
    name: str
    batch: int
    heads: tuple[int, int]
    q_len: int
    k_len: int
    head_dim: int
    level: str = "default"
    dtypes: tuple[str, ...] = ALL
    options: dict[str, Any] = field(default_factory=dict)


CAUSAL = {"is_causal": True}
SHAPES = [
    Shape("attention", "smallest", 1, (1, 1), 16, 16, 64, "quick"),
    Shape("attention", "MiniLM 128", 8, (12, 12), 128, 128, 32, "quick"),
    Shape("attention", "MiniLM 512", 2, (12, 12), 512, 512, 32),
    Shape("attention", "BERT-base 128", 8, (12, 12), 128, 128, 64),
    Shape("attention", "BERT-base 512", 2, (12, 12), 512, 512, 64, "quick"),
    Shape("attention", "ViT-B/16 224px", 4, (12, 12), 197, 197, 64, "quick"),
    Shape("attention", "ViT-B/16 384px", 2, (12, 12), 577, 577, 64),
    Shape("attention", "1024 tokens", 2, (8, 8), 1024, 1024, 64),
    Shape("attention", "long 4096", 1, (8, 8), 4096, 4096, 64),
    Shape("attention", "long 4096 wide", 1, (8, 8), 4096, 4096, 128, "full"),
    Shape("attention", "long 16384", 1, (8, 8), 16384, 16384, 64, "full"),
    Shape("attention-causal", "CLIP text 77", 16, (8, 8), 77, 77, 64, "quick", options=CAUSAL),
    Shape("attention-causal", "GPT-2 1024", 1, (12, 12), 1024, 1024, 64, options=CAUSAL),
    Shape("attention-causal", "Llama prefill 512", 1, (32, 8), 512, 512, 128, "quick", options=CAUSAL),
    Shape("attention-causal", "Llama prefill 2048", 1, (32, 8), 2048, 2048, 128, dtypes=TWO, options=CAUSAL),
    Shape("attention-causal", "Llama prefill 4096", 1, (32, 8), 4096, 4096, 128, "full", options=CAUSAL),
    Shape("attention-causal", "long 4096", 1, (8, 8), 4096, 4096, 64, "full", options=CAUSAL),
    Shape("attention-decode", "GPT-2 decode 1024", 8, (12, 12), 1, 1024, 64, "quick"),
    Shape("attention-decode", "Llama decode 4096", 1, (32, 8), 1, 4096, 128),
    Shape("attention-decode", "Llama decode 8x4096", 8, (32, 8), 1, 4096, 128, "full"),
    Shape("attention-decode", "long decode 4096", 8, (8, 8), 1, 4096, 64, dtypes=TWO),
    Shape("attention-mask", "BERT-base padded 128", 8, (12, 12), 128, 128, 64, "quick", TWO),
    Shape("attention-mask", "BERT-base padded 512", 2, (12, 12), 512, 512, 64, dtypes=TWO),
    Shape("attention-lengths", "BERT-base padded 512", 2, (12, 12), 512, 512, 64, dtypes=TWO),
    Shape("attention-bias", "T5-base 512", 1, (12, 12), 512, 512, 64, dtypes=TWO, options={"scale": 1.0}),
    Shape("attention-bias", "Swin-T windows 49", 256, (3, 3), 49, 49, 32, "quick", TWO),
    Shape("attention-window", "window 128 of 1024", 1, (8, 8), 1024, 1024, 64, "quick", TWO, {"window": 128}),
    Shape("attention-window", "window 512 of 4096", 1, (8, 8), 4096, 4096, 64, dtypes=TWO, options={"window": 512}),
    Shape("attention-cosine", "Swin-v2 windows 64", 64, (6, 6), 64, 64, 32, "quick", TWO),
    Shape("attention-cosine", "1024 tokens", 2, (8, 8), 1024, 1024, 64, dtypes=TWO),
    Shape("attention-euclidean", "256 tokens", 4, (8, 8), 256, 256, 64, "quick", F32),
    Shape("attention-euclidean", "1024 tokens", 1, (8, 8), 1024, 1024, 64, dtypes=F32),
]
# For a GPU to be full: head dims 64, 128 and 256 at 16 thousand tokens, as its makers publish them.
GPU = [
    Shape(f"attention{'-causal' if causal else ''}", f"{length} tokens, {dim} wide", 16384 // length,
          (2048 // dim, 2048 // dim), length, length, dim, "gpu", ("bfloat16",), CAUSAL if causal else {})
    for causal in (False, True) for dim in (64, 128, 256) for length in (2048, 4096, 16384)
] + [
    Shape("attention-causal", "8 key heads, 8192", 2, (64, 8), 8192, 8192, 128, "gpu", ("bfloat16",), CAUSAL),
    Shape("attention-decode", "Llama decode 64x8192", 64, (32, 8), 1, 8192, 128, "gpu", ("bfloat16",)),
    Shape("attention-cosine", "4096 tokens", 4, (16, 16), 4096, 4096, 128, "gpu", ("bfloat16",)),
    Shape("attention-window", "window 1024 of 8192", 2, (16, 16), 8192, 8192, 128, "gpu", ("bfloat16",),
          {"window": 1024}),
    Shape("attention-bias", "4096 tokens", 4, (16, 16), 4096, 4096, 128, "gpu", ("bfloat16",)),
]  # fmt: skip
# One size after another, the rest as it was: length at the same number of tokens, width at the same number of channels,
# and heads below, at and above the number of threads.
SWEEPS = [
    *(Shape("attention", f"8192 tokens by {n}", 8192 // n, (8, 8), n, n, 64, "full", TWO)
      for n in (128, 256, 512, 1024, 2048, 4096, 8192)),
    *(Shape("attention", f"512 channels by {n}", 4, (512 // n, 512 // n), 512, 512, n, "full", TWO)
      for n in (16, 32, 64, 128, 256)),
    *(Shape("attention", f"{n} heads", 1, (n, n), 1024, 1024, 64, "full", TWO) for n in (1, 2, 3, 6, 12)),
]  # fmt: skip
SHAPES += GPU + SWEEPS
# What an op of these names is, by the table that tests and kernels share; lengths and windows are a shape's own.
FEATURE = {
    "attention-causal": "causal",
    "attention-bias": "float mask, one for the batch",
    "attention-cosine": "cosine",
    "attention-euclidean": "euclidean",
}
TEMPERATURE = FEATURES["cosine"](Sizes())["temperature"]


def cases(shapes: Sequence[Shape] = SHAPES) -> Iterator[Case]:
    for s in shapes:
        for name in s.dtypes:
            dtype = DTYPES[name]
            decode = s.op == "attention-decode"
            heads = str(s.heads[0]) if s.heads[0] == s.heads[1] else f"{s.heads[0]}/{s.heads[1]}"
            length = str(s.q_len) if s.q_len == s.k_len else f"{s.q_len}x{s.k_len}"
            width = s.head_dim * dtype.itemsize
            yield Case(
                "attention",
                s.op,
                s.name,
                f"{s.batch}x{heads}x{length}x{s.head_dim}",
                dtype,
                partial(build, s),
                flops=4.0 * s.batch * s.heads[0] * _visible(s) * s.head_dim,
                bytes=2.0 * s.batch * (s.heads[0] * s.q_len + s.heads[1] * s.k_len) * width,
                bound="read" if decode else "bf16_dot" if dtype is torch.bfloat16 else "fma",
                level=s.level,
            )


def _visible(s: Shape) -> float:
    """Query-key pairs per head that count."""
    if s.op == "attention-causal":
        return s.q_len * (s.q_len + 1) / 2
    if s.op == "attention-lengths":
        return s.q_len * _lengths(s).double().mean().item()
    if s.op == "attention-window":
        w = s.options["window"]
        return s.q_len * w - w * (w - 1) / 2
    return float(s.q_len * s.k_len)


def _lengths(s: Shape) -> Tensor:
    """Sentence lengths of a padded batch, from a third to all of it."""
    return torch.linspace(s.k_len / 3, s.k_len, s.batch).long()


def build(s: Shape, dtype: torch.dtype, device: str) -> Problem:
    # (batch, length, heads, head_dim) in memory, as a model's projection leaves it
    layout = "transposed"
    # without a scale (T5) the projection that makes q keeps the scores small
    size = s.head_dim**-0.5 if s.options.get("scale") == 1.0 else 1.0
    q = normal(s.batch, s.heads[0], s.q_len, s.head_dim, dtype=dtype, layout=layout, seed=1, scale=size).to(device)
    k = normal(s.batch, s.heads[1], s.k_len, s.head_dim, dtype=dtype, layout=layout, seed=2).to(device)
    v = normal(s.batch, s.heads[1], s.k_len, s.head_dim, dtype=dtype, layout=layout, seed=3).to(device)
    sizes = Sizes(s.batch, s.heads[0], s.q_len, s.k_len, dtype, device, draw=normal)
    feature = FEATURES[FEATURE.get(s.op, "plain")](sizes)
    options, theirs = feature | s.options, dict(s.options)
    baselines = []
    if s.op == "attention-cosine":
        formula: Callable[..., Tensor] = _normalise_and_sdpa
    elif s.op == "attention-euclidean":
        options["scale"] = 1 / math.sqrt(s.head_dim)
        formula = _cdist_softmax_matmul
    else:
        formula = F.scaled_dot_product_attention
    if s.op in ("attention-mask", "attention-lengths"):
        lengths = _lengths(s).to(device)
        theirs["attn_mask"] = (torch.arange(s.k_len, device=device) < lengths[:, None])[:, None, None, :]
        options |= {"key_lengths": lengths} if s.op == "attention-lengths" else theirs
    elif s.op == "attention-bias":
        theirs |= feature
    elif s.op == "attention-window":
        behind = torch.arange(s.q_len, device=device)[:, None] - torch.arange(s.k_len, device=device)
        theirs = {"attn_mask": (behind >= 0) & (behind < s.options["window"])}
        options = {"is_causal": True, "window": (s.options["window"] - 1, 0)}
    some = sample(s.q_len, max(FEWEST, SCORES // (s.batch * s.heads[0] * s.k_len)))
    exact = partial(_exact, formula, q, k, v, dict(theirs), some)
    if s.heads[0] != s.heads[1]:
        options["enable_gqa"] = theirs["enable_gqa"] = True
        if s.q_len == 1:
            rows = q.reshape(s.batch, s.heads[1], -1, s.head_dim)
            baselines.append(Baseline("sdpa, heads as rows", partial(_heads_as_rows, rows, k, v, q.shape)))
    call = partial(formula, q, k, v, **theirs)
    ours = partial(mmkern.scaled_dot_product_attention, q, k, v, **options)
    named = [Baseline(formula.__name__.strip("_").replace("_", " "), call)]
    if formula is F.scaled_dot_product_attention:
        named = [Baseline("sdpa", call), *pinned(lambda: call, device)]
        if s.level == "gpu" and s.op in ("attention", "attention-causal") and s.head_dim <= 128:
            named.append(Baseline("flex attention", _flex(q, k, v, s)))
    inputs = [q, k, v, *([options["attn_mask"]] if s.op == "attention-bias" else [])]
    return Problem(ours, [*named, *baselines], exact, compared=lambda outputs: (outputs[0][:, :, some],), inputs=inputs)


def _flex(q: Tensor, k: Tensor, v: Tensor, s: Shape) -> Call:
    """torch's compiled FlexAttention, compiled when first called."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    visible = None
    if s.options.get("is_causal"):
        lengths = (s.q_len, s.k_len)
        visible = create_block_mask(lambda b, h, i, j: i >= j, None, None, *lengths, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, block_mask=visible, enable_gqa=s.heads[0] != s.heads[1])


def pinned(new: Callable[[], Call], device: str) -> list[Baseline]:
    """torch's attention, a `new` call for each backend pinned: on CPU the math one, on CUDA all of them.

    On CPU torch's own choice is flash wherever flash can run, so pinning that would time the same kernel twice.
    """
    backends = [SDPBackend.MATH]
    if device != "cpu":
        backends += [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    return [Baseline(f"sdpa {b.name.lower()}", new(), partial(sdpa_kernel, b)) for b in backends]


def _heads_as_rows(rows: Tensor, k: Tensor, v: Tensor, shape: torch.Size) -> Tensor:
    """One new token with grouped heads: a group's queries are rows of one matrix, as transformers does it."""
    return F.scaled_dot_product_attention(rows, k, v).view(shape)


def _normalise_and_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=TEMPERATURE)


def _cdist_softmax_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.cdist(q, k) / -math.sqrt(q.size(-1))).softmax(-1) @ v


def _exact(
    formula: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], some: Tensor
) -> Tensor:
    """torch's formula in float64 for some of the queries, one key head at a time: all scores at once would not fit.

    Not mmkern's own reference: a mistake in what leads to both of them would not show.
    """
    options = dict(options)
    some = some.to(q.device)
    mask = options.get("attn_mask")
    if options.pop("is_causal", False):
        mask = some[:, None] >= torch.arange(k.size(2), device=q.device)
    elif mask is not None and mask.size(-2) > 1:
        mask = mask[..., some, :]
    if mask is not None:
        mask = (mask.double() if mask.is_floating_point() else mask)[(None,) * (4 - mask.dim())]
        options["attn_mask"] = mask
    q, k, v = q[:, :, some].double(), k.double(), v.double()
    group = q.size(1) // k.size(1)
    outputs = []
    for i in range(k.size(1)):
        heads = slice(i * group, (i + 1) * group)
        mine = options | ({"attn_mask": mask[:, heads]} if mask is not None and mask.size(1) > 1 else {})
        k_i, v_i = (t[:, i : i + 1].expand(-1, group, -1, -1) for t in (k, v))
        outputs.append(formula(q[:, heads], k_i, v_i, **mine))
    return torch.cat(outputs, 1)
