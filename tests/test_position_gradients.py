"""Gradients and dropout of the positional encodings: every kernel against float64 formulas of torch's own ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import mmkern
from mmkern.reference.philox import keep_mask
from mmkern.testing import LAYOUTS, assert_accurate, isas, poisoned, randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def factors(shape: tuple[int, ...], dropout_p: float) -> Tensor | float:
    """What dropout multiplies by after manual_seed(7)."""
    if not dropout_p:
        return 1.0
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(seed, dropout_p, (1,) * max(0, 3 - len(shape)) + shape, torch.device("cpu")).view(shape)
    return keep.double() / (1 - dropout_p) if dropout_p < 1 else keep.double()


def check(ours, formula, inputs: list[Tensor], grad: Tensor) -> None:
    """Gradients of ours by every instruction set, against the formula in float64 and in the inputs' dtype."""

    def gradients(call, leaves: list[Tensor], up: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        torch.manual_seed(7)
        return torch.autograd.grad(call(*leaves), leaves, up)

    exact = gradients(formula, [t.double() for t in inputs], grad.double())
    baseline = gradients(lambda *a: formula(*a).to(grad.dtype), inputs, grad)
    for isa in isas():
        with mmkern.backend("cpu", isa=isa, strict=True), poisoned():
            found = gradients(ours, inputs, grad)
        for mine, wanted, base in zip(found, exact, baseline, strict=True):
            assert_accurate(mine, wanted, base, "gradient")


ADD = {
    "one row": ((1, 4), 1, 0),
    "two dims": ((5, 7), 9, 2),
    "batch": ((3, 20, 33), 20, 0),
    "heads": ((2, 3, 17, 64), 30, 13),
    "five dims": ((2, 1, 3, 5, 16), 5, 0),
    "a start each": ((3, 2, 11, 40), 50, torch.tensor([0, 39, 7])),
    "no rows": ((2, 0, 8), 3, 0),
    "no batch": ((0, 5, 8), 6, 1),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ADD)
def test_add_positional_encoding(name: str, dtype: torch.dtype, dropout_p: float) -> None:
    """x gets the scale, the table the sum over what stands at each position, both as dropped."""
    shape, max_length, offset = ADD[name]
    keep = factors(shape, dropout_p)
    at = torch.arange(shape[-2]) + (offset.view(-1, *[1] * (len(shape) - 2)) if torch.is_tensor(offset) else offset)

    def formula(x: Tensor, table: Tensor) -> Tensor:
        return (x * 1.7 + F.embedding(at, table)) * keep

    for layout in LAYOUTS if name == "heads" else ("contiguous",):
        inputs = [randn(*shape, dtype=dtype, layout=layout), randn(max_length, shape[-1], dtype=dtype, seed=1)]
        check(
            lambda x, t: mmkern.add_positional_encoding(x, t, offset=offset, scale=1.7, dropout_p=dropout_p),
            formula,
            inputs,
            randn(*shape, dtype=dtype, seed=2, layout=layout),
        )


@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar", "sincos2d"])
def test_computed_encodings(encoding: str) -> None:
    shape = (2, 3, 6, 20)
    keep = factors(shape, 0.3)
    check(
        lambda x: mmkern.add_positional_encoding(x, encoding, scale=3.0, dropout_p=0.3),
        lambda x: x * 3.0 * keep,
        [randn(*shape)],
        randn(*shape, seed=2),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4,), (2, 65), (2, 3, 40), (3, 0), (700,)], ids=str)
def test_embed_tokens(shape: tuple[int, ...], dtype: torch.dtype, ids: torch.dtype, dropout_p: float) -> None:
    """Rows of weight get the scaled sum over their tokens, the padding row and unused rows 0."""
    tokens = torch.randint(50, shape, generator=torch.Generator().manual_seed(1)).to(ids)
    keep = factors((*shape, 24), dropout_p)

    def formula(weight: Tensor, table: Tensor) -> Tensor:
        return (F.embedding(tokens, weight, padding_idx=3) * 4.0 + table[2 : 2 + shape[-1]]) * keep

    check(
        lambda w, t: mmkern.embed_tokens(tokens, w, t, offset=2, scale=4.0, dropout_p=dropout_p, padding_idx=3),
        formula,
        [randn(60, 24, dtype=dtype), randn(702, 24, dtype=dtype, seed=1)],
        randn(*shape, 24, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary(dtype: torch.dtype, layout: str) -> None:
    """Both at once, and each alone beside one that needs no gradient."""

    def formula(q: Tensor, k: Tensor) -> Tensor:
        angle = torch.arange(9).double()[:, None] * 100.0 ** (-torch.arange(0, 16, 2).double() / 16)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def turn(x: Tensor) -> Tensor:
            a, b = x[..., :8], x[..., 8:16]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 16:]], -1)

        return torch.cat([turn(q), turn(k)], 1)

    q, k = randn(2, 4, 9, 20, dtype=dtype, layout=layout), randn(2, 2, 9, 20, dtype=dtype, layout=layout, seed=1)
    grad = randn(2, 6, 9, 20, dtype=dtype, seed=2, layout=layout)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(mmkern.rotary(q, k, base=100.0, rotary_dim=16), 1)

    check(ours, formula, [q, k], grad)
    check(lambda q: ours(q, k), lambda x: formula(x, k.to(x)), [q], grad)
    check(lambda x: ours(q, x), lambda x: formula(q.to(x), x), [k], grad)
    for layout_of_pairs in ("half", "interleaved"):  # turned back it is what it was
        turned = mmkern.rotary(q.float().requires_grad_(), layout=layout_of_pairs, grid=(3, 3))
        (back,) = torch.autograd.grad(turned, turned.grad_fn.next_functions[0][0].variable, turned)
        torch.testing.assert_close(back, q.float())


