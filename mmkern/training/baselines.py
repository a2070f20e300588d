"""What is reached without learning: the most frequent answer, and that to the most similar training picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkern.training.evaluation import Prediction
from mmkern.training.problem import Problem

_CHUNK = 256  # pictures at a time


def most_frequent(problem: Problem) -> list[Prediction]:
    """Answers each test sample as most training samples of its group are; "" where there are none."""
    labels: dict[str, Counter[int]] = {}
    texts: dict[str, Counter[str]] = {}
    for sample in _all(problem.train):
        if sample.label is not None:
            labels.setdefault(sample.group, Counter())[sample.label] += 1
        if sample.text is not None:
            texts.setdefault(sample.group, Counter())[sample.text] += 1
    found = []
    for sample in _all(problem.test):
        label = labels[sample.group].most_common(1)[0][0] if sample.group in labels else 0
        text = texts[sample.group].most_common(1)[0][0] if sample.group in texts else ""
        found.append(_answer(sample, label, text))
    return found


def nearest_picture(problem: Problem) -> list[Prediction]:
    """Answers each test sample as the training sample of its group whose pixels are nearest (L2) is answered.

    A sample without a picture, and a group without training pictures, get the most frequent answer.
    """
    found = most_frequent(problem)
    train, test = list(_all(problem.train)), list(_all(problem.test))
    for group in dict.fromkeys(sample.group for sample in test):
        known = [s for s in train if s.group == group and s.image is not None]
        asked = [i for i, s in enumerate(test) if s.group == group and s.image is not None]
        if not known or not asked:
            continue
        pixels = _pixels(problem, known)
        for start in range(0, len(asked), _CHUNK):
            part = asked[start : start + _CHUNK]
            nearest = torch.cdist(_pixels(problem, [test[i] for i in part]), pixels).argmin(1).tolist()
            for i, j in zip(part, nearest, strict=True):
                found[i] = _answer(test[i], known[j].label, known[j].text)
    return found


def _answer(sample: Any, label: int | None, text: str | None) -> Prediction:
    wants_label, wants_text = sample.label is not None, sample.text is not None
    return Prediction(sample, (text or "") if wants_text else None, (label or 0) if wants_label else None)


def _all(samples: Sequence[Any]) -> Any:
    return (samples[i] for i in range(len(samples)))


def _pixels(problem: Problem, samples: Sequence[Any]) -> Tensor:
    parts = []
    for start in range(0, len(samples), _CHUNK):
        images = problem.collate(samples[start : start + _CHUNK], None).images
        assert images is not None
        parts.append(images.flatten(1))
    return torch.cat(parts)
