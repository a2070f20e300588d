"""Metrics of predicted classes and of written texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score
from torchmetrics.functional.text import chrf_score


def classification_metrics(predicted: Sequence[int], labels: Sequence[int], classes: Sequence[str]) -> dict[str, Any]:
    """{"accuracy", "macro_f1", "confusion"} of as many predicted classes as labels, at least one.

    "macro_f1" is the mean over classes that are predicted or expected; "confusion" counts [expected][predicted].
    """
    p, t = torch.tensor(predicted), torch.tensor(labels)
    macro = multiclass_f1_score(p, t, len(classes), average="macro")
    confusion = multiclass_confusion_matrix(p, t, len(classes))
    return {
        "accuracy": (p == t).float().mean().item(),
        "macro_f1": macro.item(),
        "confusion": confusion.tolist(),
    }


def text_metrics(predicted: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """{"exact_match", "token_f1", "chrf"}, each in [0, 1], of as many texts as expected ones, at least one."""
    pairs = list(zip(predicted, expected, strict=True))
    return {
        "exact_match": sum(p == e for p, e in pairs) / len(pairs),
        "token_f1": sum(token_f1(p, e) for p, e in pairs) / len(pairs),
        "chrf": torch.as_tensor(chrf_score(list(predicted), [[e] for e in expected])).item(),
    }


def token_f1(predicted: str, expected: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD counts them; 1 where both texts are empty."""
    p, e = predicted.split(), expected.split()
    if not p or not e:
        return float(p == e)
    common = sum((Counter(p) & Counter(e)).values())
    return 2 * common / (len(p) + len(e))
