"""Attention's gradients at the sizes that models train with, alone and with the forward pass before them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkern
from mmkern.benchmarks.bench_attention import ALL, CAUSAL, TWO, Shape, pinned
from mmkern.benchmarks.inputs import SCORES, normal, sample
from mmkern.benchmarks.records import DTYPES, SEED, Baseline, Case, Outputs, Problem
from mmkern.reference.philox import keep_mask

DROPOUT = {"dropout_p": 0.1}
SHAPES = [
    Shape("attention-backward", "BERT-base 128", 8, (12, 12), 128, 128, 64),
    Shape("attention-backward", "BERT-base 512", 2, (12, 12), 512, 512, 64, "quick"),
    Shape("attention-backward", "ViT-B/16 224px", 4, (12, 12), 197, 197, 64),
    Shape("attention-backward", "1024 tokens", 2, (8, 8), 1024, 1024, 64, "full"),
    Shape("attention-backward", "one head 1024", 1, (1, 1), 1024, 1024, 64),
    Shape("attention-backward", "one head 2048", 1, (1, 1), 2048, 2048, 64, "full"),
    Shape("attention-backward-causal", "Llama prefill 512", 1, (32, 8), 512, 512, 128, "quick", options=CAUSAL),
    Shape("attention-backward-causal", "GPT-2 1024", 1, (12, 12), 1024, 1024, 64, options=CAUSAL),
    Shape("attention-backward-causal", "1024 tokens", 2, (8, 8), 1024, 1024, 64, "full", options=CAUSAL),
    Shape("attention-dropout", "BERT-base 128", 8, (12, 12), 128, 128, 64, "quick", options=DROPOUT),
    Shape("attention-dropout", "BERT-base 512", 2, (12, 12), 512, 512, 64, "full", options=DROPOUT),
    Shape("attention-dropout", "GPT-2 1024", 1, (12, 12), 1024, 1024, 64, "full", options=CAUSAL | DROPOUT),
    Shape("attention-mask-gradient", "Swin-T windows 49", 256, (3, 3), 49, 49, 32, "quick"),
    Shape("attention-mask-gradient", "T5-base 512", 1, (12, 12), 512, 512, 64, options={"scale": 1.0}),
]

SHAPES += [
    Shape(f"attention-backward{'-causal' if causal else ''}", f"{length} tokens, {dim} wide", 16384 // length,
          (2048 // dim, 2048 // dim), length, length, dim, "gpu", ("bfloat16",), CAUSAL if causal else {})
    for causal in (False, True) for dim in (64, 128) for length in (2048, 8192)
]  # fmt: skip


def cases(shapes: Sequence[Shape] = SHAPES) -> Iterator[Case]:
    for s in shapes:
        alone = s.op.startswith("attention-backward")
        pairs = s.q_len * (s.q_len + 1) / 2 if s.options.get("is_causal") else s.q_len * s.k_len
        rows = s.batch * (s.heads[0] * s.q_len + s.heads[1] * s.k_len) * s.head_dim
        heads = str(s.heads[0]) if s.heads[0] == s.heads[1] else f"{s.heads[0]}/{s.heads[1]}"
        for name in TWO if s.level != "gpu" and s.dtypes == ALL else s.dtypes:
            dtype = DTYPES[name]
            yield Case(
                "attention",
                s.op,
                s.name,
                f"{s.batch}x{heads}x{s.q_len}x{s.head_dim}",
                dtype,
                partial(build, s),
                # backward: the scores again, and a product for each of dV, dP, dQ and dK; forward: two products
                flops=2.0 * (5 if alone else 7) * s.batch * s.heads[0] * pairs * s.head_dim,
                # backward: q, k, v, out and its gradient read, dq, dk, dv written; forward: q, k, v read, out written
                bytes=(4.0 if alone else 6.0) * rows * dtype.itemsize,
                bound="bf16_dot" if dtype is torch.bfloat16 else "fma",
                level=s.level,
            )


def build(s: Shape, dtype: torch.dtype, device: str) -> Problem:
    # (batch, length, heads, head_dim) in memory, as a model's projections leave it and want the gradient
    new = partial(normal, dtype=dtype, layout="transposed")
    size = s.head_dim**-0.5 if s.options.get("scale") == 1.0 else 1.0
    q = new(s.batch, s.heads[0], s.q_len, s.head_dim, seed=1, scale=size)
    k, v = (new(s.batch, s.heads[1], s.k_len, s.head_dim, seed=seed) for seed in (2, 3))
    grad = new(s.batch, s.heads[0], s.q_len, s.head_dim, seed=4).to(device)
    inputs = [q, k, v]
    if s.op == "attention-mask-gradient":
        inputs.append(normal(1, s.heads[0], s.q_len, s.k_len, dtype=dtype, seed=5))
    inputs = [t.to(device) for t in inputs]
    options = s.options | ({"enable_gqa": True} if s.heads[0] != s.heads[1] else {})
    sdpa = partial(F.scaled_dot_product_attention, **options)
    gradients = partial(_Gradients, inputs=inputs, grad=grad, once=s.op.startswith("attention-backward"))
    baselines = [Baseline("sdpa", gradients(sdpa))]
    if gradients.keywords["once"]:  # of dropout and of a mask's gradient torch has no kernel: the first is the math one
        baselines += pinned(lambda: gradients(sdpa), device)
    part = _Part(s)
    formula, yardstick = sdpa, None
    if "dropout_p" in options:
        formula = partial(_with_dropout, part(_keep(s, device)), options)
    elif s.options.get("is_causal"):
        formula = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    else:
        formula = partial(F.scaled_dot_product_attention, enable_gqa=True, scale=options.get("scale"))

    def exact(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        given = [part(t.detach()).to(dtype) for t in inputs]
        return _Gradients(formula if len(given) == 3 else part.masked(formula), given, part(grad).to(dtype))()

    if "dropout_p" in options:
        yardstick = partial(exact, dtype)
    ours = gradients(partial(mmkern.scaled_dot_product_attention, **options))
    # what a graph that is kept has saved must stay as it was: there the gradient of the output changes alone
    changed = [grad] if gradients.keywords["once"] else [*inputs, grad]
    return Problem(ours, baselines, exact, part.of, kind="gradient", yardstick=yardstick, inputs=changed)


class _Part:
    """Some batch entries and key heads with the query heads that read them: their gradients need nothing else.

    A mask's gradient is a sum over the batch, so that there all batch entries of some heads are taken.
    """

    def __init__(self, s: Shape) -> None:
        self.kv, self.group = s.heads[1], s.heads[0] // s.heads[1]
        self.whole_batch = s.op == "attention-mask-gradient"
        each = self.group * s.q_len * s.k_len * (s.batch if self.whole_batch else 1)
        chosen = sample(self.kv if self.whole_batch else s.batch * self.kv, max(2, SCORES // each))
        self.entry, self.head = (
            (torch.arange(s.batch), chosen) if self.whole_batch else (chosen // self.kv, chosen % self.kv)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """(parts, heads of a part, length, width) of x: queries, keys, values, a mask or any gradient of them."""
        if self.whole_batch:
            return x[:, self.head]
        return x.unflatten(1, (self.kv, -1))[self.entry, self.head]

    def of(self, outputs: Outputs) -> Outputs:
        return tuple(map(self, outputs))

    @staticmethod
    def masked(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, mask: formula(q, k, v, attn_mask=mask)


class _Gradients:
    """A call that gives the gradients of forward(*inputs); if `once`, of a graph that the first call makes and keeps.

    The first call and not the constructor: it runs inside what pins a baseline's backend or records ours.
    """

    def __init__(
        self, forward: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, once: bool = False
    ) -> None:
        self.forward, self.grad, self.once = forward, grad, once
        self.inputs = [t.detach().requires_grad_() for t in inputs]
        self.out: Tensor | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        out = self.forward(*self.inputs) if self.out is None else self.out
        if self.once:
            self.out = out
        return torch.autograd.grad(out, self.inputs, self.grad, retain_graph=self.once)


def _keep(s: Shape, device: str) -> Tensor:
    """What ours keeps if its seed is the first number drawn after torch.manual_seed(SEED), as in a check."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return keep_mask(seed, s.options["dropout_p"], (s.batch, s.heads[0], s.q_len, s.k_len), torch.device(device))


def _with_dropout(keep: Tensor, options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as torch's math backend has it (16-bit types in float32), what is kept given instead of drawn."""
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) / q.size(-1) ** 0.5
    if options.get("is_causal"):
        scores = scores.masked_fill(torch.ones_like(keep).triu(1), -torch.inf)
    weights = torch.where(keep, scores.softmax(-1) / (1 - options["dropout_p"]), 0.0)
    return (weights @ v.to(wide)).to(q.dtype)
