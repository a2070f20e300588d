"""Positional encodings as modules: added to activations, added to looked-up tokens, or turned into queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import mmkern


class PositionalEncoding(nn.Module):
    """dropout(scale * x + encoding) in one pass: `mmkern.add_positional_encoding` as a module.

    Args:
        dim: channels of x; only a learned table needs it.
        encoding: "sinusoidal", "scalar", "sincos2d" (x is (..., height, width, dim)), "learned", or "none".
        max_length: positions of the learned table.
        scale, dropout: as there; dropout only in training.

    Raises:
        ValueError: an unknown encoding, or "learned" without a length.

    Example:
        >>> import mmkern.nn, torch
        >>> mmkern.nn.PositionalEncoding(4)(torch.zeros(1, 1, 4))
        tensor([[[0., 1., 0., 1.]]])
    """

    table: Tensor | None

    def __init__(
        self, dim: int, encoding: str = "sinusoidal", *, max_length: int = 0, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if encoding not in ("sinusoidal", "scalar", "sincos2d", "learned", "none"):
            raise ValueError(f"encoding: expected one of sinusoidal, scalar, sincos2d, learned, none, got {encoding!r}")
        if encoding == "learned" and max_length < 1:
            raise ValueError(f"max_length: a learned table needs at least 1, got {max_length}")
        self.encoding, self.scale, self.dropout = encoding, scale, dropout
        table = nn.Parameter(0.02 * torch.randn(max_length, dim)) if encoding == "learned" else None
        self.register_parameter("table", table)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """x: (..., length, dim), its first row at position `offset`. Returns x's shape and dtype; raises as the op."""
        return mmkern.add_positional_encoding(
            x, self._encoding(x.dtype), offset=offset, scale=self.scale, dropout_p=self.dropout * self.training
        )

    def _encoding(self, dtype: torch.dtype) -> str | Tensor:
        return self.encoding if self.table is None else self.table.to(dtype)  # autocast: x may be narrower

    def extra_repr(self) -> str:
        return f"{self.encoding!r}, scale={self.scale:g}, dropout={self.dropout}"


class SinusoidalPositionalEncoding(PositionalEncoding):
    """`PositionalEncoding` with sines and cosines (Vaswani et al. 2017)."""

    def __init__(self, dim: int, *, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(dim, "sinusoidal", scale=scale, dropout=dropout)


class TokenEmbedding(PositionalEncoding):
    """dropout(scale * weight[tokens] + encoding) in one pass: `mmkern.embed_tokens` as a module.

    Args:
        num_embeddings, embedding_dim, padding_idx: as `torch.nn.Embedding`, whose `weight` this one has. Drawn from
            N(0, 1 / embedding_dim), so that with scale = sqrt(embedding_dim) an embedding has unit variance.
        encoding, max_length, scale, dropout: as `PositionalEncoding`, without "sincos2d".

    Example:
        >>> import mmkern.nn, torch
        >>> mmkern.nn.TokenEmbedding(10, 4)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        encoding: str = "sinusoidal",
        *,
        max_length: int = 0,
        scale: float = 1.0,
        dropout: float = 0.0,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(embedding_dim, encoding, max_length=max_length, scale=scale, dropout=dropout)
        self.padding_idx = padding_idx
        self.weight = nn.Parameter(embedding_dim**-0.5 * torch.randn(num_embeddings, embedding_dim))

    def forward(self, tokens: Tensor, offset: int | Tensor = 0) -> Tensor:
        """tokens: int (..., length), the first at position `offset`. Returns (..., length, embedding_dim)."""
        return mmkern.embed_tokens(
            tokens,
            self.weight,
            self._encoding(self.weight.dtype),
            offset=offset,
            scale=self.scale,
            dropout_p=self.dropout * self.training,
            padding_idx=self.padding_idx,
        )


class RotaryEmbedding(nn.Module):
    """`mmkern.rotary` as a module: base, layout, rotary_dim as there.

    Example:
        >>> import mmkern.nn, torch
        >>> q, k = mmkern.nn.RotaryEmbedding()(*torch.ones(2, 1, 4, 3, 8))  # (batch, heads, length, head_dim) each
    """

    def __init__(self, base: float = 10000.0, *, layout: str = "half", rotary_dim: int | None = None) -> None:
        super().__init__()
        self.base, self.layout, self.rotary_dim = base, layout, rotary_dim

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q (and k) turned. Shapes, dtypes and errors: `mmkern.rotary`."""
        options = {"base": self.base, "layout": self.layout, "rotary_dim": self.rotary_dim, "grid": grid}
        return mmkern.rotary(q, k, positions, **options)  # type: ignore[call-overload]

    def extra_repr(self) -> str:
        return f"base={self.base:g}, layout={self.layout!r}, rotary_dim={self.rotary_dim}"
