"""Attention by its definition."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from mmkern.reference.gradients import formula_gradients, in_order, of_bits, record
from mmkern.reference.numerics import kept, wide
from mmkern.reference.numerics import visible as let_through
from mmkern.reference.philox import keep_mask

# The arguments that have gradients, in the order in which operators return these and `wanted` has its bits.
DIFFERENTIABLE = ("query", "key", "value", "attn_mask", "temperature", "alibi_slopes", "sinks")


class Similarity(IntEnum):
    """How a query is compared with a key; the numbers are those of the C++ enum."""

    DOT = 0
    COSINE = 1
    EUCLIDEAN = 2
    SQUARED_EUCLIDEAN = 3


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    similarity: int,
    temperature: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    sinks: Tensor | None,
    causal_lower_right: bool,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) @ value and the log-sum-exp of the scores, as `scaled_dot_product_attention` documents.

    query (B..., H, L, E), key (B..., K, S, E), value (B..., K, S, V) -> (B..., H, L, V), (B..., H, L).
    """
    scores, visible = attention_scores(
        query, key, attn_mask, is_causal, scale, similarity, temperature, window_left, window_right, softcap,
        alibi_slopes, key_lengths, causal_lower_right,
    )  # fmt: skip
    v = value.to(scores.dtype).repeat_interleave(query.shape[-3] // max(value.shape[-3], 1), -3)
    # A row with nothing visible gets a maximum of 0, weights of 0 and a log-sum-exp of minus infinity.
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].to(scores.dtype).expand(*scores.shape[:-1], 1)], -1)
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), 0)
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.where(scores == -torch.inf, 0.0, torch.exp(scores - top))
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    weights = (weights / torch.where(empty, 1.0, total))[..., : key.shape[-2]]
    lse = torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1.0, total)) + top).squeeze(-1)
    if dropout_seed is not None:
        keep = keep_mask(dropout_seed, dropout_p, weights.shape, weights.device)
        weights = kept(weights, dropout_p, keep)
        visible = visible & keep
    out = _weighted_sum(weights, v, visible).to(query.dtype)
    return _laid_out(out, query), lse


