"""What a model is made of, and what it is fed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

BLOCKS = ("transformer", "mlp")
SIMILARITIES = ("dot", "cosine", "euclidean", "squared_euclidean")
ENCODINGS = ("sinusoidal", "scalar", "learned", "rotary", "alibi", "none")
# Least and most of each number. A model this thin has no use for more, and what allocates or loops by one of them ends.
LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 24),
    "classes": (0, 1 << 20),
    "width": (1, 1 << 14),
    "heads": (1, 1 << 10),
    "encoder_layers": (0, 256),
    "decoder_layers": (0, 256),
    "mlp_ratio": (0.0, 64.0),
    "image_size": (0, 1 << 11),
    "image_embedding": (0, 1 << 16),
    "patch_size": (1, 1 << 11),
    "word_vector_dim": (0, 1 << 14),
    "max_tokens": (1, 1 << 16),
}
WEIGHTS = 1 << 32  # of all blocks and the vocabulary together: 16 GiB in float32, four times that with AdamW's state


@dataclass
class ModelConfig:
    """Sizes and choices of a `MultimodalModel`; every combination of them works.

    Args:
        vocab_size: number of tokens.
        classes: number of classes of the classification head; 0: no head.
        width: channels of the residual stream. heads: attention heads; must divide width.
        encoder_layers, decoder_layers: blocks of each half.
        mlp_ratio: hidden channels of an MLP over width.
        block: "transformer" (attention and MLP), or "mlp": hidden = MLP(input + positions),
            output = MLP(hidden + positions).
        similarity: of attention: "dot", "cosine" (with a learned temperature), "euclidean" or "squared_euclidean".
        encoding: positions: "sinusoidal", "scalar", "learned", "none", or of attention: "rotary", "alibi".
        image_size: height and width of pictures; 0: the model takes none.
        image_stem: "conv" (convolutions and pooling), "patch", "vgg11" .. "vgg19" (with batch norm "vgg16_bn"), or a
            transformers model type, such as "resnet".
        image_weights: folder with local weights of that transformers model, or file with torchvision's of that VGG;
            None: untrained.
        image_backbone: configuration of that transformers model, or name of that VGG. A model fills it in in its own
            config, so that a checkpoint is loaded without image_weights; where it is given, image_weights are not read.
        image_embedding: channels of an image embedding to be regressed (a teacher's, say); 0: none.
        patch_size: side of a picture's patch with "patch".
        word_vector_dim: channels of word vectors that are projected to width; 0: an embedding of width itself.
        freeze_words: keep the word vectors as they are given.
        max_tokens: most tokens of a prompt, and of a text.
        dropout: chance with which an activation or attention weight is dropped in training.
        pad, start, end: token ids.

    Raises:
        ValueError: a value is out of range or unknown.
    """

    vocab_size: int
    classes: int = 0
    width: int = 128
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    mlp_ratio: float = 4.0
    block: str = "transformer"
    similarity: str = "dot"
    encoding: str = "sinusoidal"
    image_size: int = 72
    image_stem: str = "conv"
    image_weights: str | None = None
    image_backbone: dict[str, Any] | None = None
    image_embedding: int = 0
    patch_size: int = 12
    word_vector_dim: int = 0
    freeze_words: bool = False
    max_tokens: int = 128
    dropout: float = 0.1
    pad: int = 0
    start: int = 1
    end: int = 2

    def __post_init__(self) -> None:
        for name, known in (("block", BLOCKS), ("similarity", SIMILARITIES), ("encoding", ENCODINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                bound = f"most {most}" if value > most else f"least {least}"
                raise ValueError(f"{name}: expected at {bound}, got {value}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width: expected a multiple of 4 and of heads = {self.heads}, got {self.width}")
        if self.encoding == "rotary" and self.width // self.heads % 2:
            raise ValueError(f"heads: rotary needs an even width / heads, got {self.width} / {self.heads}")
        if self.block == "mlp" and (self.encoding in ("rotary", "alibi") or self.similarity != "dot"):
            raise ValueError(
                f"block: 'mlp' has no attention for encoding {self.encoding!r} with similarity {self.similarity!r}"
            )
        if not self.mlp_ratio * self.width >= 1:
            raise ValueError(f"mlp_ratio: expected at least one hidden channel, got {self.mlp_ratio}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a chance in [0, 1), got {self.dropout}")
        mlp = 2 * self.mlp_ratio
        blocks = self.encoder_layers * (4 + mlp) + self.decoder_layers * (8 + mlp)
        weights = blocks * self.width**2 + self.vocab_size * (self.word_vector_dim or self.width)
        if weights > WEIGHTS:
            raise ValueError(
                f"width: with these layers and tokens expected at most {WEIGHTS} weights, got {weights:.3g}"
            )
        for name in ("pad", "start", "end"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}: expected a token below vocab_size {self.vocab_size}, got {getattr(self, name)}"
                )


@dataclass
class Batch:
    """Samples side by side; a field is None where no sample has it.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        image_present: (B,) bool; None: all of them, where there are images.
        prompts: (B, P) int64, padded at the end.
        prompt_lengths: (B,) int64; None: all P.
        inputs: (B, T) int64, what the decoder reads: start, w1, w2, ...
        targets: (B, T) int64, what it is to say: w1, w2, ..., end; -100 where nothing is to be said.
        labels: (B,) int64, the class; -100 where none.
        image_embeddings: (B, image_embedding) float, to be regressed; a row of NaN where there is none.
    """

    images: Tensor | None = None
    image_present: Tensor | None = None
    prompts: Tensor | None = None
    prompt_lengths: Tensor | None = None
    inputs: Tensor | None = None
    targets: Tensor | None = None
    labels: Tensor | None = None
    image_embeddings: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: t if t is None else t.to(device) for name, t in found.items()})

    def __len__(self) -> int:
        """The number of samples.

        Raises:
            ValueError: the batch has no tensor, or tensors disagree on the number of samples.
        """
        counts = {f.name: len(t) for f in fields(self) if (t := getattr(self, f.name)) is not None}
        if len(set(counts.values())) != 1:
            raise ValueError(f"batch: expected tensors of one number of samples, got {counts or 'no tensor'}")
        return next(iter(counts.values()))
