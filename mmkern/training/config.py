"""A training run's configuration: a TOML file of three sections, every key with a default."""

from __future__ import annotations

import difflib
import reprlib
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from mmkern.model.config import ModelConfig
from mmkern.training import files

_FROM_DATA = ("vocab_size", "classes", "pad", "start", "end", "image_backbone")  # of ModelConfig: found, not chosen
_DEFAULTS = {"dropout": 0.05}  # a short run learns too little to overfit
GLOVE = "glove"  # in place of a file of word vectors: those of the extra `glove`

Count = Annotated[int, Field(ge=0, le=10**9)]  # of steps, samples, evaluations: years of training
Positive = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=-(2**53), le=2**53)]  # torch takes 64 bits, the loop a thousand of them for each
Share = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(files.Refused):
    """A configuration is wrong; the line names the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, (str, Path)):
            str(value).encode()  # a checkpoint keeps it as JSON: a folder's name may be no Unicode
        return value


class _ModelSection(_Section):
    @model_validator(mode="after")
    def _holds_together(self) -> _ModelSection:
        self.build(vocab_size=3, classes=0)
        return self

    def build(self, vocab_size: int, classes: int, **special: Any) -> ModelConfig:
        """The model's configuration, now that the data are known; special: pad, start, end."""
        return ModelConfig(vocab_size=vocab_size, classes=classes, **special, **self.model_dump())


if TYPE_CHECKING:
    ModelSection: TypeAlias = Any
    SavedModel: TypeAlias = Any
else:
    kinds = get_type_hints(ModelConfig)
    known = {f.name: (kinds[f.name], _DEFAULTS.get(f.name, f.default)) for f in fields(ModelConfig)}
    chosen = {name: field for name, field in known.items() if name not in _FROM_DATA}
    ModelSection = create_model("ModelSection", __base__=_ModelSection, **chosen)
    SavedModel = create_model("SavedModel", __base__=_Section, **{name: (kinds[name], ...) for name in known})


class DataConfig(_Section):
    """What is learned from."""

    source: str = "emoji"  # or a folder of pictures with a CSV or JSONL of texts and labels
    tasks: list[str] = ["name", "category", "fits"]  # of "emoji"
    allow_outside: bool = False  # read pictures and tables that lie outside the folder: absolute paths, "..", links
    vocabulary: Annotated[int, Field(ge=259, le=2**20)] = 1024  # of the byte-level BPE; at most 4x the largest known
    word_vectors: Path | None = None  # GloVe text, word2vec, .npy with a vocabulary beside it, or "glove": the extra's
    augment: bool = True  # crop, shift, colour jitter and occlusion of pictures
    token_dropout: Share = 0.0  # of prompts
    seed: Seed = 0  # of the split
    limit: Count = 0  # samples of the training split; 0: all
    workers: Annotated[int, Field(ge=0, le=256)] = 1  # processes that load ahead; 0: none


class TrainingConfig(_Section):
    """How it is learned."""

    steps: Positive = 4500
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = 32  # over all processes; at most 2x the largest known to train
    seed: Seed = 0
    device: str = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # of torch on the CPU; 0: as many as torch starts by itself
    precision: Literal["float32", "bf16"] = "float32"
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    momentum: Share = 0.9  # of sgd
    betas: tuple[Share, Share] = (0.9, 0.98)  # of adam and adamw
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(ge=0)] = 1.0  # norm of the gradient; 0: as it is
    schedule: Literal["constant", "step", "cosine", "linear", "plateau"] = "cosine"
    warmup: Count = 800  # steps
    decay_every: Positive = 500  # steps, of the schedule step
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the schedules step and plateau
    floor: Annotated[float, Field(ge=0, le=1)] = 0.02  # of cosine and linear: share of the learning rate at the end
    patience: Count = 2  # evaluations without a better score before the schedule plateau decays
    stop_after: Count = 0  # evaluations without a better score before training stops; 0: never
    weights: dict[Literal["text", "class", "image", "distill"], Annotated[float, Field(ge=0)]] = {}  # 1 unless given
    teacher: Path | None = None  # run folder of a model whose answers are learned too
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 2.0  # of teacher and student
    evaluate_every: Positive = 500  # steps
    checkpoint_every: Positive = 250  # steps
    evaluation_samples: Positive = 384  # of the validation split, at most


class RunConfig(_Section):
    """A whole run."""

    model: ModelSection = ModelSection()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()


class Saved(_Section):
    """The config.json of a checkpoint: what was trained, and what it depends on."""

    run: RunConfig
    model: SavedModel
    classes: list[str]
    class_prompt: str  # that samples with a label mostly had
    data: dict[str, str]  # `Problem.fingerprint`


Section = TypeVar("Section", bound=BaseModel)


def checked(kind: type[Section], values: Any, origin: str) -> Section:
    """The values as a section; ConfigError where a key is unknown or missing, or a value wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as wrong:
        raise ConfigError(f"{origin}: {_line(wrong, kind)}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: is nested too deeply") from None


def parse(values: Any, origin: str = "configuration") -> RunConfig:
    """Checks what a TOML file holds; raises ConfigError as `checked`."""
    return checked(RunConfig, values, origin)


def read(path: Path) -> RunConfig:
    """Reads a TOML file, in which paths are relative to its folder; raises ConfigError as `load` and `checked`."""
    changed = parse(load(path, tomllib.loads, "TOML"), str(path)).model_dump()
    places = ("model", "image_weights"), ("data", "word_vectors"), ("training", "teacher"), ("data", "source")
    for section, name in places:
        value = changed[section][name]
        if value is not None and str(value) != {"source": "emoji", "word_vectors": GLOVE}.get(name):
            changed[section][name] = str(path.parent / value)
    return parse(changed, str(path))


def load(path: Path, decode: Callable[[str], Any], kind: str = "JSON") -> Any:
    """What a file of settings holds; ConfigError where it cannot be read, is too large, or is none of this kind."""
    try:
        return decode(files.read(path, files.SETTINGS).decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # of this kind, or of UTF-8
        raise ConfigError(f"{path}: is no {kind}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is no {kind} that can be read: it is nested too deeply") from None


def _line(wrong: ValidationError, kind: type[BaseModel]) -> str:
    """The first thing that is wrong, by its key; an unknown key with the known one nearest to it."""
    first = wrong.errors()[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place) or "all of it"
    if first["type"] == "extra_forbidden":
        if place[-1] in _FROM_DATA and place[0] == "model":
            return f"{key}: is not set here: data, tokenizer and weights tell"
        section: Any = kind
        for part in place[:-1]:
            section = section.model_fields[part].annotation
        near = difflib.get_close_matches(place[-1], list(section.model_fields), n=1, cutoff=0.5)
        if near:
            return f"unknown key {key}; did you mean {'.'.join([*place[:-1], near[0]])}?"
        return f"unknown key {key}; known: {', '.join(section.model_fields)}"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and key == "model":  # of ModelConfig: it names its key
        return f"{key}.{reason}"
    return f"{key}: {reason[0].lower()}{reason[1:]}, got {reprlib.repr(first['input'])}"
