"""A training run's configuration: a TOML file of three sections, every key with a default."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from mmkern.model.config import ModelConfig

_FROM_DATA = ("vocab_size", "classes", "pad", "start", "end", "image_backbone")  # of ModelConfig: found, not chosen

GLOVE = "glove"  # in place of a file of word vectors: those of the extra `glove`

_DEFAULTS = {"dropout": 0.05}  # a short run learns too little to overfit


class ConfigError(ValueError):
    """A configuration is wrong; one line that names the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class _ModelSection(_Section):
    @model_validator(mode="after")
    def _holds_together(self) -> _ModelSection:
        self.build(vocab_size=3, classes=0)
        return self

    def build(self, vocab_size: int, classes: int, **special: Any) -> ModelConfig:
        """The model's configuration, now that the data are known; special: pad, start, end."""
        return ModelConfig(vocab_size=vocab_size, classes=classes, **special, **self.model_dump())


_HINTS = get_type_hints(ModelConfig)
if TYPE_CHECKING:
    ModelSection: TypeAlias = Any
else:
    ModelSection = create_model(
        "ModelSection",
        __base__=_ModelSection,
        **{
            f.name: (_HINTS[f.name], _DEFAULTS.get(f.name, f.default))
            for f in fields(ModelConfig)
            if f.name not in _FROM_DATA
        },
    )


class DataConfig(_Section):
    """What is learned from."""

    source: str = "emoji"  # or a folder of pictures with a CSV or JSONL of texts and labels
    tasks: list[str] = ["name", "category", "fits"]  # of "emoji"
    vocabulary: int = Field(default=1024, ge=259)  # tokens of the byte-level BPE
    word_vectors: Path | None = None  # GloVe text, word2vec, .npy with a vocabulary beside it, or "glove": the extra's
    augment: bool = True  # crop, shift, colour jitter and occlusion of pictures
    token_dropout: float = Field(default=0.0, ge=0, lt=1)  # of prompts
    seed: int = 0  # of the split
    limit: int = Field(default=0, ge=0)  # samples of the training split; 0: all
    workers: int = Field(default=1, ge=0)  # processes that load ahead; 0: none


class TrainingConfig(_Section):
    """How it is learned."""

    steps: int = Field(default=4500, ge=1)
    batch_size: int = Field(default=32, ge=1)  # over all processes
    seed: int = 0
    device: str = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: float = Field(default=2e-3, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # of sgd
    betas: tuple[float, float] = (0.9, 0.98)  # of adam and adamw
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, ge=0)  # norm of the gradient; 0: as it is
    schedule: Literal["constant", "step", "cosine", "linear", "plateau"] = "cosine"
    warmup: int = Field(default=800, ge=0)  # steps
    decay_every: int = Field(default=500, ge=1)  # steps, of the schedule step
    decay: float = Field(default=0.1, gt=0, le=1)  # of the schedules step and plateau
    floor: float = Field(default=0.02, ge=0, le=1)  # of cosine and linear: share of the learning rate at the end
    patience: int = Field(default=2, ge=0)  # evaluations without a better score before the schedule plateau decays
    stop_after: int = Field(default=0, ge=0)  # evaluations without a better score before training stops; 0: never
    weights: dict[Literal["text", "class", "image", "distill"], float] = {}  # of the losses; 1 unless given
    teacher: Path | None = None  # run folder of a model whose answers are learned too
    temperature: float = Field(default=2.0, gt=0)  # of teacher and student
    evaluate_every: int = Field(default=500, ge=1)  # steps
    checkpoint_every: int = Field(default=250, ge=1)  # steps
    evaluation_samples: int = Field(default=384, ge=1)  # of the validation split, at most


class RunConfig(_Section):
    """A whole run."""

    model: ModelSection = ModelSection()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()


def parse(values: dict[str, Any], origin: str = "configuration") -> RunConfig:
    """Checks what a TOML file holds.

    Raises:
        ConfigError: a key is unknown, or a value wrong.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as wrong:
        raise ConfigError(f"{origin}: {_line(wrong)}") from None


def read(path: Path) -> RunConfig:
    """Reads a TOML file; paths in it are relative to its folder.

    Raises:
        ConfigError: no such file, no TOML, a key is unknown, or a value wrong.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{path}: is no TOML: {error}") from None
    config = parse(values, str(path))
    here = path.parent
    data: dict[str, Any] = {}
    if str(config.data.word_vectors) != GLOVE:
        data["word_vectors"] = _within(here, config.data.word_vectors)
    if config.data.source != "emoji":
        data["source"] = str(_within(here, Path(config.data.source)))
    weights = _within(here, config.model.image_weights)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"image_weights": weights and str(weights)}),
            "data": config.data.model_copy(update=data),
            "training": config.training.model_copy(update={"teacher": _within(here, config.training.teacher)}),
        }
    )


def _within(folder: Path, path: Path | str | None) -> Path | None:
    return None if path is None else folder / path


def _line(wrong: ValidationError) -> str:
    """The first thing that is wrong, by its key; an unknown key with the known one nearest to it."""
    first = wrong.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in place[:-1]:
            section = section.model_fields[part].annotation
        known = list(section.model_fields)
        if place[-1] in _FROM_DATA and place[0] == "model":
            return f"{key}: is not set here: data, tokenizer and weights tell"
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        if near:
            return f"unknown key {key}; did you mean {'.'.join([*place[:-1], near[0]])}?"
        return f"unknown key {key}; known: {', '.join(known)}"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":  # of ModelConfig: it names its key
        return f"{key}.{reason}"
    return f"{key}: {reason[0].lower()}{reason[1:]}, got {first['input']!r}"
