"""How good a model is on samples: predictions, and metrics of each group of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmkern.model import MultimodalModel, generate
from mmkern.training.metrics import classification_metrics, text_metrics
from mmkern.training.problem import Problem

CHUNK = 64  # samples at a time
Row = tuple[str, str, dict[str, Any]]  # a group of samples, a baseline or "" for the model, and its metrics
PRIMARY = ("accuracy", "token_f1")  # the metric of a group that its score is


@dataclass
class Prediction:
    """What the model said to a sample; None: it was not asked for."""

    sample: Any
    text: str | None = None
    label: int | None = None
    confidence: float | None = None  # probability of the label


def predict(
    model: MultimodalModel,
    problem: Problem,
    samples: Sequence[Any],
    done: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> tuple[list[Prediction], dict[str, tuple[float, int]]]:
    """Asks the model for the class of samples with a label, and for the text of samples with one.

    Args:
        done: called with the number of samples after each chunk. options: of `generate`.

    Returns:
        predictions in the order of samples, and the sum and count of each loss, for `means`.
    """
    device = next(model.parameters()).device
    found: list[Prediction] = []
    sums: dict[str, tuple[float, int]] = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(samples), CHUNK):
            chunk = [samples[i] for i in range(start, min(start + CHUNK, len(samples)))]
            part = [Prediction(sample) for sample in chunk]
            batch = problem.collate(chunk, None).to(device)
            with torch.inference_mode():
                outputs = model(batch)
                losses = model.loss(batch, outputs)
            for name, count in asked(batch).items():
                if count:
                    total, before = sums.get(name, (0.0, 0))
                    sums[name] = total + float(losses[name]) * count, before + count
            if "class_logits" in outputs:
                confidence, label = outputs["class_logits"].float().softmax(-1).max(-1)
                for i, prediction in enumerate(part):
                    if prediction.sample.label is not None:
                        prediction.label, prediction.confidence = int(label[i]), float(confidence[i])
            written = [i for i, p in enumerate(part) if p.sample.text is not None]
            if written:
                texts = problem.collate([chunk[i] for i in written], None).to(device)
                options.setdefault("max_tokens", min(32, model.config.max_tokens))
                for i, ids in zip(written, generate(model, texts, **options), strict=True):
                    part[i].text = problem.tokenizer.decode(ids).strip()
            found += part
            done(len(chunk))
    finally:
        model.train(training)
    return found, sums


def means(parts: Sequence[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """{"loss_<name>": mean} of what `predict` returned for parts of the samples."""
    names = dict.fromkeys(name for part in parts for name in part)
    pairs = {name: [part[name] for part in parts if name in part] for name in names}
    return {f"loss_{name}": sum(p[0] for p in found) / sum(p[1] for p in found) for name, found in pairs.items()}


def asked(batch: Any) -> dict[str, int]:
    """How many targets each loss of the batch is a mean over; 0 where the batch has none."""
    text, label, image = batch.targets, batch.labels, batch.image_embeddings
    return {
        "text": 0 if text is None else int((text != -100).sum()),
        "class": 0 if label is None else int((label != -100).sum()),
        "image": 0 if image is None else int(image.isfinite().sum()),
    }


def metrics(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metrics of each group of samples: of its labels, and of its texts; "samples" is their number."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.sample.group, []).append(prediction)
    found: dict[str, dict[str, Any]] = {}
    for name, group in sorted(groups.items()):
        values: dict[str, Any] = {"samples": len(group)}
        if labels := [(p.label, p.sample.label) for p in group if p.label is not None]:
            values |= classification_metrics([p for p, _ in labels], [e for _, e in labels], list(classes))
        if texts := [(p.text, p.sample.text) for p in group if p.text is not None]:
            values |= text_metrics([p for p, _ in texts], [e for _, e in texts])
        found[name] = values
    return found


def rows(found: dict[str, dict[str, Any]], baselines: dict[str, dict[str, dict[str, Any]]]) -> list[Row]:
    """The metrics of each group, then those of the baselines for it."""
    return [(g, name, of[g]) for g in found for name, of in {"": found, **baselines}.items() if g in of]


def metric_names(rows: Sequence[Row]) -> list[str]:
    """What is told of any of them, in order."""
    return [n for n in dict.fromkeys(n for *_, values in rows for n in values) if n != "confusion"]


def score(found: dict[str, dict[str, Any]]) -> float:
    """One number to choose checkpoints by: the mean over groups of accuracy, or token F1 where there are no labels."""
    values = [next(v[name] for name in PRIMARY if name in v) for v in found.values()]
    return sum(values) / len(values) if values else 0.0
