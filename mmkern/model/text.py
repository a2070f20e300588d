"""From tokens to activations, and back to logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkern.model.config import ModelConfig
from mmkern.nn import PositionalEncoding, TokenEmbedding


class TextEmbedding(nn.Module):
    """Tokens to (B, L, W), by an embedding of W channels or by word vectors that are projected; and back to logits."""

    def __init__(self, c: ModelConfig, encoding: str, word_vectors: Tensor | None) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))
        last: dict[str, Any] = {"max_length": c.max_tokens, "dropout": c.dropout}
        if not c.word_vector_dim:
            scale = c.width**0.5
            self.tokens = TokenEmbedding(c.vocab_size, c.width, encoding, scale=scale, padding_idx=c.pad, **last)
            self.projected = None
            return
        self.tokens = TokenEmbedding(c.vocab_size, c.word_vector_dim, "none", padding_idx=c.pad)
        if word_vectors is not None:
            self.tokens.weight.data.copy_(word_vectors)
        self.tokens.weight.requires_grad_(not c.freeze_words)
        self.projected = nn.Linear(c.word_vector_dim, c.width, bias=False)
        self.positions = PositionalEncoding(c.width, encoding, **last)

    def forward(self, tokens_BL: Tensor, offset: int = 0) -> Tensor:
        x: Tensor
        if self.projected is None:
            x = self.tokens(tokens_BL, offset)
        else:
            x = self.positions(self.projected(self.tokens(tokens_BL)), offset)
        return x

    def output(self, hidden_BTW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight, bias of logits = x @ weight^T + bias: tied to the embedding, and projected back if that is."""
        x = hidden_BTW if self.projected is None else F.linear(hidden_BTW, self.projected.weight.mT)
        return x, self.tokens.weight, self.bias
