"""mmkern's attention for Hugging Face Transformers, under the name "mmkern".

    mmkern.integrations.transformers.register()
    model = AutoModel.from_pretrained(path, attn_implementation="mmkern")

or, for a model already loaded, `model.set_attn_implementation("mmkern")`. Grouped key heads, scale, softcap, causal and
sliding-window masks, attention sinks and position biases (T5) arrive as Transformers passes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

import mmkern


def register(name: str = "mmkern") -> None:
    """Make `attn_implementation=name` mean mmkern's attention, in every model of this process; again is harmless."""
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The boolean mask sdpa would get, or None where there is nothing to mask; made once per forward pass.

    Where it only hides padding on the right (under a causal mask or none), the mask also carries the batch's
    lengths as attributes, `key_lengths` and `is_causal`: attention then skips the padding instead of masking it.
    A model that slices or combines the mask loses the attributes and keeps a correct mask.
    """
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    whole = all(isinstance(offset, int) and offset == 0 for offset in (q_offset, kv_offset))
    causal = mask_function is causal_mask_function and q_length == kv_length
    if (
        mask is not None
        and attention_mask is not None
        and attention_mask.shape == (batch_size, kv_length)
        and whole
        and (causal or mask_function is bidirectional_mask_function)
        and not torch.compiler.is_compiling()
    ):
        lengths = attention_mask.sum(-1)
        if torch.equal(attention_mask, torch.arange(kv_length, device=lengths.device) < lengths[:, None]):
            mask.key_lengths, mask.is_causal = lengths, causal  # type: ignore[attr-defined]
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: object = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as a Transformers layer calls it.

    Args:
        query: (batch, heads, q_len, head_dim); key, value: (batch, key heads, k_len, head_dim).
        attention_mask: from `attention_mask` above: True where a query sees a key; or a float mask that is added.
        position_bias: (1 or batch, heads, q_len, k_len), added to the scores.
        sliding_window: keys a query sees, itself included; part of the mask where there is one.
        s_aux: (heads,) attention sinks.

    Returns:
        (batch, q_len, heads, head_dim) and None: attention weights are never made.

    Raises:
        ValueError: a paged cache or attention weights are asked for.
    """
    if cache is not None:
        raise ValueError("cache: mmkern's attention takes no paged cache; use attn_implementation='sdpa' for it")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: mmkern never makes the weights; use attn_implementation='eager' for them")
    q_len, k_len = query.size(2), key.size(2)
    # as for sdpa: a mask, when there is one, says everything; without one a decoder's prompt is causal, and a
    # single new token sees all keys
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and q_len > 1
    lengths = getattr(attention_mask, "key_lengths", None)
    if lengths is not None:
        causal, attention_mask = attention_mask.is_causal, None  # type: ignore[union-attr]
    window = None
    if sliding_window is not None and attention_mask is None and lengths is None and sliding_window < k_len:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    output = mmkern.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_combine(attention_mask, position_bias),
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.size(1) != key.size(1),
        window=window,
        softcap=softcap,
        key_lengths=lengths,
        sinks=s_aux,
        causal_alignment="upper_left" if window is None or q_len > 1 else "lower_right",
    )
    return output.transpose(1, 2).contiguous(), None


def _combine(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask
