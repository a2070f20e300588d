"""Attention maps, computed from the log-sum-exp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """The softmax weights of an attention whose log-sum-exp is known: exp(score - lse), no second softmax.

    Args:
        query: (B, H, L, D). key: (B, K, S, D), K a divisor of H.
        lse: (B, H, L), from `mmkern.scaled_dot_product_attention(..., return_lse=True)` with the same arguments.
        The others: as there.

    Returns:
        (B, H, L, S) float32 (float64 for float64): each row sums to 1, or is 0 where the query sees no key.
    """
    if torch.is_autocast_enabled(query.device.type):
        with torch.autocast(query.device.type, enabled=False):  # its matmul would round what lse did not
            return attention_weights(
                query, key, lse, attn_mask, scale=scale, is_causal=is_causal, similarity=similarity,
                temperature=temperature, alibi_slopes=alibi_slopes, key_lengths=key_lengths,
                causal_alignment=causal_alignment, softcap=softcap,
            )  # fmt: skip
    q, k = (t.to(lse.dtype) for t in (query, key.repeat_interleave(query.shape[1] // key.shape[1], 1)))
    if similarity == "cosine":
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    if similarity in ("dot", "cosine"):
        scores = q @ k.mT
    else:
        scores = -torch.cdist(q, k, compute_mode="donot_use_mm_for_euclid_dist")
        scores = -scores.square() if similarity == "squared_euclidean" else scores
    scores = scores * scale if temperature is None else scores * scale * temperature[:, None, None]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    # Where query i stands on the key axis, and which keys j it sees.
    q_len, k_len = scores.shape[-2:]
    lengths = torch.full((1,), k_len) if key_lengths is None else key_lengths
    lengths = lengths.to(scores.device)[:, None, None, None]
    i = torch.arange(q_len, device=scores.device)[:, None]
    i = i + (lengths - q_len if causal_alignment == "lower_right" else 0)
    j = torch.arange(k_len, device=scores.device)
    visible = j < lengths
    if is_causal:
        visible = visible & (j <= i)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * (i - j).abs()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        visible = visible & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    visible = visible & (scores != -torch.inf)
    return torch.where(visible, (scores - lse[..., None]).where(visible, 0.0).exp(), 0.0)
