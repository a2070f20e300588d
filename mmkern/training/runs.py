"""From a configuration to a problem and a model, and from a run folder back to both."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mmkern.model import ModelConfig, MultimodalModel
from mmkern.training import checkpoints
from mmkern.training.checkpoints import Checkpoint, CheckpointError
from mmkern.training.config import ConfigError, RunConfig, Saved, checked
from mmkern.training.data import collate, load_dataset
from mmkern.training.files import TrainingError
from mmkern.training.loop import CHECKPOINTS
from mmkern.training.pictures import Augment
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
    splits, source, vectors = load_dataset(config.data), config.data.source, None
    classes, parts = splits.classes, (splits.train, splits.validation, splits.test)
    if not splits.train and known is None:
        raise TrainingError(f"data.source: {source}: no sample to train on")
    if not config.model.image_size and any(s.image is not None for part in parts for s in part):
        raise TrainingError(f"model.image_size: 0, but {source} has pictures")
    if known is not None:
        if unknown := [name for name in classes if name not in known.classes]:
            what = f"{unknown[0]!r}{f' and {len(unknown) - 1} more' * (len(unknown) > 1)}"
            raise TrainingError(f"{known.folder}: knows {len(known.classes)} classes; the data also have {what}")
        for sample in (s for part in parts for s in part):
            sample.label = None if sample.label is None else known.classes.index(classes[sample.label])
        classes, tokenizer, theirs = known.classes, known.tokenizer, known.model.config
        named = {"pad": theirs.pad, "start": theirs.start, "end": theirs.end}
        model = config.model.build(vocab_size=theirs.vocab_size, classes=theirs.classes, **named)
        if model.image_size != theirs.image_size:
            raise TrainingError(f"model.image_size: {model.image_size}, but {theirs.image_size} in {known.folder}")
    else:
        if len(classes) == 1:
            raise TrainingError(f"data.source: {source}: every label is {classes[0]!r}; it takes two classes")
        if len(classes) > CLASSES:
            raise TrainingError(f"data.source: {source}: has {len(classes)} classes, {CLASSES} at most are told")
        texts = [text for s in splits.train for text in (s.prompt, s.text) if text]
        if config.data.word_vectors is not None:
            tokenizer, vectors = read_word_vectors(config.data.word_vectors, texts)
        else:
            tokenizer = train_tokenizer(texts, config.data.vocabulary)
        special = {name: tokenizer.token_to_id(f"<{name}>") for name in ("pad", "start", "end")}
        model = config.model.build(vocab_size=tokenizer.get_vocab_size(), classes=len(classes), **special)
        if vectors is not None:
            model = dataclasses.replace(model, word_vector_dim=vectors.shape[1])
    augment = Augment(pictures=config.data.augment, token_dropout=config.data.token_dropout)
    make = partial(collate, tokenizer=tokenizer, config=model, augment=augment)
    return Problem(*parts, classes, tokenizer, make, vectors), model


def open_run(folder: Path, device: torch.device | str = "cpu") -> Run:
    """Builds a run's model from its best checkpoint.

    Args:
        folder: of the run, or of one checkpoint.

    Raises:
        CheckpointError: not a run, or its checkpoint is damaged.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    within = folder / CHECKPOINTS
    checkpoint = checkpoints.load(checkpoints.best(within) if within.is_dir() else folder)
    if checkpoint.tokenizer is None:
        raise CheckpointError(f"{checkpoint.path}: has no tokenizer.json")
    where, written = checkpoint.path / "config.json", checkpoint.path / "tokenizer.json"
    try:
        saved = checked(Saved, checkpoint.config, str(where))
        model = MultimodalModel(ModelConfig(**saved.model.model_dump()))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except ValueError as error:
        raise CheckpointError(f"{where}: model.{error}") from None
    if len(saved.classes) != model.config.classes:
        raise CheckpointError(f"{where}: names {len(saved.classes)} classes, the model has {model.config.classes}")
    checkpoint.restore_weights(model)
    try:
        tokenizer = Tokenizer.from_str(checkpoint.tokenizer)
        largest = max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # the library has no class of its own for it
        raise CheckpointError(f"{written}: is no tokenizer ({error})") from None
    if largest >= model.config.vocab_size:
        raise CheckpointError(f"{written}: has the token {largest}, the model {model.config.vocab_size} of them")
    return Run(folder, checkpoint, saved.run, model.to(device).eval(), tokenizer, saved.classes, saved.class_prompt)
