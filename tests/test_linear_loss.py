"""linear_cross_entropy against F.cross_entropy(F.linear(...)) in float64: values, gradients, memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, backends, hold
from torch.func import grad

import mmkern
from mmkern import testing
from mmkern.benchmarks.memory import peak_bytes

REDUCTIONS = ("none", "mean", "sum")
TARGET = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))
TARGET[0, ::3] = -100
CLASS_WEIGHT = testing.randn(50, seed=4).abs() + 0.1


def tensors(dtype, bias=True, layout="contiguous"):
    hidden = testing.randn(3, 20, 33, dtype=dtype, seed=1, layout=layout)
    weight = testing.randn(
        50, 33, dtype=dtype, seed=2, scale=0.3, layout="strided" if layout == "strided" else "contiguous"
    )
    return [hidden, weight] + [testing.randn(50, dtype=dtype, seed=3)] * bias


def ours(hidden, weight, bias=None, class_weight=None, target=TARGET, **options):
    return mmkern.linear_cross_entropy(hidden, weight, target, bias, class_weight=class_weight, **options)


def eager(hidden, weight, bias=None, class_weight=None, target=TARGET, chunk_size=None, **options):
    class_weight = class_weight if class_weight is None else class_weight.to(hidden.dtype)
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    loss = F.cross_entropy(logits, target.flatten(), class_weight, **options)
    return loss.view(target.shape) if loss.dim() else loss


def loss_and_gradients(call, inputs, dtype=None, **options):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    loss = call(*leaves, **options)
    grad_loss = testing.randn(*loss.shape, seed=7).to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, leaves, grad_loss)


def compare(found, exact, baseline):
    for i, (a, e, b) in enumerate(zip(found, exact, baseline, strict=True)):
        assert a.dtype == b.dtype
        testing.assert_accurate(a, e, b, "gradient" if i else "forward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_matches_float64(dtype, reduction, layout):
    for bias, weighted, smoothing in itertools.product((False, True), (False, True), (0.0, 0.1)):
        inputs = tensors(dtype, bias, layout)
        options = {
            "reduction": reduction,
            "label_smoothing": smoothing,
            "class_weight": CLASS_WEIGHT if weighted else None,
        }
        exact = loss_and_gradients(eager, inputs, torch.float64, **options)
        baseline = loss_and_gradients(eager, inputs, **options)
        for isa, chunk_size in itertools.product(testing.isas()[-2:], (None, 1, 7)):
            with mmkern.backend("cpu", strict=True, isa=isa), testing.poisoned():
                compare(loss_and_gradients(ours, inputs, chunk_size=chunk_size, **options), exact, baseline)
        wide = {**options, "class_weight": CLASS_WEIGHT.double() if weighted else None}
        for a, e in zip(loss_and_gradients(ours, inputs, torch.float64, **wide), exact, strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", backends("linear_cross_entropy"))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_backend(dtype, reduction, backend, once):
    """Chunks of 7 of 20 rows, some of them ignored."""
    inputs = [
        testing.randn(20, 16, dtype=dtype),
        testing.randn(50, 16, dtype=dtype, seed=1),
        testing.randn(50, dtype=dtype, seed=2),
    ]
    options = {"reduction": reduction, "label_smoothing": 0.1}
    grad = testing.randn(*(TARGET[0].shape if reduction == "none" else ()), dtype=dtype, seed=5)

    def call(*leaves):
        return ours(*leaves, target=backend.to(TARGET[0]), chunk_size=7, **options)

    hold(backend, once, call, lambda *leaves: eager(*leaves, target=TARGET[0], **options), inputs, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_chunks_lose_no_digits_of_the_weight_gradient(dtype):
    inputs = [testing.randn(2000, 16, dtype=dtype, seed=1), testing.randn(30, 16, dtype=dtype, seed=2)]
    target = torch.randint(0, 30, (2000,), generator=torch.Generator().manual_seed(1))
    exact, baseline = (loss_and_gradients(eager, inputs, to, target=target) for to in (torch.float64, None))
    compare(loss_and_gradients(ours, inputs, target=target, chunk_size=20), exact, baseline)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives(reduction):
    options = {"reduction": reduction, "label_smoothing": 0.1, "chunk_size": 7}

    def second(call, inputs, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        loss = call(*leaves, **options)
        first = torch.autograd.grad(loss, leaves, testing.randn(*loss.shape, seed=5).to(loss), create_graph=True)
        return torch.autograd.grad(sum((g * testing.randn(*g.shape, seed=6).to(g)).sum() for g in first), leaves)

    inputs = tensors(torch.float32)
    exact, baseline = second(eager, inputs, torch.float64), second(eager, inputs, torch.float32)
    for a, e, b in zip(second(ours, inputs, torch.float32), exact, baseline, strict=True):
        testing.assert_accurate(a, e, b, "gradient")
    small = [t.double().requires_grad_() for t in (testing.randn(4, 3), testing.randn(5, 3), testing.randn(5))]
    call = lambda *t: ours(*t, target=torch.tensor([0, 4, -100, 2]), **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, small)
    assert torch.autograd.gradgradcheck(call, small)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_retained_graphs_repeats_and_untouched_inputs(reduction):
    leaves = [t.requires_grad_() for t in tensors(torch.float32)]
    copies = [t.detach().clone() for t in leaves]
    loss = ours(*leaves, reduction=reduction)
    ones = torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, ones, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, ones * 2)
    assert all(torch.equal(a * 2, b) for a, b in zip(first, second, strict=True))
    for _ in range(20):
        again = torch.autograd.grad(ours(*leaves, reduction=reduction), leaves, ones)
        assert all(map(torch.equal, again, first))
    assert all(map(torch.equal, leaves, copies))


def test_ignored_rows_reach_nobody_and_their_mean_is_nan():
    hidden, weight, bias = tensors(torch.float32)
    hidden[TARGET == -100] = torch.nan
    clean = hidden.nan_to_num(0.0)
    for reduction in REDUCTIONS:
        found = loss_and_gradients(ours, [hidden, weight, bias], reduction=reduction)
        assert all(map(torch.equal, found, loss_and_gradients(ours, [clean, weight, bias], reduction=reduction)))
    for target in (torch.full_like(TARGET, -100), TARGET[:0]):
        loss, *grads = loss_and_gradients(ours, [hidden[: len(target)], weight, bias], target=target)
        assert loss.isnan()
        assert not any(g.any() for g in grads)


@pytest.mark.parametrize("only", [0, 1, 2])
def test_only_one_requires_grad(only):
    inputs = tensors(torch.float32)
    for reduction in ("mean", "none"):
        leaves = [t.clone().requires_grad_(i == only) for i, t in enumerate(inputs)]
        ours(*leaves, reduction=reduction).sum().backward()
        every = [t.clone().requires_grad_() for t in inputs]
        ours(*every, reduction=reduction).sum().backward()
        assert [t.grad is not None for t in leaves] == [i == only for i in range(3)]
        torch.testing.assert_close(leaves[only].grad, every[only].grad)


def test_compile_autocast_and_torch_func():
    inputs = tensors(torch.float32)
    for reduction in REDUCTIONS:
        call = lambda *t, r=reduction: ours(*t, reduction=r).sum()  # noqa: E731
        torch.compiler.reset()
        found = loss_and_gradients(torch.compile(call, fullgraph=True), inputs)
        for a, e in zip(found, loss_and_gradients(call, inputs), strict=True):
            torch.testing.assert_close(a, e)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (call(*inputs) for call in (ours, eager))
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    total = lambda call: lambda *t: call(*t, reduction="sum")  # noqa: E731
    torch.testing.assert_close(grad(total(ours), (0, 1, 2))(*inputs), grad(total(eager), (0, 1, 2))(*inputs))


def test_opcheck():
    hidden, weight, bias = tensors(torch.float32)
    args = hidden.flatten(0, 1), weight, TARGET.flatten(), bias, CLASS_WEIGHT, -100
    for reduction, wanted in ((1, 7), (0, 0), (2, 5)):
        torch.library.opcheck(torch.ops.mmkern.linear_cross_entropy_fwd.default, (*args, reduction, 0.1, 0, wanted))
    torch.library.opcheck(torch.ops.mmkern.linear_cross_entropy_bwd.default, (torch.rand(60), *args, 0.1, 7, 7))


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    def peak(call, tokens, classes, reduction="mean"):
        inputs = [t.requires_grad_() for t in (testing.randn(tokens, 8), testing.randn(classes, 8))]
        target = torch.arange(tokens)
        run = lambda: call(*inputs, target=target, reduction=reduction).sum().backward()  # noqa: E731
        run()
        return peak_bytes(run)

    for reduction in ("mean", "none"):
        small, large = (peak(ours, *shape, reduction) for shape in ((2000, 16000), (4000, 32000)))
        assert large < 100 << 20  # two chunks of 32 MiB, and 15 MiB that are linear in tokens or classes
        assert large - small < 16 << 20
    assert peak(eager, 2000, 16000) > 2 * 2000 * 16000 * 4


H, W, T, B = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1]), torch.zeros(4)
ERRORS = [
    (lambda: mmkern.linear_cross_entropy([1.0], W, T), TypeError, "hidden"),
    (lambda: mmkern.linear_cross_entropy(H.int(), W, T), TypeError, "hidden.*int32"),
    (lambda: mmkern.linear_cross_entropy(H, W.double(), T), TypeError, "weight.*float32.*float64"),
    (lambda: mmkern.linear_cross_entropy(H, W[:, :2], T), ValueError, r"weight.*\(V, 3\).*\(4, 2\)"),
    (lambda: mmkern.linear_cross_entropy(H, W, T, B[:3]), ValueError, r"bias.*\(4,\).*\(3,\)"),
    (lambda: mmkern.linear_cross_entropy(H, W, T, B.double()), TypeError, "bias.*float64"),
    (lambda: mmkern.linear_cross_entropy(H, W, T[:1]), ValueError, r"target.*\(2,\).*\(1,\)"),
    (lambda: mmkern.linear_cross_entropy(H, W, T.float()), TypeError, "target.*float32"),
    (lambda: mmkern.linear_cross_entropy(H, W, T + 3), IndexError, r"target.*\[0, 4\).*4"),
    (lambda: mmkern.linear_cross_entropy(H.double(), W.double(), T - 1), IndexError, "target.*-1"),
    (lambda: mmkern.linear_cross_entropy(H, W, T.to("meta")), ValueError, "target.*meta.*cpu"),
    (lambda: mmkern.linear_cross_entropy(H, W, T, class_weight=B[:2]), ValueError, r"class_weight.*\(4,\)"),
    (
        lambda: mmkern.linear_cross_entropy(H, W, T, class_weight=B.clone().requires_grad_()),
        ValueError,
        "class_weight.*grad",
    ),
    (lambda: mmkern.linear_cross_entropy(H, W, T, chunk_size=0), ValueError, "chunk_size.*0"),
    (lambda: mmkern.linear_cross_entropy(H, W, T, chunk_size=1.5), TypeError, "chunk_size.*1.5"),
    (lambda: mmkern.linear_cross_entropy(H, W, T, reduction="avg"), ValueError, "reduction.*avg"),
    (lambda: mmkern.linear_cross_entropy(H, W, T, label_smoothing=-1), ValueError, "label_smoothing.*-1"),
]


@pytest.mark.parametrize(("call", "error", "words"), ERRORS)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 2, 4), (4,)])
def test_empty_and_single(shape):
    target, leaves = torch.zeros(shape[:-1]).long(), [torch.randn(shape), torch.randn(5, shape[-1]), torch.randn(5)]
    for reduction in REDUCTIONS:
        found = loss_and_gradients(ours, leaves, target=target, reduction=reduction)
        with mmkern.backend("reference"):
            expected = loss_and_gradients(ours, leaves, target=target, reduction=reduction)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)
