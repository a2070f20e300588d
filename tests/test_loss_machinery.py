"""cross_entropy in torch's machinery: errors, threads, targets of any width, no classes, the loss scale of float16."""

import math

import pytest
import torch
import torch.nn.functional as F
from loss_cases import REDUCTIONS, loss_and_gradients, problem

import mmkern
from mmkern.testing import assert_accurate


def test_float16_gradients_of_a_mean_over_many_rows_survive_a_loss_scale() -> None:
    x, target, _ = problem((4096, 50), torch.float16)  # p / 4096 alone would be subnormal or zero

    def scaled(call, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(call(x, target).float() * 32768.0, x)[0]

    exact, baseline = scaled(F.cross_entropy, x.double()), scaled(F.cross_entropy, x)
    assert_accurate(scaled(mmkern.cross_entropy, x), exact, baseline, "gradient")


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("shape", [(200, 1000), (3, 50, 400), (5, 9001)])
def test_deterministic_over_threads_repeats_and_batch_mates(kind, shape):
    x, target, weight = problem(shape, torch.float32, kind=kind, weighted=True)
    copies = x.clone(), target.clone(), weight.clone()
    before = torch.get_num_threads()
    try:
        for reduction in REDUCTIONS:
            torch.set_num_threads(1)
            call = {"reduction": reduction, "label_smoothing": 0.1}
            expected = loss_and_gradients(mmkern.cross_entropy, x, target, weight, **call)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                for _ in range(20 if threads == 2 else 1):
                    found = loss_and_gradients(mmkern.cross_entropy, x, target, weight, **call)
                    assert all(map(torch.equal, found, expected))
        rows = [mmkern.cross_entropy(x[i:], target[i:], weight, reduction="none") for i in (0, 1)]
        assert torch.equal(rows[0][1:], rows[1])
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, (x, target, weight), copies))


X, T = torch.zeros(3, 4), torch.tensor([0, 1, 2])
ERRORS = [
    (lambda: mmkern.cross_entropy([1.0], T), TypeError, "input"),
    (lambda: mmkern.cross_entropy(X.int(), T), TypeError, "input.*int32"),
    (lambda: mmkern.cross_entropy(torch.tensor(1.0), T), ValueError, r"input.*\(\)"),
    (lambda: mmkern.cross_entropy(X, [0, 1, 2]), TypeError, "target.*list"),
    (lambda: mmkern.cross_entropy(X, T > 0), TypeError, "target.*bool"),
    (lambda: mmkern.cross_entropy(X, T[:2]), ValueError, r"target.*\(3,\).*\(2,\)"),
    (lambda: mmkern.cross_entropy(X, X[:2]), ValueError, r"target.*\(3, 4\).*\(2, 4\)"),
    (lambda: mmkern.cross_entropy(X, T.to("meta")), ValueError, "target.*meta.*cpu"),
    (lambda: mmkern.cross_entropy(X, X, ignore_index=1), ValueError, "ignore_index.*1"),
    (lambda: mmkern.cross_entropy(X, T, ignore_index=None), TypeError, "ignore_index"),
    (lambda: mmkern.cross_entropy(X, T, torch.ones(3)), ValueError, r"weight.*\(4,\).*\(3,\)"),
    (lambda: mmkern.cross_entropy(X, T, torch.ones(4, dtype=torch.int64)), TypeError, "weight.*int64"),
    (lambda: mmkern.cross_entropy(X, T, torch.ones(4, device="meta")), ValueError, "weight.*meta.*cpu"),
    (lambda: mmkern.cross_entropy(X, T, reduction="avg"), ValueError, "reduction.*avg"),
    (lambda: mmkern.cross_entropy(X, T, label_smoothing=1.5), ValueError, "label_smoothing.*1.5"),
    (lambda: mmkern.cross_entropy(X, T, label_smoothing=math.nan), ValueError, "label_smoothing.*nan"),
    (lambda: mmkern.cross_entropy(X, T, label_smoothing="0"), TypeError, "label_smoothing"),
    (lambda: mmkern.cross_entropy(X, T + 2), IndexError, r"target.*\[0, 4\).*4"),
    (lambda: mmkern.cross_entropy(X, T - 1), IndexError, r"target.*-1"),
    (lambda: mmkern.cross_entropy(X.double(), T + 2), IndexError, r"target.*\[0, 4\).*4"),
]


@pytest.mark.parametrize(("call", "error", "words"), ERRORS)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_integer_targets_of_any_width():
    expected = mmkern.cross_entropy(X, T)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(mmkern.cross_entropy(X, T.to(dtype)), expected)


def test_no_classes():
    x, ignored = torch.zeros(3, 0), torch.full((3,), -100)
    for reduction in REDUCTIONS:
        for target in (x, ignored):
            found = mmkern.cross_entropy(x, target, reduction=reduction)
            torch.testing.assert_close(found, F.cross_entropy(x, target, reduction=reduction), equal_nan=True)
    with pytest.raises(IndexError, match=r"target.*\[0, 0\)"):
        mmkern.cross_entropy(x, ignored * 0)