CALLS = {
    "add": lambda x, w, t: mmkern.add_positional_encoding(x, t, offset=3, scale=0.5, dropout_p=0.2),
    "embed": lambda x, w, t: mmkern.embed_tokens(TOKENS, w, t, scale=2.0, dropout_p=0.2),
    "rotary": lambda x, w, t: mmkern.rotary(x),
}
TOKENS = torch.randint(40, (8, 300), generator=torch.Generator().manual_seed(1))


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = (8, 300, 96), (40, 96), (310, 96)
    return [randn(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("name", CALLS)
def test_deterministic(name: str) -> None:
    """The same bits over 20 repeats and 1, 2 and 4 threads; the gradient that came in stays as it was."""
    given, grad, threads = inputs(), randn(8, 300, 96, seed=5), torch.get_num_threads()
    kept, found = grad.clone(), []
    try:
        for i in range(20):
            torch.set_num_threads((1, 2, 4)[i % 3])
            torch.manual_seed(2)
            out = CALLS[name](*given)
            found.append([out, *torch.autograd.grad(out, given, grad, allow_unused=True)])
            for a, b in zip(found[-1], found[0], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("name", ["add", "embed"])
def test_checkpoint_drops_the_same_again(name: str) -> None:
    given, found = inputs(), []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(3)
        out = wrap(CALLS[name], *given)
        found.append([out, *torch.autograd.grad(out.square().sum(), given, allow_unused=True)])
    assert all(a is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropped_elements(dropout_p: float) -> None:
    keep = factors((8, 300, 96), dropout_p)
    for isa in isas():
        with mmkern.backend("cpu", isa=isa, strict=True):
            torch.manual_seed(7)
            found = mmkern.add_positional_encoding(torch.ones(8, 300, 96), torch.zeros(300, 96), dropout_p=dropout_p)
            torch.testing.assert_close(found.double(), keep, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CALLS)
def test_saves_no_activation(name: str) -> None:
    given, saved = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        CALLS[name](*given)
    known = {t.data_ptr() for t in (TOKENS, given[1], given[2])}
    assert sum(t.numel() for t in saved if t.data_ptr() not in known) <= 1  # the seed of dropout


def test_opcheck_and_what_ran() -> None:
    op, grad, seed = torch.ops.mmkern, randn(2, 3, 5, 8, layout="transposed"), torch.tensor([3])
    torch.library.opcheck(op.position_table_bwd.default, (grad, 9, 1, None, 0.0, None))
    torch.library.opcheck(op.position_table_bwd.default, (grad.mT, 20, 0, torch.tensor([1, 2]), 0.5, seed))
    tokens = torch.randint(7, (2, 3, 5))
    torch.library.opcheck(op.embed_tokens_bwd.default, (grad, tokens, 9, 2.0, 0.5, 1, seed))
    for name, ops in {
        "add": ["add_positional_encoding_fwd", "add_positional_encoding_fwd", "position_table_bwd"],
        "embed": ["embed_tokens_fwd", "embed_tokens_bwd", "position_table_bwd"],
        "rotary": ["rotary_fwd", "rotary_fwd"],
    }.items():
        ran = mmkern.explain(lambda name=name: CALLS[name](*inputs()).sum().backward())
        assert [(choice.op, choice.backend) for choice in ran] == [(op_name, "cpu") for op_name in ops]


def test_compiles_whole() -> None:
    x, weight, table = inputs()

    def embed(w: Tensor, t: Tensor) -> Tensor:
        return mmkern.rotary(mmkern.embed_tokens(TOKENS, w, t, scale=2.0)).tanh()

    compiled = torch.compile(embed, fullgraph=True)
    found = torch.autograd.grad(compiled(weight, table), (weight, table), x.detach())
    want = torch.autograd.grad(embed(weight, table), (weight, table), x.detach())
    for actual, expected in zip(found, want, strict=True):
        torch.testing.assert_close(actual, expected)
