"""What attention is tested on: a second formula, its features alone, and random calls that combine them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from mmkern.reference.philox import keep_mask
from mmkern.testing import FEATURES, Sizes, isas, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIMILARITIES = ("dot", "cosine", "euclidean", "squared_euclidean")
LENGTHS = (0, 1, 2, 5, 6, 7, 48, 49, 63, 64, 65, 130, 257, 300)
HEAD_DIMS = (1, 3, 8, 16, 20, 32, 64, 72, 80, 96, 128, 129, 160, 256)


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
        factor = keep / (1 - dropout_p) if dropout_p < 1 else keep
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


class Case:
    """Arguments of one call; its repr is what a failing test prints."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> None:
        self.q, self.k, self.v, self.options = q, k, v, options

    def __repr__(self) -> str:
        shown = {
            n: f"{x.dtype}{tuple(x.shape)}" if isinstance(x, Tensor) else x
            for n, x in {"q": self.q, "k": self.k, "v": self.v, **self.options}.items()
        }
        return str(shown)

    def cast(self, dtype: torch.dtype) -> Case:
        def to(x: object) -> object:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return Case(to(self.q), to(self.k), to(self.v), {n: to(x) for n, x in self.options.items()})


def tensors(dtype: torch.dtype = torch.float32, batch=2, heads=4, kv_heads=2, q_len=33, k_len=70, dim=24, v_dim=24):
    return (
        randn(batch, heads, q_len, dim, dtype=dtype, seed=1),
        randn(batch, kv_heads, k_len, dim, dtype=dtype, seed=2),
        randn(batch, kv_heads, k_len, v_dim, dtype=dtype, seed=3),
    )


BIAS, KEEP = Sizes().bias, Sizes().keep  # of the sizes of `tensors`
ALONE = {name: options(Sizes()) for name, options in FEATURES.items()}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, str]:
    def pick(*choices: object) -> object:
        return draw(st.sampled_from(choices))

    dtype, similarity = pick(*DTYPES), pick(*SIMILARITIES)
    batch, kv_heads, group = pick(1, 2, 3), pick(1, 2), pick(1, 1, 2, 5)
    heads, q_len, k_len = kv_heads * group, pick(*LENGTHS), pick(*LENGTHS)
    dim = pick(*HEAD_DIMS)
    if batch * heads * q_len * k_len * dim > 4e6:
        batch, heads, kv_heads, q_len = 1, group, 1, 7
    seed, layout = pick(1, 2, 3), pick("contiguous", "transposed", "strided", "offset", "expanded")
    v_dim = pick(dim, dim, 1, 16, 40, 130)
    q = randn(batch, heads, q_len, dim, dtype=dtype, seed=seed, layout=layout)
    k = randn(batch, kv_heads, k_len, dim, dtype=dtype, seed=seed + 10, layout=pick("contiguous", layout))
    v = randn(batch, kv_heads, k_len, v_dim, dtype=dtype, seed=seed + 20, layout=pick("contiguous", layout))
    scale = {"dot": None, "cosine": 4.0, "euclidean": 0.3, "squared_euclidean": 1 / dim}[similarity]
    full = tuple(pick(n, 1) for n in (batch, heads, q_len, k_len))[pick(0, 0, 1, 2) :]
    bias = randn(*full, seed=seed + 30)
    mask = {"no": None, "bool": bias > -0.7, "float32": bias, "own": bias.to(dtype)}
    mask["holes"] = bias.masked_fill(bias < -0.7, -math.inf)
    slopes = randn(batch, heads, seed=seed).abs() / 50  # scores of 100 and more would cost float32 its 1e-6
    options = {
        "attn_mask": mask[pick("no", "no", *mask)],
        "is_causal": pick(False, True),
        "scale": scale,
        "enable_gqa": heads != kv_heads or pick(False, True),
        "similarity": similarity,
        "temperature": pick(None, 0.7, torch.tensor(1.5), randn(heads, seed=seed).abs()),
        "window": pick(None, None, (0, 0), (5, None), (None, 3), (100, 50)),
        "softcap": pick(None, None, 2.0),
        "alibi_slopes": pick(None, None, slopes[0], slopes),
        "key_lengths": pick(None, None, torch.arange(batch) * k_len // batch, torch.tensor(k_len)),
        "sinks": pick(None, None, randn(heads, seed=seed)),
        "causal_alignment": pick("upper_left", "lower_right"),
    }
    return Case(q, k, v, options), pick(*isas(), None)
