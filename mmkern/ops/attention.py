"""Attention: `scaled_dot_product_attention` with torch's signature and more."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mmkern import reference
from mmkern.ops._attention_arguments import (
    KERNEL_DTYPES,
    align,
    alike,
    autocast,
    checked_lengths,
    checked_mask,
    checked_window,
    per_head,
    unalign,
)
from mmkern.ops._numbers import number, probability
from mmkern.ops.dispatch import Op, Values, autocast_dtype
from mmkern.reference import Similarity

_SIMILARITIES = {name.lower(): int(member) for name, member in Similarity.__members__.items()}
_ALIGNMENTS = ("upper_left", "lower_right")


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lead, (heads, q_len) = query.shape[:-3], query.shape[-3:-1]
    out = reference.empty_output(query, value.shape[-1])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((*lead, heads, q_len), dtype=dtype)


def _refuse_cpu(query: Tensor, *_: object) -> str | None:
    if query.dtype not in KERNEL_DTYPES:
        return f"the CPU kernels take float32, bfloat16 and float16, not {query.dtype}"
    return None


def _refuse_triton(query: Tensor, key: Tensor, value: Tensor, *_: object) -> str | None:
    if query.dtype not in KERNEL_DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > 1024:
        return f"head dims up to 1024, not {max(query.shape[-1], value.shape[-1])}"
    if query.dtype == torch.bfloat16 and query.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16 needs compute capability 8.0 or higher"
    return None


# query, key, value, attn_mask, temperature, alibi_slopes, sinks: what may have a gradient
_LEAVES = (0, 1, 2, 3, 8, 12, 14)
_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float scale, int similarity, Tensor? temperature, int window_left, int window_right, float softcap, "
    "Tensor? alibi_slopes, Tensor? key_lengths, Tensor? sinks, bool causal_lower_right, Tensor? dropout_seed"
)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *args, wanted = query, *rest
    found = []
    for bit, i in enumerate(_LEAVES):
        t = args[i]
        if not wanted >> bit & 1:
            found.append(query.new_empty(0))
        else:
            found.append(_like(t) if i < 3 else t.new_empty(t.shape))
    return tuple(found)


def _like(t: Tensor) -> Tensor:
    """What the kernel allocates for a gradient of t (csrc/cpu/attention/backward.cpp: like)."""
    unit = t.shape[-1] <= 1 or t.stride(-1) == 1
    out = torch.empty_like(t if unit else t.contiguous())
    return out if t.shape[-1] <= 1 or out.stride(-1) == 1 else t.new_empty(t.shape)


def _refuse_cpu_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, *_: object
) -> str | None:
    return _refuse_cpu(query)


def _refuse_triton_backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, *rest: Any
) -> str | None:
    return _refuse_triton(query, *rest)


_attention_backward = Op(
    "attention_bwd(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, " + _SCHEMA + ", int wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    fake=_fake_backward,
    kernels={"cpu": _refuse_cpu_backward, "triton": _refuse_triton_backward},
    triton="attention_backward.attention_bwd",
    backward=lambda grads, args, outputs, wanted: reference.attention_backward_gradients(grads, args, wanted),
    save=lambda args, outputs, wanted: (args, ()),
)


def _backward(grads: Values, args: Values, outputs: Values, wanted: Sequence[bool]) -> list[Tensor | None]:
    grad_out, grad_lse = grads
    if grad_out is None:
        grad_out = torch.zeros_like(outputs[0])
    bits = sum(wanted[i] << bit for bit, i in enumerate(_LEAVES))
    found = _attention_backward(grad_out, grad_lse, *outputs, *args, bits)
    gradients: list[Tensor | None] = [None] * len(args)
    for i, gradient in zip(_LEAVES, found, strict=True):
        gradients[i] = gradient if wanted[i] else None
    return gradients


_attention = Op(
    f"attention_fwd({_SCHEMA}) -> (Tensor, Tensor)",
    reference=reference.attention,
    fake=_fake,
    kernels={"cpu": _refuse_cpu, "triton": _refuse_triton},
    backward=_backward,
    triton="attention.attention_fwd",
)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    similarity: str = "dot",
    temperature: float | Tensor | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
) -> Any:
    """Attention with the signature of `torch.nn.functional.scaled_dot_product_attention`, and more after it.

        score[i, j] = scale * temperature * similarity(query[i], key[j])
        score = softcap * tanh(score / softcap)            if softcap
        score -= alibi_slope * |i + offset - j|            if alibi_slopes
        score += attn_mask[i, j]                           if attn_mask is a float mask
        out[i] = sum_j softmax_j(score[i, j]) * value[j]   over the visible keys j

    Args:
        query: (..., heads, q_len, head_dim), float32, bfloat16, float16 or float64. Two dims are one head, three
            are (batch, q_len, head_dim) with one head. Leading dims of all three broadcast.
        key: (..., kv_heads, k_len, head_dim), of query's dtype and device.
        value: (..., kv_heads, k_len, value_dim), likewise.
        attn_mask: broadcastable to (..., heads, q_len, k_len): bool (True takes part) or float (added; query's
            dtype or float32; minus infinity hides the key). Read with its strides, never expanded in memory.
        dropout_p: chance in [0, 1] with which a weight is dropped, the others being divided by 1 - dropout_p.
        is_causal: key j is visible to query i where j <= i + offset. Combines with attn_mask.
        scale: factor of the similarity; default 1 / sqrt(head_dim) for "dot", 1 for the others.
        enable_gqa: let groups of heads // kv_heads query heads share a key head.
        similarity: "dot": q.k; "cosine": of the angle; "euclidean": -|q - k|; "squared_euclidean": -|q - k|^2.
        temperature: another factor, a number or a float tensor () or (heads,), learned if it requires grad.
        window: (left, right): query i sees keys i + offset - left .. i + offset + right; None is unbounded.
        softcap: bound of the scores, > 0.
        alibi_slopes: float (heads,) or (..., heads).
        key_lengths: integers broadcastable to the leading dims but the heads: keys j < key_lengths are visible. Where
            no value can be read (in a graph, under vmap, on a GPU), one outside [0, k_len] counts as the nearer end.
        sinks: float (heads,): one more score in each row's softmax, with no value.
        causal_alignment: where query 0 stands on the key axis: "upper_left": offset 0; "lower_right": offset
            k_len - q_len, or key_lengths - q_len, so that the last query stands at the last key.
        return_lse: also return the log-sum-exp of each row's scores (sinks included), (..., heads, q_len) float32
            (float64 for float64 inputs), by which results over parts of the keys merge.

    A query that sees no key gets 0, with a log-sum-exp of minus infinity. NaN in a query reaches its row; NaN in a
    hidden key or value reaches nobody.

    Returns:
        (..., heads, q_len, value_dim) of query's dtype, or that and the log-sum-exp.

    Raises:
        TypeError: a dtype or the kind of an argument is wrong.
        ValueError: shapes do not fit, devices differ, or a value is out of range.

    Sources: Vaswani et al. 2017 (attention); Milakov and Gimelshein 2018 (online softmax); Dao et al. 2022 (tiling);
    Press et al. 2022 (ALiBi); Liu et al. 2022 (cosine similarity with a learned temperature).

    Example:
        >>> import mmkern, torch
        >>> q, k, v = torch.randn(3, 2, 8, 16, 64).unbind(0)
        >>> mmkern.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 16, 64])
    """
    if has_torch_function_variadic(query, key, value, attn_mask):
        return handle_torch_function(
            scaled_dot_product_attention, (query, key, value, attn_mask), query, key, value, attn_mask, dropout_p,
            is_causal, scale, enable_gqa, similarity=similarity, temperature=temperature, window=window,
            softcap=softcap, alibi_slopes=alibi_slopes, key_lengths=key_lengths, sinks=sinks,
            causal_alignment=causal_alignment, return_lse=return_lse,
        )  # fmt: skip
    if (
        torch._C._is_any_autocast_enabled()
        and isinstance(query, Tensor)
        and (dtype := autocast_dtype(query)) is not None
    ):
        query, key, value = (autocast(t, dtype) for t in (query, key, value))
        if isinstance(attn_mask, Tensor) and attn_mask.dtype in KERNEL_DTYPES and attn_mask.dtype != dtype:
            attn_mask = attn_mask.float()  # of the two 16-bit dtypes, it may have the other
        with torch.autocast(query.device.type, enabled=False):
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, similarity=similarity,
                temperature=temperature, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
                key_lengths=key_lengths, sinks=sinks, causal_alignment=causal_alignment, return_lse=return_lse,
            )  # fmt: skip
    rank = 4
    if not alike(query, key, value):
        rank, query, key, value = align(query, key, value, enable_gqa)
    if dropout_p != 0.0:
        dropout_p = probability("dropout_p", dropout_p)
    kind = 0
    if similarity != "dot":
        if not isinstance(similarity, str) or similarity not in _SIMILARITIES:
            raise ValueError(f"similarity: expected one of {', '.join(_SIMILARITIES)}, got {similarity!r}")
        kind = _SIMILARITIES[similarity]
    if scale is None:
        scale = 1.0 / sqrt(query.shape[-1]) if kind == 0 and query.shape[-1] else 1.0
    else:
        scale = number("scale", scale)

    left = right = -1
    lower_right = False
    if (
        attn_mask is not None
        or temperature is not None
        or window is not None
        or softcap is not None
        or alibi_slopes is not None
        or key_lengths is not None
        or sinks is not None
        or causal_alignment != "upper_left"
    ):
        attn_mask = checked_mask(attn_mask, query, key, rank, enable_gqa)
        if isinstance(temperature, Tensor):
            temperature = per_head("temperature", temperature, query, scalar=True)
        elif temperature is not None:
            scale *= number("temperature", temperature)
            temperature = None
        left, right = checked_window(window)
        if softcap is not None and not ((softcap := number("softcap", softcap)) > 0):
            raise ValueError(f"softcap: expected a number > 0, got {softcap}")
        if alibi_slopes is not None:
            alibi_slopes = per_head("alibi_slopes", alibi_slopes, query, batched=True)
        if key_lengths is not None:
            key_lengths = checked_lengths(key_lengths, query, key.shape[-2])
        if sinks is not None:
            sinks = per_head("sinks", sinks, query)
        if causal_alignment not in _ALIGNMENTS:
            raise ValueError(f"causal_alignment: expected one of {', '.join(_ALIGNMENTS)}, got {causal_alignment!r}")
        lower_right = causal_alignment == "lower_right"
    # One draw from the device's default generator: manual_seed and checkpointing work as with torch's dropout.
    seed = None
    if dropout_p > 0.0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    out, lse = _attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, kind, temperature, left, right, softcap or 0.0,
        alibi_slopes, key_lengths, sinks, lower_right, seed,
    )  # fmt: skip
    if rank < 4:
        out, lse = unalign(out, lse, rank, enable_gqa)
    return (out, lse) if return_lse else out
