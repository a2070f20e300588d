"""Attention maps, computed from the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkern import reference
from mmkern.reference import Similarity


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    similarity: str = "dot",
    temperature: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal_alignment: str = "upper_left",
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The softmax weights of an attention whose log-sum-exp is known: exp(score - lse).

    Args:
        query: (B, H, L, D). key: (B, K, S, D), K a divisor of H.
        lse: (B, H, L), from `mmkern.scaled_dot_product_attention(..., return_lse=True)` with the same arguments.
        The others: as there.

    Returns:
        (B, H, L, S) float32 (float64 for float64): each row sums to 1 (less, with sinks), or is 0 where the query sees
        no key.
    """
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):  # its matmul would round what lse did not
            return attention_weights(
                query, key, lse, attn_mask, scale=scale, is_causal=is_causal, similarity=similarity,
                temperature=temperature, alibi_slopes=alibi_slopes, key_lengths=key_lengths,
                causal_alignment=causal_alignment, softcap=softcap, sinks=sinks,
            )  # fmt: skip
    scores, visible = reference.attention_scores(
        query, key, attn_mask, is_causal, scale, Similarity[similarity.upper()], temperature, -1, -1, softcap or 0.0,
        alibi_slopes, key_lengths, causal_alignment == "lower_right",
    )  # fmt: skip
    # A log-sum-exp of 1e9 is rounded to a multiple of 64 and tells no sum: there, the row's own.
    far = ~(lse.abs() < 128)[..., None]
    weights = (scores - lse[..., None]).where(visible & ~far, -torch.inf).exp()
    own = scores if sinks is None else torch.cat([scores, sinks[:, None, None].expand(*lse.shape, 1)], -1)
    own = own.masked_fill(~visible.any(-1, keepdim=True), 0.0).softmax(-1)[..., : key.shape[-2]]
    return torch.where(far, own, weights).where(visible, 0.0)
