"""Multi-head attention as a module, the keys it keeps while text is generated, and its attention maps.

Shapes: B batch, H heads, K key heads, L queries, S keys, D channels of a head, E = H D channels.
"""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkern
from mmkern.nn.maps import attention_weights


class KVCache:
    """Keys and values that an attention has seen, so that generating text computes each of them once.

    Args:
        fixed: keep those of the first call and never add any: the keys of cross-attention.

    Memory doubles when it is full. For inference: gradients do not pass through it.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        self.fixed = fixed
        self.length = 0
        self._kept: list[Tensor] = []  # key and value (B, K, capacity, D)

    @property
    def complete(self) -> bool:
        """Whether no more keys will be taken."""
        return self.fixed and bool(self._kept)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, K, T, D) of the next T positions; returns those of all positions."""
        end = self.length + key.shape[-2]
        if not self._kept or end > self._kept[0].shape[-2]:
            capacity = end if self.fixed else max(16, 2 * end)
            grown = [t.new_empty(*t.shape[:-2], capacity, t.shape[-1]) for t in (key, value)]
            for new, old in zip(grown, self._kept, strict=False):
                new[..., : self.length, :] = old[..., : self.length, :]
            self._kept = grown
        for kept, new in zip(self._kept, (key, value), strict=True):
            kept[..., self.length : end, :] = new
        self.length = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        key, value = (t[..., : self.length, :] for t in self._kept)
        return key, value

    def reorder(self, index: Tensor) -> None:
        """Let batch entry i go on from what entry index[i] has seen. index: int64 (B,)."""
        self._kept = [t.index_select(0, index) for t in self._kept]


class MultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` on mmkern's attention: the same parameters, state_dict, masks and results.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as torch's.
        add_bias_kv, add_zero_attn: torch's; only False is taken.
        kv_heads: heads of keys and values, each shared by num_heads // kv_heads heads of queries; default num_heads.
        similarity: "dot" (scaled by 1 / sqrt(D)), "cosine" (times a learned temperature for each head, at first 10,
            at most 100: Liu et al. 2022), "euclidean", or "squared_euclidean" (scaled by 1 / (2 sqrt(D)), the
            score of "dot" less the squares of both norms).
        rotary: turn queries and keys by their positions, with base `rotary_base`; D must be even.
        alibi: lower scores with the distance, by slopes for each head (Press et al. 2022).

    A query whose keys are all hidden gets out_proj's bias, where torch gives NaN.

    Raises:
        ValueError: sizes do not divide, an option is unknown or not taken.

    Example:
        >>> import mmkern.nn, torch
        >>> attention = mmkern.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> out, weights = attention(*[torch.randn(1, 3, 8)] * 3)
        >>> out.shape, weights.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 3, 3]))
    """

    in_proj_weight: Tensor | None
    in_proj_bias: Tensor | None
    alibi_slopes: Tensor | None
    # nn.TransformerEncoderLayer reads it in inference: True would hand our weights to torch's fused layer.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        kv_heads: int | None = None,
        similarity: str = "dot",
        rotary: bool = False,
        rotary_base: float = 10000.0,
        alibi: bool = False,
    ) -> None:
        super().__init__()
        if add_bias_kv or add_zero_attn:
            raise ValueError("add_bias_kv, add_zero_attn: not supported; append the row to key and value instead")
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim: expected a multiple of num_heads = {num_heads}, got {embed_dim}")
        kv_heads = num_heads if kv_heads is None else kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of num_heads = {num_heads}, got {kv_heads}")
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        scales = {"dot": 1 / sqrt(self.head_dim), "squared_euclidean": 0.5 / sqrt(self.head_dim)}
        if similarity not in ("dot", "cosine", "euclidean", "squared_euclidean"):
            raise ValueError(
                f"similarity: expected one of dot, cosine, euclidean, squared_euclidean, got {similarity!r}"
            )
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary: needs an even embed_dim / num_heads, got {self.head_dim}")
        self.similarity, self.scale = similarity, scales.get(similarity, 1.0)
        self.dropout, self.batch_first = dropout, batch_first
        self.rotary_base = rotary_base if rotary else None

        # Parameters by torch's names, made and drawn in its order: a seed gives both modules the same ones.
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        key_dim = kv_heads * self.head_dim
        kdim, vdim = kdim or embed_dim, vdim or embed_dim
        shapes = {"q_proj_weight": (embed_dim, embed_dim), "k_proj_weight": (key_dim, kdim)}
        shapes |= {"v_proj_weight": (key_dim, vdim)}
        if kdim == vdim == embed_dim:
            shapes = {"in_proj_weight": (embed_dim + 2 * key_dim, embed_dim)}
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            weight = nn.Parameter(torch.empty(shapes[name], **like)) if name in shapes else None
            self.register_parameter(name, weight)
        in_bias = nn.Parameter(torch.zeros(embed_dim + 2 * key_dim, **like)) if bias else None
        self.register_parameter("in_proj_bias", in_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **like)
        for name in shapes:
            nn.init.xavier_uniform_(getattr(self, name))
        if bias:
            nn.init.zeros_(self.out_proj.bias)
        if similarity == "cosine":
            self.log_temperature = nn.Parameter(torch.full((num_heads,), log(10.0), **like))
        # Float32 whatever dtype: the kernel computes with them. Not saved: they follow from num_heads, also where this
        # module was built on the meta device, or has just been moved or cast (`_apply`).
        slopes = mmkern.alibi_slopes(num_heads, device=device) if alibi else None
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> MultiheadAttention:
        """Of torch: moves, casts or empties what the module holds; slopes, which no state dict has, are made anew."""
        super()._apply(fn, recurse)
        if self.alibi_slopes is not None:
            self.alibi_slopes = mmkern.alibi_slopes(self.num_heads, device=self.alibi_slopes.device)
        return self

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        key_lengths: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments up to is_causal as torch's.

        Args:
            query: (L, B, E), or (B, L, E) with batch_first, or (L, E).
            key, value: (S, B, kdim) and (S, B, vdim), likewise.
            key_padding_mask: (B, S) or (S,): True hides a key; float is added.
            need_weights: return attention maps, too: (B, L, S), or (B, H, L, S) if not average_attn_weights. They are
                computed from the log-sum-exp, before dropout, and cost the memory that attention otherwise saves.
            attn_mask: (L, S) or (B H, L, S): True hides a key (as in torch: the ops take the opposite); float is added.
            is_causal: hide later keys. torch wants attn_mask as well; here it may be None.
            key_lengths: int (B,): hide keys from there on. Read as numbers: cheaper than a mask.
            cache: append the keys to these and attend to all; with is_causal the last query stands at the last key.
                Once a fixed cache is complete, key and value are not read.

        Returns:
            (out of query's shape, maps or None).

        Raises:
            TypeError, ValueError: as `mmkern.scaled_dot_product_attention`, or a shape does not fit.
        """
        unbatched = query.dim() == 2
        sequences = self._batch_first(query, key, value, unbatched)
        offset = cache.length if cache is not None and not cache.fixed else 0
        q, k, v = self._heads(*sequences, cache, offset)
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[-2])
        slopes = self.alibi_slopes
        if slopes is not None and slopes.is_meta and not q.is_meta:  # weights were assigned to a module made on meta
            slopes = self.alibi_slopes = mmkern.alibi_slopes(self.num_heads, device=q.device)
        score: dict[str, Any] = {
            "is_causal": is_causal,
            "scale": self.scale,
            "similarity": self.similarity,
            "temperature": self.log_temperature.clamp(max=log(100.0)).exp() if self.similarity == "cosine" else None,
            "alibi_slopes": slopes,
            "key_lengths": key_lengths,
            "causal_alignment": "upper_left" if cache is None or cache.fixed else "lower_right",
        }
        out, lse = mmkern.scaled_dot_product_attention(
            q, k, v, mask, self.dropout * self.training, enable_gqa=True, return_lse=True, **score
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (B, L, E)
        out = out[0] if unbatched else out if self.batch_first else out.transpose(0, 1)
        if not need_weights:
            return out, None
        weights = attention_weights(q, k, lse, mask, **score)
        weights = weights.mean(1) if average_attn_weights else weights
        return out, weights[0] if unbatched else weights

    def _batch_first(self, query: Tensor, key: Tensor, value: Tensor, unbatched: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The three as (B, length, channels); what was one tensor stays one."""
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.dim() not in (2, 3) or (t.dim() == 2) != unbatched:
                raise ValueError(f"{name}: expected 3 dims, or 2 for all without a batch, got shape {tuple(t.shape)}")
        if query.shape[-1] != self.embed_dim:
            raise ValueError(f"query: expected {self.embed_dim} channels, got shape {tuple(query.shape)}")
        turned: dict[int, Tensor] = {}
        for t in (query, key, value):
            turned[id(t)] = t[None] if unbatched else t if self.batch_first else t.transpose(0, 1)
        return turned[id(query)], turned[id(key)], turned[id(value)]

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache | None, offset: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected and split into heads, with the cache's: query (B, H, L, D), key and value (B, K, S, D)."""
        sizes = [self.embed_dim, *[self.kv_heads * self.head_dim] * 2]
        if cache is not None and cache.complete:
            (weight, *_), (bias, *_) = self._in_projections(sizes)
            return self._turned(F.linear(query, weight, bias), offset), *cache.keys_and_values()
        if query is key is value and self.in_proj_weight is not None:
            parts = list(F.linear(query, self.in_proj_weight, self.in_proj_bias).split(sizes, -1))
        else:
            projections = zip((query, key, value), *self._in_projections(sizes), strict=True)
            parts = [F.linear(t, weight, bias) for t, weight, bias in projections]
        q, k = self._turned(parts[0], offset), self._turned(parts[1], offset)
        v = parts[2].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return (q, k, v) if cache is None else (q, *cache.append(k, v))

    def _in_projections(self, sizes: list[int]) -> tuple[Any, Any]:
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.split(sizes)
        return weights, (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.split(sizes)

    def _turned(self, x: Tensor, offset: int) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.rotary_base is None:
            return x
        positions = torch.arange(offset, offset + x.shape[-2], device=x.device) if offset else None
        return mmkern.rotary(x, positions=positions, base=self.rotary_base)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
        """Both masks as one of the op: bool (True is visible) where both are bool, else float to be added."""
        masks = []
        if attn_mask is not None:
            shapes = [(q.shape[-2], keys), (q.shape[0] * self.num_heads, q.shape[-2], keys)]
            if attn_mask.shape not in shapes:
                raise ValueError(f"attn_mask: expected shape {shapes[0]} or {shapes[1]}, got {tuple(attn_mask.shape)}")
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if padding is not None:
            if padding.shape not in ((q.shape[0], keys), (keys,)):
                raise ValueError(f"key_padding_mask: expected ({q.shape[0]}, {keys}), got {tuple(padding.shape)}")
            masks.append(padding.reshape(-1, 1, 1, keys))
        if not masks:
            return None
        if all(m.dtype == torch.bool for m in masks):
            return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
        zero = q.new_zeros(())
        added = [torch.where(m, -torch.inf, zero) if m.dtype == torch.bool else m.to(q.dtype) for m in masks]
        return added[0] if len(added) == 1 else added[0] + added[1]

    def extra_repr(self) -> str:
        extras = [f"kv_heads={self.kv_heads}"] if self.kv_heads != self.num_heads else []
        extras += [f"rotary_base={self.rotary_base:g}"] if self.rotary_base else []
        extras += ["alibi=True"] if self.alibi_slopes is not None else []
        return ", ".join([f"{self.embed_dim}, {self.num_heads}, similarity={self.similarity!r}", *extras])
