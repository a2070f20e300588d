"""cross_entropy and its gradients against torch in float64: instruction sets, dtypes, kinds of target, layouts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import mmkern
from mmkern import testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(33,), (7, 33), (3, 5, 7), (2, 17, 3, 4), (2, 4100), (3, 9, 70), (5, 1), (2, 3, 1), (0, 4), (2, 9001)]
REDUCTIONS = ("none", "mean", "sum")


def kernels(isa):
    return mmkern.backend("cpu", strict=True, isa=isa)


def problem(shape, dtype, layout="contiguous", kind="index", weighted=False):
    """Logits, target and weight."""
    dim = min(1, len(shape) - 1)
    # Of few classes one would win a loss of nearly 0, whose digits cancel, in torch's as in ours.
    x = testing.randn(*shape, dtype=dtype, layout=layout, scale=3.0 if shape[dim] > 8 else 0.5)
    weight = (testing.randn(shape[dim], seed=4).abs() + 0.1).to(dtype) if weighted else None
    if kind == "soft":
        return x, torch.softmax(testing.randn(*shape, seed=3), dim).to(dtype), weight
    draw = torch.Generator().manual_seed(5)
    target = torch.randint(0, shape[dim], shape[:dim] + shape[dim + 1 :], generator=draw)
    if target.numel() > 1:
        target.view(-1)[::3] = -100
    return x, target, weight


def loss_and_gradients(call, x, target, weight, **options):
    leaves = [x.detach().requires_grad_()]
    if target.is_floating_point():
        leaves.append(target.detach().requires_grad_())
        target = leaves[1]
    loss = call(leaves[0], target, weight, **options)
    grad = testing.randn(*loss.shape, seed=9).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad)


def double(*tensors):
    return [t if t is None or not t.is_floating_point() else t.double() for t in tensors]


def compare(found, exact, baseline):
    for i, (a, e, b) in enumerate(zip(found, exact, baseline, strict=True)):
        assert a.dtype == b.dtype
        testing.assert_accurate(a, e, b, "gradient" if i else "forward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_matches_float64(dtype, shape, kind):
    layouts = testing.LAYOUTS if len(shape) > 1 else ("contiguous", "strided", "offset")
    cases = [("contiguous", *case) for case in itertools.product((False, True), (0.0, 0.1), REDUCTIONS)]
    cases += [case for layout in layouts[1:] for case in ((layout, True, 0.1, "mean"), (layout, False, 0.0, "none"))]
    for layout, weighted, smoothing, reduction in cases:
        inputs = problem(shape, dtype, layout, kind, weighted)
        options = {"reduction": reduction, "label_smoothing": smoothing}
        exact = loss_and_gradients(F.cross_entropy, *double(*inputs), **options)
        baseline = loss_and_gradients(F.cross_entropy, *inputs, **options)
        for isa in testing.isas():
            with kernels(isa), testing.poisoned():
                found = loss_and_gradients(mmkern.cross_entropy, *inputs, **options)
                compare(found, exact, baseline)
                with torch.no_grad():
                    plain = mmkern.cross_entropy(*inputs, **options)
                assert torch.equal(plain, found[0]) or plain.isnan().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9,), (6, 9), (2, 4, 3, 2)], ids=str)
def test_reference_is_torch_in_float64(smoothing, kind, weighted, shape):
    inputs = problem(shape, torch.float64, kind=kind, weighted=weighted)
    for reduction, ignored in itertools.product(REDUCTIONS, (-100, 2) if kind == "index" else (-100,)):
        target = inputs[1].clamp(min=0) if ignored == 2 else inputs[1]
        options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignored}
        found = loss_and_gradients(mmkern.cross_entropy, inputs[0], target, inputs[2], **options)
        expected = loss_and_gradients(F.cross_entropy, inputs[0], target, inputs[2], **options)
        for a, e in zip(found, expected, strict=True):
            testing.assert_accurate(a, e, kind="gradient")
        single = [t if t is None or t.dtype == torch.int64 else t.float() for t in (inputs[0], target, inputs[2])]
        found = loss_and_gradients(mmkern.cross_entropy, *single, **options)
        exact = loss_and_gradients(F.cross_entropy, *double(*single), **options)
        compare(found, exact, loss_and_gradients(F.cross_entropy, *single, **options))


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("layout", ["rows", "columns", "long"])
def test_nan_and_infinity(isa, layout):
    shape = {"rows": (12, 40), "columns": (2, 40, 19), "long": (12, 9001)}[layout]
    x, target, weight = problem(shape, torch.float32, weighted=True)
    target = target.clamp(min=0)
    rows = x.movedim(1, -1).view(-1, shape[1]) if layout != "columns" else x.movedim(1, -1)[0]
    aim = target if layout != "columns" else target[0]
    rows[1, 3], rows[2, 5], rows[3, 4] = torch.nan, torch.inf, -torch.inf
    rows[4, aim[4]] = -torch.inf
    rows[5] = -torch.inf
    rows[6, :30] = -torch.inf
    if layout == "long":
        rows[7, 4096:8192] = -torch.inf
        rows[8] = -torch.inf
        rows[8, 5000] = 1.0
        rows[9, 8999] = torch.nan
    weight[3] = 0.0
    for smoothing in (0.0, 0.1):
        options = {"reduction": "none", "label_smoothing": smoothing}
        with kernels(isa):
            found = loss_and_gradients(mmkern.cross_entropy, x, target, weight, **options)
        exact = loss_and_gradients(F.cross_entropy, *double(x, target, weight), **options)
        compare(found, exact, loss_and_gradients(F.cross_entropy, x, target, weight, **options))
    soft = torch.softmax(testing.randn(*shape, seed=3), 1)
    soft.view(-1)[::2] = 0.0
    with kernels(isa), torch.no_grad():  # where its loss is NaN because 0 * inf is, torch's gradients are of no use
        found = mmkern.cross_entropy(x, soft, weight, reduction="none")
        exact, baseline = (F.cross_entropy(*t, reduction="none") for t in (double(x, soft, weight), (x, soft, weight)))
    testing.assert_accurate(found, exact, baseline)


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("shape", [(6, 40), (2, 40, 9)])
def test_ignored_rows_reach_nobody_and_their_mean_is_nan(isa, shape):
    x, target, _ = problem(shape, torch.float32)
    hidden = (target == -100).unsqueeze(1).expand(shape)
    x[hidden] = torch.nan
    clean = torch.where(hidden, 0.0, x)
    with kernels(isa):
        for reduction in REDUCTIONS:
            found = loss_and_gradients(mmkern.cross_entropy, x, target, None, reduction=reduction)
            expected = loss_and_gradients(mmkern.cross_entropy, clean, target, None, reduction=reduction)
            assert all(map(torch.equal, found, expected))
            assert not found[1][hidden].any()
        x.requires_grad_()
        rows = mmkern.cross_entropy(x, target, reduction="none")
        (grad,) = torch.autograd.grad(rows, x, torch.where(target == -100, torch.nan, 1.0))
        assert not grad[hidden].any()
        assert grad.isfinite().all()
        loss, grad = loss_and_gradients(mmkern.cross_entropy, x, torch.full_like(target, -100), None)
        assert loss.isnan()
        assert not grad.any()
        loss, grad = loss_and_gradients(mmkern.cross_entropy, clean, target, torch.zeros(40))
        assert loss.isnan()
        assert grad.isnan().any()  # 0 / 0, as torch's
        assert mmkern.cross_entropy(x[:0], target[:0]).isnan()


@pytest.mark.parametrize("isa", testing.isas())
def test_huge_values_and_shift_invariance(isa):
    x, target, _ = problem((6, 1000), torch.float32)
    with kernels(isa):
        options = {"label_smoothing": 0.1}
        inputs = x * 1e3, target, None
        exact = loss_and_gradients(F.cross_entropy, *double(*inputs), **options)
        baseline = loss_and_gradients(F.cross_entropy, *inputs, **options)
        compare(loss_and_gradients(mmkern.cross_entropy, *inputs, **options), exact, baseline)
        whole = (x * 8).round()
        found, shifted = (loss_and_gradients(mmkern.cross_entropy, t, target, None) for t in (whole, whole + 64.0))
        assert all(map(torch.equal, found, shifted))
        torch.testing.assert_close(found[1].sum(1), torch.zeros(6), atol=1e-6, rtol=0)  # no gain in shifting a row


def test_float16_gradients_of_a_mean_over_many_rows_survive_a_loss_scale():
    x, target, _ = problem((4096, 50), torch.float16)  # p / 4096 alone would be subnormal or zero

    def scaled(call, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(call(x, target).float() * 32768.0, x)[0]

    exact, baseline = scaled(F.cross_entropy, x.double()), scaled(F.cross_entropy, x)
    testing.assert_accurate(scaled(mmkern.cross_entropy, x), exact, baseline, "gradient")


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
