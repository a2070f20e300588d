"""Samples: the emoji, or a folder of pictures with a table; and how samples become a batch."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmkern.model.config import Batch, ModelConfig
from mmkern.training import emoji
from mmkern.training.augment import Augment
from mmkern.training.config import DataConfig
from mmkern.training.problem import DataError

SPLITS = ("train", "validation", "test")
COLUMNS = ("image", "prompt", "text", "label", "split", "group")
_HELD_OUT = (0.10, 0.10)  # share of test and validation where a table has no column "split"


@dataclass
class Sample:
    """What is shown and asked, and what is to be answered: a text, a class, or both."""

    image: Image.Image | Path | None
    prompt: str
    text: str | None
    label: int | None
    group: str  # metrics are told apart by it


class Dataset(torch.utils.data.Dataset[Sample]):
    """dataset[i] -> Sample; `classes` are the names of labels."""

    def __init__(self, samples: Sequence[Sample], classes: Sequence[str]) -> None:
        self.samples, self.classes = list(samples), list(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        return self.samples[i]


@dataclass
class Splits:
    """Three datasets that share no sample."""

    train: Dataset
    validation: Dataset
    test: Dataset


def load_dataset(config: DataConfig) -> Splits:
    """Reads what `data.source` names.

    "emoji", or a folder with one table, *.csv or *.jsonl, whose rows have an image (a path in the folder), a prompt,
    a text or a label or both, and if wanted a split ("train", "validation", "test") and a group. Without a split, all
    rows of one image, or of one prompt where there is no image, go the same way.

    Raises:
        DataError: the table is missing, empty or wrong; the message names the file and the line.
        OSError: it cannot be read.
    """
    if config.source == "emoji":
        rows, classes = emoji.samples(config.tasks, config.seed)
        parts = [[Sample(**row) for row in split] for split in rows]
    else:
        parts, classes = _read(Path(config.source), config.seed)
    parts[0] = parts[0][: config.limit] if config.limit else parts[0]
    return Splits(*(Dataset(part, classes) for part in parts))


def _read(folder: Path, seed: int) -> tuple[list[list[Sample]], list[str]]:
    if not folder.is_dir():
        raise DataError(f"data.source: {folder}: no such folder")
    tables = sorted([*folder.glob("*.csv"), *folder.glob("*.jsonl")])
    if len(tables) != 1:
        found = ", ".join(t.name for t in tables) or "none"
        raise DataError(f"data.source: {folder}: expected one table, *.csv or *.jsonl, found {found}")
    parts: list[list[Sample]] = [[], [], []]
    labels: list[tuple[Sample, str]] = []
    for line, row in _rows(tables[0]):
        where = f"{tables[0]}: line {line}"
        if unknown := row.keys() - {*COLUMNS}:
            raise DataError(f"{where}: unknown column {sorted(map(str, unknown))[0]!r}; known: {', '.join(COLUMNS)}")
        values = {name: str(value) for name, value in row.items() if value not in (None, "")}
        image = folder / values["image"] if "image" in values else None
        if image is not None and not image.is_file():
            raise DataError(f"{where}: no picture {values['image']}")
        if image is None and "prompt" not in values:
            raise DataError(f"{where}: has neither image nor prompt")
        if "text" not in values and "label" not in values:
            raise DataError(f"{where}: has neither text nor label")
        group = values.get("group", "text" if "label" not in values else "label")
        sample = Sample(image, values.get("prompt", ""), values.get("text"), None, group)
        shown = values.get("image", values.get("prompt"))
        split = values.get("split", SPLITS[_place(f"{seed} {shown}")])
        if split not in SPLITS:
            raise DataError(f"{where}: split: expected one of {', '.join(SPLITS)}, got {split!r}")
        parts[SPLITS.index(split)].append(sample)
        if "label" in values:
            labels.append((sample, values["label"]))
    if not any(parts):
        raise DataError(f"data.source: {tables[0]}: has no rows")
    classes = sorted({label for _, label in labels})
    for sample, label in labels:
        sample.label = classes.index(label)
    return parts, classes


def _rows(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    yield reader.line_num, row
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        row = json.loads(line)
                        if not isinstance(row, dict):
                            raise DataError(f"{table}: line {number}: expected an object, got {line.strip()[:40]}")
                        yield number, row
    except (csv.Error, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{table}: {error}") from None


def _place(key: str) -> int:
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    test, validation = _HELD_OUT
    return 2 if share < test else 1 if share < test + validation else 0


def picture(image: Image.Image, side: int) -> Tensor:
    """(3, side, side) uint8 of a picture: upright, made square and transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value * (1 / 256)).convert("L")  # Pillow alone would clip at 255
    if image.mode != "RGB":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.width != image.height:
        longest = max(image.size)
        square = Image.new("RGB", (longest, longest), "white")
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        image = square
    if image.width != side:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    content = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return content.view(side, side, 3).permute(2, 0, 1)


@lru_cache(maxsize=4096)  # of 72 x 72 pictures 64 MB
def _read_picture(path: Path, side: int) -> Tensor:
    try:
        with Image.open(path) as image:
            return picture(image, side)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: is no picture that Pillow can read ({type(error).__name__})") from None


def collate(
    samples: Sequence[Sample],
    tokenizer: Any,
    model_config: ModelConfig,
    augment: Augment | None = None,
    generators: Sequence[torch.Generator] | None = None,
) -> Batch:
    """A batch of samples; prompts and texts are cut at max_tokens.

    Args:
        augment: what is done to pictures and prompts, with draws from a sample's own of `generators`; None: nothing.

    Raises:
        DataError: a picture cannot be read; the message names the file.
    """
    c = model_config
    present = torch.tensor([s.image is not None for s in samples]) & bool(c.image_size)
    images = None
    if present.any():
        images = torch.ones(len(samples), 3, c.image_size, c.image_size)
        for i, sample in enumerate(samples):
            if isinstance(sample.image, Path):
                images[i] = _read_picture(sample.image, c.image_size) / 255
            elif sample.image is not None:
                images[i] = picture(sample.image, c.image_size) / 255
    prompts = [tokenizer.encode(s.prompt).ids[: c.max_tokens] if s.prompt else [] for s in samples]
    if augment is not None:
        assert generators is not None, "generators: augmentation draws from them"
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
