import math

import pytest
import torch
from backends import DTYPES, backends, hold
from position_cases import ROTARY

import mmkern
from mmkern import reference, testing

LAYOUTS = ["half", "interleaved"]
op = torch.ops.mmkern


def exact(q, positions=None, base=1e4, layout="half", rotary_dim=None, grid=None):
    return reference.rotary(q.double(), positions, base, layout, rotary_dim or q.shape[-1], grid, False)


def eager(q, positions=None, base=1e4, layout="half", rotary_dim=None, grid=None):
    """How models do it: cosines and sines rounded to q's dtype, x * cos + rotate(x) * sin in that dtype."""
    if grid is not None:
        return None
    n = rotary_dim or q.shape[-1]
    p = torch.arange(q.shape[-2]) if positions is None else positions
    p = p.view(p.shape[0], *[1] * (q.dim() - 3), p.shape[1]) if p.dim() == 2 else p
    angle = p.double().unsqueeze(-1) * base ** (-torch.arange(0, n, 2).double() / n)
    angle = torch.cat([angle, angle], -1) if layout == "half" else angle.repeat_interleave(2, -1)
    x, rest = q[..., :n], q[..., n:]
    if layout == "half":
        turned = torch.cat([-x[..., n // 2 :], x[..., : n // 2]], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([x * angle.cos().to(q.dtype) + turned * angle.sin().to(q.dtype), rest], -1)


EACH = backends("rotary")


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("q_shape", "k_shape", "options"), ROTARY)
def test_values(q_shape, k_shape, options, dtype, layout, backend, once):
    """Both at once, with gradients; q alone gives the same."""

    def both(q, k):
        given = {n: x.to(q.device) if torch.is_tensor(x) else x for n, x in options.items()}
        out = mmkern.rotary(q, k, layout=layout, **given)
        assert q.dtype == torch.float64 or torch.equal(mmkern.rotary(q, layout=layout, **given), out[0])
        return torch.cat([t.flatten() for t in out])

    place = len(q_shape) + q_shape[-1]
    for memory in (testing.LAYOUTS[place % 5], "transposed"):
        q = testing.randn(*q_shape, dtype=dtype, layout=memory, seed=place)
        k = testing.randn(*k_shape, dtype=dtype, seed=place + 50)
        found = hold(backend, once, both, both, [q, k], testing.randn(q.numel() + k.numel(), dtype=dtype, seed=2))
        for x, turned in zip((q, k), found.split([q.numel(), k.numel()]), strict=True):
            want, base = (of(x, **options, layout=layout) for of in (exact, eager))
            testing.assert_accurate(turned.view(x.shape), want, base)
    if len(q_shape) <= 4:
        with backend:
            assert mmkern.rotary(backend.to(q), layout=layout).stride() == q.stride()


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype, layout, backend, once):
    """Both at once, and each alone beside one that needs no gradient."""

    def formula(q, k):
        angle = torch.arange(9).double()[:, None] * 100.0 ** (-torch.arange(0, 16, 2).double() / 16)
        cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

        def turn(x):
            a, b = x[..., :8], x[..., 8:16]
            return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 16:]], -1)

        return torch.cat([turn(q), turn(k)], 1)

    q, k = (
        testing.randn(2, 4, 9, 20, dtype=dtype, layout=layout),
        testing.randn(2, 2, 9, 20, dtype=dtype, layout=layout, seed=1),
    )
    grad = testing.randn(2, 6, 9, 20, dtype=dtype, seed=2, layout=layout)

    def ours(q, k):
        return torch.cat(mmkern.rotary(q, k, base=100.0, rotary_dim=16), 1)

    hold(backend, once, ours, formula, [q, k], grad)
    hold(backend, once, lambda q: ours(q, backend.to(k)), lambda x: formula(x, k.to(x)), [q], grad)
    hold(backend, once, lambda x: ours(backend.to(q), x), lambda x: formula(q.to(x), x), [k], grad)
    for layout_of_pairs in ("half", "interleaved"):  # turned back it is what it was
        with backend:
            leaf = backend.to(q.float()).requires_grad_()
            turned = mmkern.rotary(leaf, layout=layout_of_pairs, grid=(3, 3))
            (back,) = torch.autograd.grad(turned, leaf, turned)
        torch.testing.assert_close(back, leaf)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid", [None, (2000, 1000)])
def test_positions_of_each_batch_entry(layout, grid):
    q, k = testing.randn(3, 4, 11, 40), testing.randn(3, 2, 11, 40, seed=1, layout="transposed")
    positions = torch.randint(0, 2_000_000, (3, 11), generator=torch.Generator().manual_seed(0))
    for p in (positions, positions[0], positions.mT.contiguous().mT):
        for x, out in zip((q, k), mmkern.rotary(q, k, p, layout=layout, grid=grid), strict=True):
            testing.assert_accurate(out, exact(x, p, layout=layout, grid=grid))
    # A row's bits depend on its position alone.
    whole = mmkern.rotary(q, layout=layout)
    shift = torch.arange(4, 11)
    assert torch.equal(mmkern.rotary(q[:, :, 4:], None, shift, layout=layout), whole[:, :, 4:])
    assert torch.equal(mmkern.rotary(q[1:2], layout=layout), whole[1:2])


def test_scores_depend_on_distance_and_norms_stay():
    q = testing.randn(64, dtype=torch.float32).expand(9, 64)
    out = mmkern.rotary(q).double()
    assert torch.allclose(out.norm(dim=-1), q.double().norm(dim=-1), rtol=1e-6)
    scores = out @ out.mT
    for distance in range(9):
        assert scores.diagonal(distance).max() - scores.diagonal(distance).min() < 1e-4


