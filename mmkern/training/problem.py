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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmkern.model.config import Batch
from mmkern.training import files

Collate = Callable[[Sequence[Any], Sequence[torch.Generator] | None], Batch]


class DataError(ValueError):
    """What is to be learned from cannot be read; one line that names the file, or the setting."""


@dataclass
class Problem:
    """Samples and how they become batches.

    Args:
        train, validation, test: sequences of samples, which have `.prompt`, `.text`, `.label` and `.group`.
        classes: names of the classes; a sample's label is a place in it.
        tokenizer: with `encode(text).ids`, `decode(ids)` and `to_str()`; tokenizers.Tokenizer is one.
        collate: samples, and for each a generator to draw its augmentation from, or None for no augmentation -> Batch.
        word_vectors: (vocab_size, word_vector_dim), or None.
    """

    train: Sequence[Any]
    validation: Sequence[Any]
    test: Sequence[Any]
    classes: list[str]
    tokenizer: Any
    collate: Collate
    word_vectors: Tensor | None = None

    @cached_property
    def class_prompt(self) -> str:
        """The prompt that samples with a label mostly have; "" where none has."""
        samples = (self.train[i] for i in range(len(self.train)))
        counts = Counter(sample.prompt for sample in samples if sample.label is not None)
        return counts.most_common(1)[0][0] if counts else ""

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of all that training and its test depend on: what a run that goes on must find as it was."""
        found = {"tokenizer": _hash([self.tokenizer.to_str()])}
        for split in ("train", "validation", "test"):
            samples = getattr(self, split)
            for field in ("image", "prompt", "text", "label", "group"):
                values = (getattr(samples[i], field, None) for i in range(len(samples)))
                found[f"{split}_{field}"] = _hash(values)
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
            content = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
        whole.update(hashlib.sha256(content).digest())
    return whole.hexdigest()[:16]


def _hash_of_file(path: Path) -> bytes:
    try:
        with files.opened(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


class Steps(Dataset[Batch]):
    """steps[i]: the batch of step i, of this process: a function of seed and i, whoever computes it and when.

    A sample's augmentation is drawn by seed, epoch and sample: however many processes share a batch, it is the same.
    Samples come in a new random order each epoch, and batches run on from one epoch into the next, so that each has
    batch_size samples over all processes.
    """

    def __init__(self, problem: Problem, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.problem, self.batch_size, self.seed, self.rank, self.world = problem, batch_size, seed, rank, world
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self.problem.train)))
        random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def __getitem__(self, step: int) -> Batch:
        places = range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.world)
        count = len(self.problem.train)
        chosen = [(place // count, self._order(place // count)[place % count]) for place in places]
        samples = [self.problem.train[i] for _, i in chosen]
        seeds = [random.Random(f"{self.seed} {epoch} {i}").getrandbits(62) for epoch, i in chosen]
        return self.problem.collate(samples, [torch.Generator().manual_seed(seed) for seed in seeds])


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
