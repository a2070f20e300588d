"""A thin multimodal encoder-decoder on mmkern's ops: pictures and text in, text and classes out.

Shapes: B samples, I tokens of a picture, P of a prompt, S = I + P of the memory, T of the text to be written,
W config.width, V config.vocab_size. A suffix tells a tensor's shape: x_BSW.

    picture -> stem, 2-D positions --+
                                     +-- packed -> encoder -> memory_BSW --+-> mean -> class
    prompt  -> embedding, positions -+                                     +-> decoder <- text so far -> next token
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkern
from mmkern.model.config import Batch, ModelConfig
from mmkern.model.images import ImageStem
from mmkern.model.text import TextEmbedding
from mmkern.nn import KVCache, MultiheadAttention, PositionalEncoding


def added(encoding: str) -> str:
    """What is added to activations; rotary and ALiBi act in attention instead."""
    return "none" if encoding in ("rotary", "alibi") else encoding


class MLP(nn.Sequential):
    def __init__(self, c: ModelConfig) -> None:
        hidden = int(c.mlp_ratio * c.width)
        super().__init__(nn.Linear(c.width, hidden), nn.GELU(), nn.Linear(hidden, c.width), nn.Dropout(c.dropout))


def attention(c: ModelConfig, **options: Any) -> MultiheadAttention:
    return MultiheadAttention(c.width, c.heads, c.dropout, batch_first=True, similarity=c.similarity, **options)


class EncoderBlock(nn.Module):
    """Pre-norm: self-attention and an MLP."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attention = attention(c, rotary=c.encoding == "rotary", alibi=c.encoding == "alibi")
        self.mlp = MLP(c)

    def forward(self, x_BSW: Tensor, lengths_B: Tensor) -> Tensor:
        h = self.norm(x_BSW)
        x_BSW = x_BSW + self.attention(h, h, h, need_weights=False, key_lengths=lengths_B)[0]
        return x_BSW + self.mlp(self.mlp_norm(x_BSW))


class DecoderBlock(nn.Module):
    """Pre-norm: causal self-attention, attention to the memory, and an MLP."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(c.width) for _ in range(3))
        self.attention = attention(c, rotary=c.encoding == "rotary", alibi=c.encoding == "alibi")
        self.cross = attention(c)  # places in the memory are told by what is in it
        self.mlp = MLP(c)

    def forward(
        self, x_BTW: Tensor, m_BSW: Tensor, lengths_B: Tensor, cache: KVCache | None, cross_cache: KVCache | None
    ) -> Tensor:
        h = self.norm(x_BTW)
        x_BTW = x_BTW + self.attention(h, h, h, need_weights=False, is_causal=True, cache=cache)[0]
        h = self.cross_norm(x_BTW)
        x_BTW = x_BTW + self.cross(h, m_BSW, m_BSW, need_weights=False, key_lengths=lengths_B, cache=cross_cache)[0]
        return x_BTW + self.mlp(self.mlp_norm(x_BTW))


class MLPBlock(nn.Module):
    """MLP(x + positions): hidden = MLP(input + positions) is the encoder, output = MLP(hidden + positions) the decoder.

    Without attention the tokens of a sample meet in the mean of its memory, which the decoder adds to its input.
    """

    def __init__(self, c: ModelConfig, length: int) -> None:
        super().__init__()
        self.positions = PositionalEncoding(c.width, c.encoding, max_length=length)
        self.mlp = MLP(c)

    def forward(self, x_BLW: Tensor, offset: int = 0) -> Tensor:
        return self.mlp(self.positions(x_BLW, offset))


class DecoderCache:
    """What `decode` keeps of the tokens before: their number, and keys and values in each block."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.blocks = [(KVCache(), KVCache(fixed=True)) for _ in range(layers)]

    def reorder(self, index: Tensor) -> None:
        """Let sample i go on from the text of sample index[i], which must have the same memory. index: int64 (B,)."""
        for own, _ in self.blocks:
            own.reorder(index)


