"""From a configuration to a problem and a model, and from a run folder back to both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mmkern.model import Batch, ModelConfig, MultimodalModel
from mmkern.training import checkpoints
from mmkern.training.augment import Augment
from mmkern.training.checkpoints import Checkpoint, CheckpointError
from mmkern.training.config import ConfigError, DataConfig, RunConfig, Saved, checked
from mmkern.training.data import collate, load_dataset
from mmkern.training.loop import CHECKPOINTS, TrainingError, load_weights
from mmkern.training.problem import Problem
from mmkern.training.text import read_word_vectors, train_tokenizer

CLASSES = 1 << 12  # the table of mistakes has the square of it in cells: 16 million


@dataclass
class Run:
    """A trained model with what it was trained on; made by `open_run`."""

    folder: Path
    checkpoint: Checkpoint
    config: RunConfig
    model: MultimodalModel
    tokenizer: Tokenizer
    classes: list[str]
    class_prompt: str  # that samples with a label mostly had


class Relabelled(Sequence[Any]):
    """Samples whose labels are places in another list of classes."""

    def __init__(self, samples: Sequence[Any], places: Sequence[int]) -> None:
        self.samples, self.places = samples, places

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: Any) -> Any:
        sample = self.samples[i]
        return sample if sample.label is None else dataclasses.replace(sample, label=self.places[sample.label])


def prepare(config: RunConfig, known: Run | None = None) -> tuple[Problem, ModelConfig]:
    """Loads the data of a configuration, and makes its tokenizer and the model's configuration.

    Args:
        config: of the run to be.
        known: tokenizer and classes are this run's; None: found in the training split.

    Raises:
        TrainingError: a split is empty, or the data have classes that `known` does not, one class alone, too many, or
            pictures that the model takes none of.
        DataError, OSError: the data cannot be read; the message names the file.
    """
    splits: Any = load_dataset(config.data)
    if not len(splits.train) and known is None:
        raise TrainingError(f"data.source: {config.data.source}: no sample to train on")
    classes = list(splits.train.classes)
    if not config.model.image_size and any(s.image is not None for part in splits.parts() for s in part.samples):
        raise TrainingError(f"model.image_size: 0, but {config.data.source} has pictures")
    if known is None:
        return _new(config, splits, classes)
    if unknown := [name for name in classes if name not in known.classes]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise TrainingError(
            f"{known.folder}: knows {len(known.classes)} classes; the data also have {unknown[0]!r}{more}"
        )
    train, validation, test = splits.train, splits.validation, splits.test
    if classes != known.classes:
        places = [known.classes.index(name) for name in classes]
        train, validation, test = (Relabelled(part, places) for part in (train, validation, test))
    theirs = known.model.config
    special = {"pad": theirs.pad, "start": theirs.start, "end": theirs.end}
    model = config.model.build(vocab_size=theirs.vocab_size, classes=theirs.classes, **special)
    if model.image_size != theirs.image_size:
        raise TrainingError(f"model.image_size: {model.image_size}, but {theirs.image_size} in {known.folder}")
    make = partial(_batch, tokenizer=known.tokenizer, config=model, augment=augmentation(config.data))
    return Problem(train, validation, test, known.classes, known.tokenizer, make), model


def _new(config: RunConfig, splits: Any, classes: list[str]) -> tuple[Problem, ModelConfig]:
    if len(classes) == 1:
        raise TrainingError(f"data.source: {config.data.source}: every label is {classes[0]!r}; it takes two classes")
    if len(classes) > CLASSES:
        raise TrainingError(
            f"data.source: {config.data.source}: has {len(classes)} classes, {CLASSES} at most are told"
        )
    vectors = None
    if config.data.word_vectors is not None:
        tokenizer, vectors = read_word_vectors(config.data.word_vectors, _texts(splits.train))
    else:
        tokenizer = train_tokenizer(_texts(splits.train), config.data.vocabulary)
    special = {name: tokenizer.token_to_id(f"<{name}>") for name in ("pad", "start", "end")}
    model = config.model.build(vocab_size=tokenizer.get_vocab_size(), classes=len(classes), **special)
    if vectors is not None:
        model = dataclasses.replace(model, word_vector_dim=vectors.shape[1])
    make = partial(_batch, tokenizer=tokenizer, config=model, augment=augmentation(config.data))
    return Problem(splits.train, splits.validation, splits.test, classes, tokenizer, make, vectors), model


def _texts(samples: Any) -> list[str]:
    return [text for i in range(len(samples)) for text in (samples[i].prompt, samples[i].text) if text]


def _batch(
    samples: Sequence[Any],
    draws: Sequence[torch.Generator] | None,
    *,
    tokenizer: Any,
    config: ModelConfig,
    augment: Augment | None,
) -> Batch:
    return collate(samples, tokenizer, config, augment=None if draws is None else augment, generators=draws)


def augmentation(config: DataConfig) -> Augment | None:
    """What is done to training samples; None: nothing."""
    if not config.augment and not config.token_dropout:
        return None
    return Augment(pictures=config.augment, token_dropout=config.token_dropout)


def open_run(folder: Path, device: torch.device | str = "cpu", last: bool = False) -> Run:
    """Builds a run's model from its best checkpoint, or its last one.

    Args:
        folder: of the run, or of one checkpoint.

    Raises:
        CheckpointError: not a run, or its checkpoint is damaged.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    within = folder / CHECKPOINTS
    if within.is_dir():
        checkpoint = checkpoints.load(checkpoints.newest(within) if last else checkpoints.best(within))
    else:
        checkpoint = checkpoints.load(folder)
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{checkpoint.path}: has no tokenizer.json")
    where = checkpoint.path / "config.json"
    try:
        saved = checked(Saved, checkpoint.config, str(where))
        model = MultimodalModel(ModelConfig(**saved.model.model_dump()))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: model.{error}") from None
    if len(saved.classes) != model.config.classes:
        raise CheckpointError(f"{where}: names {len(saved.classes)} classes, the model has {model.config.classes}")
    load_weights(model, checkpoint)
    try:
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
        largest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # the library has no class of its own for it
        raise CheckpointError(f"{checkpoint.path / 'tokenizer.json'}: is no tokenizer ({error})") from None
    if largest >= model.config.vocab_size:
        where, count = checkpoint.path / "tokenizer.json", model.config.vocab_size
        raise CheckpointError(f"{where}: has the token {largest}, the model {count} of them")
    return Run(folder, checkpoint, saved.run, model.to(device).eval(), tokenizer, saved.classes, saved.class_prompt)