def attention_scores(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    similarity: int,
    temperature: Tensor | None,
    window_left: int,
    window_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None,
    causal_lower_right: bool,
) -> tuple[Tensor, Tensor]:
    """(B..., H, L, S) scores, minus infinity where hidden, and what is visible. Each step rounds to the dtype."""
    heads, q_len, k_len = query.shape[-3], query.shape[-2], key.shape[-2]
    q, k = wide(query), wide(key.repeat_interleave(heads // max(key.shape[-3], 1), -3))
    length = torch.full((), k_len, device=q.device)
    if key_lengths is not None:
        length = key_lengths.clamp(0, k_len)[..., None, None, None]
    i = torch.arange(q_len, device=q.device)[:, None] + (length - q_len if causal_lower_right else 0)
    j = torch.arange(k_len, device=q.device)
    visible = (j < length).expand(*q.shape[:-1], k_len)
    if is_causal:
        visible = visible & (j <= i)
    if window_left >= 0:
        visible = visible & (j >= i - window_left)
    if window_right >= 0:
        visible = visible & (j <= i + window_right)
    if attn_mask is not None:
        visible = visible & let_through(attn_mask)

    # Padding may hold anything: a NaN in a key that no query sees would reach query's gradient as 0 * NaN.
    k = torch.where(visible.any(-2)[..., None], k, 0.0)
    scores = _similarity(q, k, similarity) * scale
    if temperature is not None:
        scores = scores * temperature[:, None, None]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[..., None, None] * (i - j).abs()
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + torch.where(visible, attn_mask, 0.0)
    visible = visible & (scores != -torch.inf)
    return torch.where(visible, scores, -torch.inf), visible


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    """Gradients of `attention` for what is DIFFERENTIABLE, empty where its bit of the last argument is not set.

    `args` is what `attention` takes, then that bit mask. The formula needs neither out nor lse.
    """
    *given, wanted = args
    named = record(attention)(*given)
    found = formula_gradients(attention, (grad_out, grad_lse), named, of_bits(DIFFERENTIABLE, wanted))
    return in_order(DIFFERENTIABLE, found, named.query)


def attention_backward_gradients(
    grads: Sequence[Tensor | None], args: Any, wanted: Collection[str]
) -> dict[str, Tensor]:
    """Gradients of `attention_backward(*args)`, one batch entry after another: memory for the scores of one.

    args: a record of its arguments.
    """
    batch, seed = args.query.shape[0], args.dropout_seed
    if batch < 2:
        return formula_gradients(attention_backward, grads, args, wanted)
    shared = {"temperature", "sinks", "dropout_seed"}  # by all batch entries, as are their gradients
    given = args._asdict()
    split = {n for n, a in given.items() if isinstance(a, Tensor) and n not in shared and a.shape[0] == batch}
    entries = args.query.shape[:-3].numel() // batch
    parts: dict[str, list[Tensor]] = {}
    for b in range(batch):
        part = args._replace(
            **{name: given[name][b : b + 1] for name in split},
            dropout_seed=None if seed is None else torch.cat([seed, seed.new_tensor([b * entries])]),
        )
        of_part = [
            g[b : b + 1] if g is not None and name not in shared and g.shape[0] == batch else g
            for name, g in zip(DIFFERENTIABLE, grads, strict=True)
        ]
        for name, gradient in formula_gradients(attention_backward, of_part, part, wanted).items():
            parts.setdefault(name, []).append(gradient)
    return {name: torch.cat(g) if name in split else torch.stack(g).sum(0) for name, g in parts.items()}


def _similarity(q: Tensor, k: Tensor, kind: int) -> Tensor:
    if kind == Similarity.COSINE:
        q, k = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (q, k))
    if kind in (Similarity.DOT, Similarity.COSINE):
        return q @ k.transpose(-1, -2)
    square = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
    if kind == Similarity.SQUARED_EUCLIDEAN:
        return -square
    apart = square != 0  # the gradient of a distance of 0 is 0
    return -torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


def _weighted_sum(weights: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """weights @ value, where a NaN or an infinity in a value reaches only rows that see its key."""
    finite = value.isfinite()
    out = weights @ torch.where(finite, value, 0.0)
    if _all(finite):
        return out
    rows = visible.to(out.dtype)
    for sign in (torch.inf, -torch.inf):  # a NaN is both, and their sum is NaN
        there = value.isnan() | (value == sign)
        out = out + torch.where(rows @ there.to(out.dtype) > 0, sign, 0.0)
    return out


def _all(x: Tensor) -> bool:
    """Whether all of x is True; False, too, where values cannot be read: when traced or under vmap."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    try:
        return bool(x.all())
    except RuntimeError:
        return False


def empty_output(query: Tensor, value_dim: int) -> Tensor:
    """Memory for the output (..., H, L, value_dim), in query's order of dims as in torch's op: `view` then works on
    it as on a contiguous query's, and merging the heads of a projection's copies nothing."""
    heads, q_len, head_dim = query.shape[-3:]
    if query.dim() == 4 and value_dim == head_dim and (head_dim <= 1 or query.stride(-1) == 1):
        out = torch.empty_like(query)
        if head_dim <= 1 or out.stride(-1) == 1:
            return out
    if query.stride(-3) < query.stride(-2):
        return query.new_empty((*query.shape[:-3], q_len, heads, value_dim)).transpose(-3, -2)
    return query.new_empty((*query.shape[:-1], value_dim))


def _laid_out(out: Tensor, query: Tensor) -> Tensor:
    strides = empty_output(query, out.shape[-1]).stride()
    order = sorted(range(out.dim()), key=lambda d: -strides[d])
    return out.permute(order).contiguous().permute([order.index(d) for d in range(out.dim())])
