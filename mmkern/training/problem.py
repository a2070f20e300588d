"""What a training run learns from, as the loop sees it: samples, classes, a tokenizer, and how they become batches."""

from __future__ import annotations

import hashlib
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkern.model.config import Batch
from mmkern.training import files


@dataclass
class Sample:
    """What is shown and asked, and what is to be answered: a text, a class, or both."""

    image: Image.Image | Path | Tensor | None
    prompt: str
    text: str | None
    label: int | None
    group: str  # metrics are told apart by it


Collate = Callable[[Sequence[Sample], Sequence[torch.Generator] | None], Batch]


@dataclass
class Problem:
    """Samples and how they become batches.

    Args:
        classes: names of the classes; a sample's label is a place in it.
        tokenizer: with `encode(text).ids`, `decode(ids)` and `to_str()`; tokenizers.Tokenizer is one.
        collate: samples, and for each a generator to draw its augmentation from, or None for no augmentation -> Batch.
        word_vectors: (vocab_size, word_vector_dim), or None.
    """

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]
    classes: list[str]
    tokenizer: Any
    collate: Collate
    word_vectors: Tensor | None = None

    @cached_property
    def class_prompt(self) -> str:
        """The prompt that samples with a label mostly have; "" where none has."""
        counts = Counter(sample.prompt for sample in self.train if sample.label is not None)
        return counts.most_common(1)[0][0] if counts else ""

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of all that training and its test depend on: what a run that goes on must find as it was."""
        found = {"tokenizer": _hash([self.tokenizer.to_str()])}
        for split in ("train", "validation", "test"):
            for field in ("image", "prompt", "text", "label", "group"):
                found[f"{split}_{field}"] = _hash(getattr(sample, field) for sample in getattr(self, split))
        return found


def _hash(values: Iterable[Any]) -> str:
    """The first 64 bits of the sha256 of values in their order; of a path, that of its content."""
    of_file = cache(_hash_of_file)
    whole = hashlib.sha256()
    for value in values:
        if isinstance(value, Path):
            content = of_file(value)
        elif isinstance(value, Tensor):
            content = value.numpy().tobytes()
        else:  # a picture, or text, number, None
            content = value.tobytes() if isinstance(value, Image.Image) else repr(value).encode()
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()[:16]


def _hash_of_file(path: Path) -> bytes:
    try:
        with files.opened(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise files.DataError(f"{path}: {error.strerror}") from None


def held_out(key: str, test: float, validation: float) -> int:
    """0: training, 1: validation, 2: test, with these shares; by a hash, so that it depends on the key alone."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    return 2 if share < test else 1 if share < test + validation else 0


class Steps(Dataset[Batch]):
    """steps[i]: the batch of step i, of this process: a function of seed and i, whoever computes it and when.

    A sample's augmentation is drawn by seed, epoch and sample: however many processes share a batch, it is the same.
    Samples come in a new random order each epoch, and batches run on from one epoch into the next, so that each has
    batch_size samples over all processes.
    """

    def __init__(self, problem: Problem, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.problem, self.batch_size, self.seed, self.rank, self.world = problem, batch_size, seed, rank, world

    def __getitem__(self, step: int) -> Batch:
        places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        count = len(self.problem.train)
        chosen = [(place // count, _shuffled(count, self.seed, place // count)[place % count]) for place in places]
        seeds = [random.Random(f"{self.seed} {epoch} {i}").getrandbits(62) for epoch, i in chosen]
        samples = [self.problem.train[i] for _, i in chosen]
        return self.problem.collate(samples, [torch.Generator().manual_seed(seed) for seed in seeds])


@lru_cache(maxsize=2)
def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


def loader(steps: Steps, start: int, stop: int, workers: int) -> DataLoader[Batch]:
    """Batches of the steps start .. stop - 1 in order, loaded ahead by `workers` processes; 0: as they are asked for.

    It draws nothing from torch's default generator, which belongs to the model's dropout.
    """
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
        worker_init_fn=_leave_interrupts,
    )


def _leave_interrupts(_: int) -> None:
    """Ctrl-C is the training process's, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(batch: Batch) -> Batch:
    return batch
