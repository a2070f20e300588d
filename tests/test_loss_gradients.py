"""cross_entropy under autograd: retained graphs, second derivatives, transforms, compilation, autocast, memory."""

import pytest
import torch
import torch.nn.functional as F
from backends import DTYPES, backends
from torch.func import grad, jvp, vmap

import mmkern
from mmkern import testing

X = testing.randn(6, 9)
INDEX = torch.tensor([0, 3, -100, 8, 2, -100])
SOFT = torch.softmax(testing.randn(6, 9, seed=3), 1)
WEIGHT = testing.randn(9, seed=4).abs() + 0.1
CALLS = {
    "mean": (INDEX, {}),
    "sum": (INDEX, {"reduction": "sum", "label_smoothing": 0.2}),
    "none": (INDEX, {"reduction": "none"}),
    "weight": (INDEX, {"weight": WEIGHT, "label_smoothing": 0.2}),
    "soft": (SOFT, {"weight": WEIGHT}),
    "soft-none": (SOFT, {"reduction": "none", "label_smoothing": 0.2}),
}


def leaf(x=X):
    return x.detach().clone().requires_grad_()


def in_double(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    target, options = CALLS[name]
    x, options = leaf(X.double()), in_double(options)
    if target.is_floating_point():
        inputs = (x, leaf(target.double()))
        call = lambda x, t: mmkern.cross_entropy(x, t, **options)  # noqa: E731
    else:
        inputs = (x,)
        call = lambda x: mmkern.cross_entropy(x, target, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("backend", backends("cross_entropy"))
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_of_the_kernel(name, backend):
    target, options = CALLS[name]

    def second(call, x, target, options):
        x = leaf(x)
        leaves = [x, leaf(target)] if target.is_floating_point() else [x]
        loss = call(x, leaves[-1] if len(leaves) > 1 else target, **options)
        first = torch.autograd.grad(loss, leaves, testing.randn(*loss.shape, seed=5).to(loss), create_graph=True)
        wanted = sum((g * testing.randn(*g.shape, seed=6).to(g)).sum() for g in first)
        return torch.autograd.grad(wanted, leaves, retain_graph=True)

    exact = second(
        F.cross_entropy, X.double(), target if target.dtype == torch.int64 else target.double(), in_double(options)
    )
    with backend:
        moved = {n: backend.to(option) for n, option in options.items()}
        found = [t.cpu() for t in second(mmkern.cross_entropy, backend.to(X), backend.to(target), moved)]
    for a, e, b in zip(found, exact, second(F.cross_entropy, X, target, options), strict=True):
        testing.assert_accurate(a, e, b, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_retained_graphs_and_two_losses_on_the_same_logits(dtype, name):
    target, options = CALLS[name]
    logits = leaf(X.to(dtype))
    x = logits * 1.0
    before = x.detach().clone()
    loss = mmkern.cross_entropy(x, target, **options)
    other = mmkern.cross_entropy(x, target, ignore_index=-100, label_smoothing=0.5)
    ones = torch.ones_like(loss)
    first, second = (torch.autograd.grad(loss, x, ones * by, retain_graph=True)[0] for by in (1.0, 2.0))
    first.mul_(3.0)  # what was handed out is the caller's: the graph keeps its own
    third, fourth = (
        torch.autograd.grad(loss, x, ones * by, retain_graph=keep)[0] for by, keep in ((1.0, True), (2.0, False))
    )
    assert torch.equal(second, fourth)
    assert torch.equal(third * 2.0, fourth)
    (alone,) = torch.autograd.grad(mmkern.cross_entropy(x, target, label_smoothing=0.5), x)
    assert torch.equal(torch.autograd.grad(other, x)[0], alone)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(other, x)


@pytest.mark.parametrize("backend", backends("cross_entropy"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "columns", "turned"])
def test_any_gradient_of_the_loss(dtype, layout, backend):
    x = {"rows": testing.randn(24, 9), "columns": testing.randn(2, 9, 12), "turned": testing.randn(9, 24).t()}[layout]
    x = x.to(dtype)
    target = torch.randint(0, 9, (x.shape[0], *x.shape[2:]), generator=torch.Generator().manual_seed(0))
    target.view(-1)[::5] = -100
    shape = target.shape
    grads = [
        testing.randn(*shape),
        testing.randn(*shape[::-1]).movedim(0, -1) if len(shape) > 1 else testing.randn(48)[::2],
    ]
    grads += [torch.tensor(0.5).expand(shape)]
    for grad_loss in grads:
        g = backend.to(grad_loss.to(dtype))
        copy = g.clone()
        with backend:
            leaves = leaf(backend.to(x))
            loss = mmkern.cross_entropy(leaves, backend.to(target), reduction="none")
            kept = torch.autograd.grad(loss, leaves, g, retain_graph=True)[0]
            found = torch.autograd.grad(loss, leaves, g)[0]
        assert torch.equal(kept, found)
        assert torch.equal(g, copy)
        exact, baseline = (leaf(x.double()), leaf(x))
        for t in (exact, baseline):
            F.cross_entropy(t, target, reduction="none").backward(g.to(t))
        testing.assert_accurate(found.cpu(), exact.grad, baseline.grad, "gradient")
    with backend:
        leaves = leaf(backend.to(x))
        mmkern.cross_entropy(leaves, backend.to(target), reduction="none").sum().backward()
        expected = leaf(backend.to(x))
        mmkern.cross_entropy(expected, backend.to(target), reduction="sum").backward()
    assert torch.equal(leaves.grad, expected.grad)


@pytest.mark.parametrize("only", ["input", "target", "weight", "all"])
def test_only_what_is_wanted(only):
    leaves = {"input": X.clone(), "target": SOFT.clone(), "weight": WEIGHT.clone()}

    def gradients(call, dtype):
        given = {name: t.to(dtype, copy=True).requires_grad_(only in (name, "all")) for name, t in leaves.items()}
        call(**given, label_smoothing=0.1).backward()
        return [t.grad for t in given.values()]

    exact, baseline = gradients(F.cross_entropy, torch.float64), gradients(F.cross_entropy, torch.float32)
    for a, e, b in zip(gradients(mmkern.cross_entropy, torch.float32), exact, baseline, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            testing.assert_accurate(a, e, b, "gradient")


def test_accumulation_into_leaves_does_not_share_memory_with_what_is_kept():
    x = leaf()
    loss = mmkern.cross_entropy(x, INDEX)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, once * 2)
    two = mmkern.cross_entropy(x, INDEX) + mmkern.cross_entropy(x, INDEX)
    torch.testing.assert_close(torch.autograd.grad(two, x)[0], once * 2)


@pytest.mark.parametrize("name", CALLS)
def test_torch_func(name):
    target, options = CALLS[name]
    total = lambda call: lambda x: call(x, target, **options).sum()  # noqa: E731
    torch.testing.assert_close(grad(total(mmkern.cross_entropy))(X), grad(total(F.cross_entropy))(X))
    many, tangent = testing.randn(3, 6, 9, seed=7), testing.randn(6, 9, seed=8)
    ours, theirs = (
        vmap(lambda x, call=call: call(x, target, **options))(many) for call in (mmkern.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (vmap(grad(total(call)))(many) for call in (mmkern.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (jvp(total(call), (X,), (tangent,)) for call in (mmkern.cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["mean", "none", "weight", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile(name, dtype):
    target, options = CALLS[name]
    target = target.to(dtype) if target.is_floating_point() else target
    torch.compiler.reset()
    call = lambda x: mmkern.cross_entropy(x * 1.0, target, **options)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True)
    x = X.to(dtype)
    torch.testing.assert_close(compiled(x), call(x))
    grads = []
    for f in (compiled, call):
        leaves = leaf(x)
        (f(leaves).float() * 2.0).sum().backward()
        grads.append(leaves.grad)
    torch.testing.assert_close(*grads)


def test_autocast_gives_float32_as_torch_does():
    for dtype in (torch.float32, torch.bfloat16):
        x = leaf(X.to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for target, options in CALLS.values():
                ours, theirs = (call(x, target, **options) for call in (mmkern.cross_entropy, F.cross_entropy))
                assert ours.dtype == theirs.dtype == torch.float32
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                found = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
                assert found[0].dtype == found[1].dtype == dtype
                torch.testing.assert_close(*found, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_opcheck():
    for target in (INDEX, SOFT):
        args = target, WEIGHT, -100, 1, 0.1, False
        for x in (X, X.t().contiguous().t(), X.half()):
            torch.library.opcheck(torch.ops.mmkern.cross_entropy_fwd.default, (x, *args, 1))
    image = testing.randn(2, 9, 3, 4)
    places = torch.zeros(2, 3, 4, dtype=torch.int64)
    for x in (
        image,
        image.to(memory_format=torch.channels_last),
        image[..., ::2].repeat_interleave(2, -1),
        image[:, :, :, 1:],
    ):
        t = places[..., : x.shape[-1]]
        torch.library.opcheck(torch.ops.mmkern.cross_entropy_fwd.default, (x, t, None, -100, 0, 0.0, True, 1))
        torch.library.opcheck(torch.ops.mmkern.cross_entropy_bwd.default, (x, t.float(), None))
    for grad_loss in (torch.ones(6), torch.tensor(2.0)):
        torch.library.opcheck(torch.ops.mmkern.cross_entropy_bwd_.default, (X.clone(), grad_loss, None))


def test_saves_logits_and_their_gradient_and_nothing_else_large():
    x = leaf(testing.randn(64, 1000))
    kept = {}
    hooks = lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t.numel() * t.element_size()) and t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(hooks, lambda t: t):
        mmkern.cross_entropy(x, torch.arange(64))
    assert sum(kept.values()) == 2 * 64 * 1000 * 4 + 64 * 8


def test_checkpointing_gives_the_same_gradient():
    x, y = leaf(), leaf()
    mmkern.cross_entropy(x * 2.0, INDEX).backward()
    torch.utils.checkpoint.checkpoint(lambda t: mmkern.cross_entropy(t * 2.0, INDEX), y, use_reentrant=False).backward()
    assert torch.equal(x.grad, y.grad)


def test_gradients_run_on_the_kernels():
    def train(x):
        (mmkern.cross_entropy(x, INDEX) * 2.0).backward()

    ran = mmkern.explain(train, leaf())
    assert [(choice.op, choice.backend) for choice in ran] == [
        ("cross_entropy_fwd", "cpu"),
        ("cross_entropy_bwd_", "cpu"),
    ]
