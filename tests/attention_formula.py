"""Attention as its documentation says it, one batch entry and head at a time: a second formula beside the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern.reference.philox import keep_mask


class Fused(torch.autograd.Function):
    """(softmax(scores) * factor) @ v and the log-sum-exp, with the backward of fused kernels, torch's among them.

    That one takes the sum of weights times their gradients from the output, and so rounds otherwise than autograd.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, factor: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
        weights = torch.exp(scores - lse[:, None].nan_to_num(neginf=0.0))
        out = (weights * factor) @ v
        ctx.save_for_backward(weights, factor, v, out)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, Tensor]:
        weights, factor, v, out = ctx.saved_tensors
        delta = (grad_out * out).sum(-1, keepdim=True) - grad_lse[:, None]
        return weights * (grad_out @ v.T * factor - delta), None, (weights * factor).T @ grad_out


def formula(q: Tensor, k: Tensor, v: Tensor, o: dict) -> tuple[Tensor, Tensor]:
    """What `scaled_dot_product_attention(q, k, v, **o)` documents, in q's dtype, one batch and head at a time."""
    factor = torch.ones(())
    if dropout_p := o.get("dropout_p", 0.0):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
        keep = keep_mask(seed, dropout_p, (*q.shape[:-1], k.shape[-2]), q.device)
        factor = keep.to(q.dtype) / (1 - dropout_p) if dropout_p < 1 else keep
    factor = factor.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    (batch, heads, q_len, dim), (_, kv_heads, k_len, _) = q.shape, k.shape
    similarity = o.get("similarity", "dot")
    scale = o.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(dim) if similarity == "dot" else 1.0
    i, j = torch.arange(q_len)[:, None], torch.arange(k_len)[None, :]
    outs, lses = [], []
    for b in range(batch):
        n = k_len if o.get("key_lengths") is None else int(o["key_lengths"].expand(batch)[b])
        offset = n - q_len if o.get("causal_alignment") == "lower_right" else 0
        left, right = o.get("window") or (None, None)
        hidden = (j >= n).expand(q_len, k_len).clone()
        hidden |= (j > i + offset) if o.get("is_causal") else False
        hidden |= (j < i + offset - left) if left is not None else False
        hidden |= (j > i + offset + right) if right is not None else False
        for h in range(heads):
            x, y, z = q[b, h], k[b, h * kv_heads // heads], v[b, h * kv_heads // heads]
            if similarity == "dot":
                s = x @ y.T
            elif similarity == "cosine":
                s = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T
            else:
                s = -torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
                s = s if similarity == "euclidean" else -s.square()
            t = o.get("temperature")
            s = s * scale * (1.0 if t is None else t if isinstance(t, float) else t.to(s).expand(heads)[h])
            s = s if o.get("softcap") is None else o["softcap"] * torch.tanh(s / o["softcap"])
            if o.get("alibi_slopes") is not None:
                s = s - o["alibi_slopes"].to(s).expand(batch, heads)[b, h] * (i + offset - j).abs()
            gone = hidden
            if o.get("attn_mask") is not None:
                m = o["attn_mask"].expand(batch, heads, q_len, k_len)[b, h]
                s = s if m.dtype == torch.bool else s + m.to(s)
                gone = hidden | (~m if m.dtype == torch.bool else m == -math.inf)
            s = s.masked_fill(gone, -math.inf)
            f = factor[b, h]
            if o.get("sinks") is not None:  # a key of value 0
                s = torch.cat([s, o["sinks"][h].to(s).expand(q_len, 1)], -1)
                f, z = (F.pad(t, pad) for t, pad in ((f, (0, 1)), (z, (0, 0, 0, 1))))
            out, lse = Fused.apply(s, f, z)
            outs.append(out)
            lses.append(lse)
    if not outs:
        return q.new_zeros(batch, heads, q_len, v.shape[-1]), q.new_zeros(batch, heads, q_len)
    return torch.stack(outs).unflatten(0, (batch, heads)), torch.stack(lses).unflatten(0, (batch, heads))
