"""Tiny models and batches that the tests of the model share."""

from dataclasses import replace

import torch

from mmkern.model import Batch, ModelConfig, MultimodalModel
from mmkern.model.config import BLOCKS, ENCODINGS, SIMILARITIES

TINY = ModelConfig(
    vocab_size=20, classes=3, width=16, heads=2, encoder_layers=2, decoder_layers=2, mlp_ratio=2.0, image_size=32,
    patch_size=16, image_embedding=5, max_tokens=12, dropout=0.0,
)  # fmt: skip
# block, encoding, similarity: all that go together
CHOICES = [
    (block, encoding, similarity)
    for block in BLOCKS
    for encoding in ENCODINGS
    for similarity in SIMILARITIES
    if block != "mlp" or (encoding not in ("rotary", "alibi") and similarity == "dot")
]


def tiny(seed: int = 0, **changes) -> MultimodalModel:
    torch.manual_seed(seed)
    return MultimodalModel(replace(TINY, **changes))


def batch_of(samples: int = 4, seed: int = 0) -> Batch:
    """Pictures in all but the second sample, prompts of 5, 3, 0, ... tokens; NaN and odd tokens where nothing is."""
    g = torch.Generator().manual_seed(seed)
    present = torch.ones(samples, dtype=torch.bool)
    present[1] = False
    images = torch.rand(samples, 3, 32, 32, generator=g)
    images[1] = torch.nan
    tokens = [torch.randint(3, 20, (samples, n), generator=g) for n in (5, 6, 6)]
    targets = tokens[2].clone()
    targets[0, 3:] = -100
    return Batch(
        images=images,
        image_present=present,
        prompts=tokens[0],
        prompt_lengths=torch.tensor([5, 3, 0, 1] * samples)[:samples],
        inputs=tokens[1],
        targets=targets,
        labels=torch.tensor([0, 2, -100, 1] * samples)[:samples],
        image_embeddings=torch.randn(samples, 5, generator=g),
    )


def alone(batch: Batch, i: int) -> Batch:
    """Sample i by itself, with no padding and nothing that it has not."""
    there, length = bool(batch.image_present[i]), int(batch.prompt_lengths[i])
    one = slice(i, i + 1)
    return Batch(
        images=batch.images[one] if there else None,
        prompts=batch.prompts[one, :length] if length else None,
        inputs=batch.inputs[one],
        targets=batch.targets[one],
        labels=batch.labels[one],
        image_embeddings=batch.image_embeddings[one],
    )