class MultimodalModel(nn.Module):
    """Encoder-decoder of text and pictures; see the head of this file, and `ModelConfig` for what can be chosen.

    Args:
        config: sizes and choices. `model.config` is a copy that a checkpoint should keep: with it alone the model is
            built again, whatever image_weights it came from.
        word_vectors: (vocab_size, word_vector_dim) float; None: random, to be loaded or trained.

    Raises:
        ValueError: word_vectors do not fit the configuration, or the image stem cannot be built.

    Example:
        >>> import torch
        >>> from mmkern.model import Batch, ModelConfig, MultimodalModel
        >>> model = MultimodalModel(ModelConfig(vocab_size=10, classes=3, width=32, heads=2))
        >>> batch = Batch(images=torch.rand(2, 3, 72, 72), inputs=torch.tensor([[1, 5], [1, 6]]))
        >>> {name: tuple(t.shape) for name, t in model(batch).items()}
        {'hidden': (2, 2, 32), 'class_logits': (2, 3)}
    """

    def __init__(self, config: ModelConfig, word_vectors: Tensor | None = None) -> None:
        super().__init__()
        c = self.config = replace(config)
        if word_vectors is not None and word_vectors.shape != (c.vocab_size, c.word_vector_dim):
            raise ValueError(
                f"word_vectors: expected (vocab_size, word_vector_dim) = {(c.vocab_size, c.word_vector_dim)}, "
                f"got {tuple(word_vectors.shape)}"
            )
        mlp = self.mlp = c.block == "mlp"  # its blocks add the positions themselves
        self.text = TextEmbedding(c, "none" if mlp else added(c.encoding), word_vectors)
        image_tokens = 0
        if c.image_size:
            self.stem = ImageStem(c)
            c.image_backbone = self.stem.backbone
            try:
                with torch.no_grad():
                    image_tokens = self.stem.eval()(torch.zeros(1, 3, c.image_size, c.image_size))[..., 0].numel()
            except RuntimeError as error:  # a grid of no features
                raise ValueError(f"image_size: {c.image_size} does not fit {c.image_stem!r} ({error})") from None
            self.stem.train()
            flat = mlp or c.encoding == "none"
            self.grid = PositionalEncoding(c.width, "none" if flat else "sincos2d", dropout=c.dropout)
        self.modality = nn.Parameter(0.02 * torch.randn(2, c.width))  # of pictures, of text
        if mlp:
            longest = image_tokens + c.max_tokens
            self.encoder = nn.ModuleList(MLPBlock(c, longest) for _ in range(c.encoder_layers))
            self.decoder = nn.ModuleList(MLPBlock(c, c.max_tokens) for _ in range(c.decoder_layers))
        else:
            self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.encoder_layers))
            self.decoder = nn.ModuleList(DecoderBlock(c) for _ in range(c.decoder_layers))
        self.encoder_norm, self.decoder_norm = (nn.Identity() if mlp else nn.LayerNorm(c.width) for _ in range(2))
        if c.classes:
            self.class_head = nn.Linear(c.width, c.classes)
        if c.image_embedding:
            self.image_head = nn.Linear(c.width, c.image_embedding)

    def encode(
        self,
        images: Tensor | None,
        image_present: Tensor | None,
        tokens: Tensor | None,
        token_lengths: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Read pictures and prompts; each may be missing, altogether (None) or in some samples.

        Args:
            images: (B, 3, image_size, image_size) float in [0, 1].
            image_present: (B,) bool; None: all are there.
            tokens: (B, P) int64, P <= max_tokens, padded at the end.
            token_lengths: (B,) int64, 0 for a sample without a prompt; None: all P.

        Returns:
            memory (B, S, W) and the length (B,) of each sample's part of it, which stands at the front.

        Raises:
            ValueError: a shape does not fit, or there are neither pictures nor prompts.
            IndexError: a token outside the vocabulary.
        """
        parts, valid = [], []
        if images is not None:
            parts.append(self._see(images, image_present))
            there = torch.ones(images.shape[0], 1, dtype=torch.bool, device=images.device)
            there = there if image_present is None else image_present[:, None]
            valid.append(there.expand(parts[0].shape[:2]))
        if tokens is not None:
            self._check_tokens("tokens", tokens)
            parts.append(self.text(tokens) + self.modality[1])
            j = torch.arange(tokens.shape[1], device=tokens.device)
            valid.append(
                (j < (tokens.shape[1] if token_lengths is None else token_lengths[:, None])).expand(tokens.shape)
            )
        if not parts:
            raise ValueError("images, tokens: expected at least one of them")
        if images is not None and tokens is not None and images.shape[0] != tokens.shape[0]:
            raise ValueError(f"tokens: expected the {images.shape[0]} samples of images, got {tokens.shape[0]}")
        x_BSW, valid_BS = torch.cat(parts, 1), torch.cat(valid, 1)
        lengths_B = valid_BS.sum(1)
        if images is not None and image_present is not None and tokens is not None:  # prompts move up
            order_BS = torch.argsort((~valid_BS).byte(), dim=1, stable=True)
            x_BSW = torch.take_along_dim(x_BSW, order_BS[..., None], 1)
        for block in self.encoder:
            x_BSW = block(x_BSW) if self.mlp else block(x_BSW, lengths_B)
        return self.encoder_norm(x_BSW), lengths_B

    def _see(self, images: Tensor, present: Tensor | None) -> Tensor:
        """(B, I, W). The stem runs over pictures that are there: what a missing one holds reaches nobody."""
        side = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side) or not side:
            raise ValueError(f"images: expected (B, 3, {side}, {side}), as image_size says, got {tuple(images.shape)}")
        seen = self.grid(self.stem(images if present is None else images[present])).flatten(1, 2) + self.modality[0]
        if present is None:
            return seen
        return seen.new_zeros(len(images), *seen.shape[1:]).index_put((present,), seen)

    def _check_tokens(self, name: str, tokens: Tensor, offset: int = 0) -> None:
        if tokens.dim() != 2 or tokens.shape[1] + offset > self.config.max_tokens:
            raise ValueError(
                f"{name}: expected (B, up to max_tokens = {self.config.max_tokens}), got {tuple(tokens.shape)}"
                + (f" after {offset}" if offset else "")
            )

    def decode(self, memory: Tensor, lengths: Tensor, tokens: Tensor, cache: DecoderCache | None = None) -> Tensor:
        """Read the text so far.

        Args:
            memory: (B, S, W), lengths: (B,), from `encode`.
            tokens: (B, T) int64: start, w1, w2, ...; with a cache, only those that follow the ones it has seen.
            cache: from `new_cache`; it is updated.

        Returns:
            (B, T, W); `logits` of row t are of the token that follows tokens[:, t].

        Raises:
            ValueError: a shape does not fit, or the text is longer than max_tokens.
        """
        offset = cache.length if cache is not None else 0
        self._check_tokens("tokens", tokens, offset)
        x_BTW = self.text(tokens, offset)
        if self.mlp:
            x_BTW = x_BTW + self._mean(memory, lengths)[:, None]
        for i, block in enumerate(self.decoder):
            caches = (None, None) if cache is None else cache.blocks[i]
            x_BTW = block(x_BTW, offset) if self.mlp else block(x_BTW, memory, lengths, *caches)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.decoder_norm(x_BTW)

    def new_cache(self) -> DecoderCache:
        """An empty cache for `decode`, of one batch."""
        return DecoderCache(self.config.decoder_layers)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., W) from `decode` -> logits (..., V)."""
        return F.linear(*self.text.output(hidden))

    def classify(self, memory: Tensor, lengths: Tensor) -> Tensor:
        """memory, lengths from `encode` -> logits (B, classes) of each sample's class.

        Raises:
            ValueError: the model has no classes.
        """
        if not self.config.classes:
            raise ValueError("classes: this model was made without a classification head")
        return self.class_head(self._mean(memory, lengths))

    def _mean(self, memory: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(memory.shape[1], device=memory.device) < lengths[:, None]
        return (memory * inside[..., None]).sum(1) / lengths.clamp(min=1)[:, None]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"hidden": (B, T, W) if batch.inputs, "class_logits": (B, classes), "image_embedding": (B, image_embedding)},
        the last two if the model has such heads."""
        memory, lengths = self.encode(batch.images, batch.image_present, batch.prompts, batch.prompt_lengths)
        found = {}
        if batch.inputs is not None:
            found["hidden"] = self.decode(memory, lengths, batch.inputs)
        if self.config.classes:
            found["class_logits"] = self.classify(memory, lengths)
        if self.config.image_embedding:
            found["image_embedding"] = self.image_head(self._mean(memory, lengths))
        return found

    def loss(self, batch: Batch, outputs: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Mean losses of what the batch asks for, each a scalar; 0 where it asks nothing of any sample.

        "text": cross-entropy of batch.targets; "class": of batch.labels; "image": mean square error of
        batch.image_embeddings. outputs: of `forward`, where they are needed for more than this.

        Raises:
            ValueError: targets without inputs, labels or embeddings without a head; or as `forward`.
        """
        outputs = self(batch) if outputs is None else outputs
        losses = {}
        wanted = ("text", "hidden", batch.targets), ("class", "class_logits", batch.labels)
        for name, output, target in (*wanted, ("image", "image_embedding", batch.image_embeddings)):
            if target is None:
                continue
            if output not in outputs:
                raise ValueError(f"batch: asks for the loss {name!r}, but there is no {output!r} to compute it from")
            asked = target.isfinite() if name == "image" else target != -100
            if name == "text":
                x, weight, bias = self.text.output(outputs[output])
                total = mmkern.linear_cross_entropy(x, weight, target, bias, reduction="sum")
            elif name == "class":
                total = mmkern.cross_entropy(outputs[output].float(), target, reduction="sum")
            else:
                error = outputs[output].float() - target.where(asked, 0.0)
                total = error.square().mul(asked).sum()
            losses[name] = total / asked.sum().clamp(min=1)
        return losses
