"""Metrics against scikit-learn and sums done by hand."""

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from mmkern.training.metrics import classification_metrics, text_metrics, token_f1


def test_classes_are_scored_as_scikit_learn_does():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=draw).tolist()
    predicted = [t if i % 3 else (t + 1) % 5 for i, t in enumerate(labels)]
    found = classification_metrics(predicted, labels, list("abcde"))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["confusion"] == confusion_matrix(labels, predicted).tolist()


def test_a_class_that_nobody_has_does_not_lower_the_f1():
    assert classification_metrics([0, 1, 1], [0, 1, 1], ["a", "b", "c"])["macro_f1"] == pytest.approx(1.0)


def test_texts():
    assert token_f1("red dark hat", "dark hat") == pytest.approx(0.8)
    assert token_f1("", "x") == 0
    assert token_f1("", "") == 1
    assert token_f1("a a", "a") == pytest.approx(2 / 3)
    found = text_metrics(["red hat", "blue"], ["red hat", "green"])
    assert found["exact_match"] == 0.5
    assert found["token_f1"] == 0.5
    assert 0.5 < found["chrf"] < 0.7
    assert text_metrics(["red hat"], ["red hat"])["chrf"] == pytest.approx(1.0)
