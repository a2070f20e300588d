"""How good answers are: the model's, and those of two baselines that learn nothing; metrics of each group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score
from torchmetrics.functional.text import chrf_score

from mmkern.model import Batch, MultimodalModel, generate
from mmkern.training.problem import Problem, Sample

CHUNK = 64  # samples at a time
PRIMARY = ("accuracy", "token_f1")  # the metric of a group that its score is
Row = tuple[str, str, dict[str, Any]]  # a group of samples, a baseline or "" for the model, and its metrics
Sums = dict[str, tuple[float, int]]  # of each loss, and how many targets it is summed over


@dataclass
class Prediction:
    """What was answered to a sample; None: it was not asked for."""

    sample: Sample
    text: str | None = None
    label: int | None = None
    confidence: float | None = None  # probability of the label


def predict(
    model: MultimodalModel,
    problem: Problem,
    samples: Sequence[Sample],
    done: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> tuple[list[Prediction], Sums]:
    """Asks the model for the class of samples with a label, and for the text of samples with one.

    Args:
        done: called with the number of samples after each chunk. options: of `generate`.

    Returns:
        predictions in the order of samples, and the sum and count of each loss, for `means`.
    """
    device = next(model.parameters()).device
    found: list[Prediction] = []
    sums: Sums = {}
    training = model.training
    model.eval()
    try:
        for start in range(0, len(samples), CHUNK):
            part = [Prediction(sample) for sample in samples[start : start + CHUNK]]
            batch = problem.collate([p.sample for p in part], None).to(device)
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
            if written := [p for p in part if p.sample.text is not None]:
                texts = problem.collate([p.sample for p in written], None).to(device)
                options.setdefault("max_tokens", min(32, model.config.max_tokens))
                for prediction, ids in zip(written, generate(model, texts, **options), strict=True):
                    prediction.text = problem.tokenizer.decode(ids).strip()
            found += part
            done(len(part))
    finally:
        model.train(training)
    return found, sums


def means(parts: Sequence[Sums]) -> dict[str, float]:
    """{"loss_<name>": mean} of what `predict` returned for parts of the samples."""
    names = dict.fromkeys(name for part in parts for name in part)
    pairs = {name: [part[name] for part in parts if name in part] for name in names}
    return {f"loss_{name}": sum(p[0] for p in found) / sum(p[1] for p in found) for name, found in pairs.items()}


def asked(batch: Batch) -> dict[str, int]:
    """How many targets each loss of the batch is a mean over; 0 where the batch has none."""
    text, label, image = batch.targets, batch.labels, batch.image_embeddings
    return {
        "text": 0 if text is None else int((text != -100).sum()),
        "class": 0 if label is None else int((label != -100).sum()),
        "image": 0 if image is None else int(image.isfinite().sum()),
    }


def classification_metrics(predicted: Sequence[int], labels: Sequence[int], classes: int) -> dict[str, Any]:
    """{"accuracy", "macro_f1", "confusion"} of as many predicted classes as labels, at least one.

    "macro_f1" is the mean over classes that are predicted or expected; "confusion" counts [expected][predicted].
    """
    p, t = torch.tensor(predicted), torch.tensor(labels)
    return {
        "accuracy": (p == t).float().mean().item(),
        "macro_f1": multiclass_f1_score(p, t, classes, average="macro").item(),
        "confusion": multiclass_confusion_matrix(p, t, classes).tolist(),
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
    return 2 * sum((Counter(p) & Counter(e)).values()) / (len(p) + len(e))


def metrics(predictions: Sequence[Prediction], classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Metrics of each group of samples: of its labels, and of its texts; "samples" is their number."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.sample.group, []).append(prediction)
    found: dict[str, dict[str, Any]] = {}
    for name, group in sorted(groups.items()):
        found[name] = {"samples": len(group)}
        labels = [(p.label, p.sample.label) for p in group if p.label is not None and p.sample.label is not None]
        texts = [(p.text, p.sample.text) for p in group if p.text is not None and p.sample.text is not None]
        if labels:
            found[name] |= classification_metrics([p for p, _ in labels], [e for _, e in labels], len(classes))
        if texts:
            found[name] |= text_metrics([p for p, _ in texts], [e for _, e in texts])
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


def most_frequent(problem: Problem) -> list[Prediction]:
    """Answers each test sample as most training samples of its group; "" or the first class where there are none."""
    labels: dict[str, Counter[int]] = {}
    texts: dict[str, Counter[str]] = {}
    for sample in problem.train:
        if sample.label is not None:
            labels.setdefault(sample.group, Counter())[sample.label] += 1
        if sample.text is not None:
            texts.setdefault(sample.group, Counter())[sample.text] += 1
    label = {group: counts.most_common(1)[0][0] for group, counts in labels.items()}
    text = {group: counts.most_common(1)[0][0] for group, counts in texts.items()}
    return [_answer(s, label.get(s.group), text.get(s.group)) for s in problem.test]


def nearest_picture(problem: Problem) -> list[Prediction]:
    """Answers each test sample as the training sample of its group whose pixels are nearest (L2) is answered.

    A sample without a picture, and a group without training pictures, get the most frequent answer.
    """
    found = most_frequent(problem)
    for group in {sample.group for sample in problem.test}:
        known = [s for s in problem.train if s.group == group and s.image is not None]
        unknown = [i for i, s in enumerate(problem.test) if s.group == group and s.image is not None]
        pixels = _pixels(problem, known)
        for start in range(0, len(unknown) if known else 0, CHUNK):
            part = unknown[start : start + CHUNK]
            nearest = torch.cdist(_pixels(problem, [problem.test[i] for i in part]), pixels).argmin(1).tolist()
            for i, j in zip(part, nearest, strict=True):
                found[i] = _answer(problem.test[i], known[j].label, known[j].text)
    return found


def _answer(sample: Sample, label: int | None, text: str | None) -> Prediction:
    wants_label, wants_text = sample.label is not None, sample.text is not None
    return Prediction(sample, (text or "") if wants_text else None, (label or 0) if wants_label else None)


def _pixels(problem: Problem, samples: Sequence[Sample]) -> Tensor:
    chunks = (samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK))
    images = [problem.collate(chunk, None).images for chunk in chunks]
    return torch.cat([image.flatten(1) for image in images if image is not None]) if images else torch.empty(0)
