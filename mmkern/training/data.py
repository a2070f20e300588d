"""Samples: the emoji, or a folder of pictures with a table; and how samples become a batch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkern.model.config import Batch, ModelConfig
from mmkern.training import emoji, files, pictures
from mmkern.training.config import DataConfig
from mmkern.training.files import DataError
from mmkern.training.pictures import Augment
from mmkern.training.problem import Sample, held_out

SPLITS = ("train", "validation", "test")
COLUMNS = ("image", "prompt", "text", "label", "split", "group")
_HELD_OUT = (0.10, 0.10)  # share of test and validation where a table has no column "split"
_KEPT_SIDE = 128  # pictures are kept up to this side: 4,096 of them have 200 MB


@dataclass
class Splits:
    """Three lists that share no sample, and the names of the labels."""

    train: list[Sample]
    validation: list[Sample]
    test: list[Sample]
    classes: list[str]


def load_dataset(config: DataConfig) -> Splits:
    """Reads what `data.source` names.

    "emoji", or a folder with one table, *.csv or *.jsonl, whose rows have an image (a path in the folder), a prompt,
    a text or a label or both, and if wanted a split ("train", "validation", "test") and a group. Without a split, all
    rows of one image, or of one prompt where there is no image, go the same way. What lies outside the folder is read
    with `data.allow_outside` alone. Of each picture the head is looked at, so that what is none stops no training.

    Raises:
        DataError: the table is missing, empty or wrong; the message names the file and the line.
        OSError: it cannot be read.
    """
    if config.source == "emoji":
        parts, classes = emoji.samples(config.tasks, config.seed)
    else:
        parts, classes = _read(Path(config.source), config.seed, config.allow_outside)
    return Splits(parts[0][: config.limit or None], parts[1], parts[2], classes)


def _read(folder: Path, seed: int, allow_outside: bool) -> tuple[list[list[Sample]], list[str]]:
    if not folder.is_dir():
        raise DataError(f"data.source: {folder}: no such folder")
    tables = sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")])
    if len(tables) != 1:
        found = ", ".join(t.name for t in tables) or "none"
        raise DataError(f"data.source: {folder}: expected one table, *.csv or *.jsonl, found {found}")
    within = "" if allow_outside else os.path.join(os.path.realpath(folder), "")
    _check_place(tables[0], within, "data.source")
    parts: list[list[Sample]] = [[], [], []]
    labels: list[tuple[Sample, str]] = []
    known: set[Path] = set()
    for line, row in _rows(tables[0]):
        where = f"{tables[0]}: line {line}"
        values = _texts(row, where)
        image = folder / values["image"] if "image" in values else None
        if image is not None and image not in known:
            if not image.exists():
                raise DataError(f"{where}: no picture {values['image']}")
            _check_place(image, within, where)
            pictures.read(image, decode=False)
            known.add(image)
        for columns in (("image", "prompt"), ("text", "label")):
            if not values.keys() & columns:
                raise DataError(f"{where}: has neither {columns[0]} nor {columns[1]}")
        group = values.get("group", "text" if "label" not in values else "label")
        sample = Sample(image, values.get("prompt", ""), values.get("text"), None, group)
        split = values.get("split", SPLITS[held_out(f"{seed} {values.get('image', values.get('prompt'))}", *_HELD_OUT)])
        if split not in SPLITS:
            raise DataError(f"{where}: split: expected one of {', '.join(SPLITS)}, got {split!r}")
        parts[SPLITS.index(split)].append(sample)
        if "label" in values:
            labels.append((sample, values["label"]))
    if not any(parts):
        raise DataError(f"data.source: {tables[0]}: has no rows")
    places = {label: i for i, label in enumerate(sorted({label for _, label in labels}))}
    for sample, label in labels:
        sample.label = places[label]
    return parts, list(places)


def _check_place(path: Path, within: str, where: str) -> None:
    if not os.path.realpath(path).startswith(within):
        raise DataError(f"{where}: {path} is outside the folder; data.allow_outside = true lets it be read")


def _texts(row: dict[str, Any], where: str) -> dict[str, str]:
    """The cells of a row that are not empty, as text."""
    if unknown := row.keys() - {*COLUMNS}:
        raise DataError(f"{where}: unknown column {sorted(map(str, unknown))[0]!r}; known: {', '.join(COLUMNS)}")
    values = {name: value for name, value in row.items() if value not in (None, "")}
    for name, value in values.items():
        if not isinstance(value, (str, int, float)):
            raise DataError(f"{where}: {name}: expected a text, got a {type(value).__name__}")
        values[name] = files.text(str(value), f"{where}: {name}")
    return values


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    try:
        file = io.TextIOWrapper(io.BytesIO(files.read(table, files.TABLE)), encoding="utf-8-sig", newline="")
        if table.suffix == ".csv":
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield (number := reader.line_num), row
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise DataError(f"{table}: line {number}: expected an object, got {line.strip()[:40]}")
                yield number, row
    except DataError:
        raise
    except RecursionError:
        raise DataError(f"{table}: line {number}: is nested too deeply") from None
    except (csv.Error, ValueError) as error:  # of JSON, of UTF-8, of numbers
        raise DataError(f"{table}: line {number}: {error}") from None


def _read_picture(path: Path, side: int) -> Tensor:
    return pictures.square(pictures.read(path), side)


_kept_picture = lru_cache(maxsize=4096)(_read_picture)


def collate(
    samples: Sequence[Sample],
    generators: Sequence[torch.Generator] | None = None,
    *,
    tokenizer: Any,
    config: ModelConfig,
    augment: Augment | None = None,
) -> Batch:
    """A batch of samples; prompts and texts are cut at max_tokens.

    Args:
        generators: of each sample, what `augment` draws from; None: pictures and prompts are as they are.

    Raises:
        DataError: a picture cannot be read; the message names the file.
    """
    c = config
    present = torch.tensor([s.image is not None for s in samples]) & bool(c.image_size)
    images = None
    if present.any():
        images = torch.ones(len(samples), 3, c.image_size, c.image_size)
        for i, image in ((i, s.image) for i, s in enumerate(samples) if s.image is not None):
            assert not isinstance(image, Tensor), "a tensor takes a collate of its own"
            read = _kept_picture if c.image_size <= _KEPT_SIDE else _read_picture
            shown = read(image, c.image_size) if isinstance(image, Path) else pictures.square(image, c.image_size)
            images[i] = shown / 255
    prompts = [tokenizer.encode(s.prompt).ids[: c.max_tokens] if s.prompt else [] for s in samples]
    if augment is not None and generators is not None:
        images = None if images is None else augment.images(images, generators)
        prompts = [augment.tokens(ids, draw) for ids, draw in zip(prompts, generators, strict=True)]
    texts = [None if s.text is None else tokenizer.encode(s.text).ids[: c.max_tokens - 1] for s in samples]
    written, labelled = any(t is not None for t in texts), any(s.label is not None for s in samples)
    return Batch(
        images=images,
        image_present=None if images is None or present.all() else present,
        prompts=_padded(prompts, c.pad) if any(prompts) else None,
        prompt_lengths=torch.tensor([len(ids) for ids in prompts]) if any(prompts) else None,
        inputs=_padded([[c.start, *(t or [])] for t in texts], c.pad) if written else None,
        targets=_padded([[] if t is None else [*t, c.end] for t in texts], -100) if written else None,
        labels=torch.tensor([-100 if s.label is None else s.label for s in samples]) if labelled else None,
    )


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)
