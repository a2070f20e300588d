"""Metrics against scikit-learn and sums done by hand."""

import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from mmkern.model.config import ModelConfig
from mmkern.training import evaluation
from mmkern.training.data import Sample, collate
from mmkern.training.evaluation import classification_metrics, text_metrics, token_f1
from mmkern.training.problem import Problem
from mmkern.training.text import train_tokenizer


def test_classes_are_scored_as_scikit_learn_does():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=draw).tolist()
    predicted = [t if i % 3 else (t + 1) % 5 for i, t in enumerate(labels)]
    found = classification_metrics(predicted, labels, 5)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["confusion"] == confusion_matrix(labels, predicted).tolist()


def test_a_class_that_nobody_has_does_not_lower_the_f1():
    assert classification_metrics([0, 1, 1], [0, 1, 1], 3)["macro_f1"] == pytest.approx(1.0)


def test_texts():
    assert token_f1("red dark hat", "dark hat") == pytest.approx(0.8)
    assert token_f1("", "x") == 0
    assert token_f1("", "") == 1
    assert token_f1("a a", "a") == pytest.approx(2 / 3)
    found = text_metrics(["red hat", "blue"], ["red hat", "green"])
    assert found["exact_match"] == 0.5
    assert found["token_f1"] == 0.5
    assert 0.6 < found["chrf"] < 0.8  # over all characters, of which the right text has more
    assert text_metrics(["red hat"], ["red hat"])["chrf"] == pytest.approx(1.0)


def test_baselines_answer_most_often_and_as_the_nearest_picture():
    def shade(value):
        return Image.new("RGB", (4, 4), (value,) * 3)

    tokenizer = train_tokenizer(["x"], 260)
    config = ModelConfig(vocab_size=260, image_size=4)
    train = [Sample(shade(v), "p", None, label, "g") for v, label in ((0, 0), (100, 1), (200, 1))]
    train += [Sample(shade(v), "p", text, None, "h") for v, text in ((0, "dark"), (200, "light"), (0, "dark"))]
    test = [Sample(shade(v), "p", *answer) for v in (40, 160) for answer in ((None, 1, "g"), ("light", None, "h"))]
    test += [Sample(None, "p", None, 0, "g"), Sample(None, "p", "new", None, "elsewhere")]
    problem = Problem(
        train, [], test, ["a", "b"], tokenizer, lambda s, g: collate(s, g, tokenizer=tokenizer, config=config)
    )
    usual, nearest = evaluation.most_frequent(problem), evaluation.nearest_picture(problem)
    assert [(p.label, p.text) for p in usual] == [(1, None), (None, "dark")] * 2 + [(1, None), (None, "")]
    near = [(0, None), (None, "dark"), (1, None), (None, "light"), (1, None), (None, "")]
    assert [(p.label, p.text) for p in nearest] == near