def test_is_the_rotation_of_llama():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = testing.randn(1, 4, 10, 32), testing.randn(1, 2, 10, 32, seed=1)
    angle = torch.arange(10.0)[:, None] * 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    emb = torch.cat([angle, angle], -1)[None]
    theirs = llama.apply_rotary_pos_emb(q, k, emb.cos(), emb.sin())
    for out, their in zip(mmkern.rotary(q, k), theirs, strict=True):
        assert torch.allclose(out, their, atol=3e-6)


def test_nan_reaches_its_pair_alone():
    q = testing.randn(2, 3, 5, 16)
    q[1, 2, 3, 4], q[0, 0, 1, 0] = math.nan, math.inf
    testing.assert_accurate(mmkern.rotary(q), exact(q))
    assert mmkern.rotary(q).isnan().nonzero().tolist() == [[1, 2, 3, 4], [1, 2, 3, 12]]


def test_same_bits_for_any_thread_count_and_streamed_outputs():
    q, k = testing.randn(2, 16, 1030, 64), testing.randn(2, 4, 1030, 64, seed=1)  # 10 MB: streamed
    before, kept = torch.get_num_threads(), q.clone()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(mmkern.rotary(q, k))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results for a, b in zip(r, results[0], strict=True))
    assert torch.equal(q, kept)
    testing.assert_accurate(results[0][0], exact(q))


def test_gradient_is_the_rotation_backwards():
    q, k = testing.randn(1, 2, 6, 8).requires_grad_(), testing.randn(1, 1, 6, 8, seed=1).requires_grad_()
    up = testing.randn(1, 2, 6, 8, seed=2)
    mmkern.rotary(q, k)[0].backward(up)
    testing.assert_accurate(q.grad, exact(up, -torch.arange(6)), kind="gradient")
    assert k.grad is None, "nothing came back for it"


def test_explain_and_opcheck_and_compile():
    q, k = testing.randn(2, 4, 5, 8, layout="transposed"), testing.randn(2, 2, 5, 8)
    said = mmkern.explain(mmkern.rotary, q.double())[0]
    assert said.backend == "reference"
    assert "float64" in said.refused["cpu"]
    torch.library.opcheck(op.rotary_fwd.default, (q.mT, None, 1e4, "half", 4, [1, 8], False))
    torch.library.opcheck(op.rotary_fwd.default, (torch.arange(40.0).unfold(0, 8, 1), None, 1e4, "half", 8, None, True))
    torch.library.opcheck(op.rotary_qk_fwd.default, (q, k, torch.arange(5), 1e4, "interleaved", 8, None, False))
    compiled = torch.compile(mmkern.rotary, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(q, k), mmkern.rotary(q, k), strict=True))
    q.requires_grad_()
    compiled(q, k)[0].square().sum().backward()
    assert torch.allclose(q.grad, 2 * q, atol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12, 20, 64])
def test_alibi_slopes(n):
    def published(n):  # the paper's code
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return published(below) + published(2 * below)[0::2][: n - below]

    assert torch.allclose(mmkern.alibi_slopes(n, dtype=torch.float64), torch.tensor(published(n)).double(), rtol=1e-6)
    assert mmkern.alibi_slopes(n).dtype == torch.float32


Q, P = torch.zeros(2, 4, 6, 8), torch.arange(6)
ERRORS = [
    (lambda: mmkern.rotary(Q.int()), TypeError, "q: .*int32"),
    (lambda: mmkern.rotary(Q[0, 0, 0]), ValueError, r"q: .*\(8,\)"),
    (lambda: mmkern.rotary(Q, Q.half()), TypeError, "k: .*float32.*float16"),
    (lambda: mmkern.rotary(Q, Q[:, :, :5]), ValueError, r"k: .*\(2, 4, 5, 8\).*\(2, 4, 6, 8\)"),
    (lambda: mmkern.rotary(Q, Q[:1]), ValueError, r"k: .*\(1, 4, 6, 8\).*\(2, 4, 6, 8\)"),
    (lambda: mmkern.rotary(Q, None, P.short()), TypeError, "positions: .*int16"),
    (lambda: mmkern.rotary(Q, None, P[:5]), ValueError, r"positions: .*\(5,\).*\(2, 4, 6, 8\)"),
    (lambda: mmkern.rotary(Q, None, P.expand(3, 6)), ValueError, r"positions: .*\(3, 6\)"),
    (lambda: mmkern.rotary(Q[0], Q[0, :2], P.expand(4, 6)), ValueError, r"k: .*\(2, 6, 8\).*\(4, 6, 8\)"),
    (lambda: mmkern.rotary(Q, layout="neox"), ValueError, "layout: .*'neox'"),
    (lambda: mmkern.rotary(Q, base=0.0), ValueError, "base: .*0.0"),
    (lambda: mmkern.rotary(Q, rotary_dim=3), ValueError, "rotary_dim: .*3"),
    (lambda: mmkern.rotary(Q, rotary_dim=10), ValueError, "rotary_dim: .*10"),
    (lambda: mmkern.rotary(Q, grid=(2, 3), rotary_dim=6), ValueError, "rotary_dim: .*4.*6"),
    (lambda: mmkern.rotary(Q, grid=(2, 4)), ValueError, r"grid: .*6.*\(2, 4\)"),
    (lambda: mmkern.alibi_slopes(0), ValueError, "num_heads: .*0"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
