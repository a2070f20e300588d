"""Modules of positions and softmax: torch's parameters, dropout in training only, and what the ops compute."""

import pytest
import torch
import torch.nn.functional as F

import mmkern
from mmkern import nn
from mmkern.testing import randn

B, L, D = 2, 6, 8


def sinusoids(length: int, dim: int) -> torch.Tensor:
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


def expected_table(module: nn.PositionalEncoding, length: int) -> torch.Tensor:
    p = torch.arange(length)[:, None] / 10000
    return {
        "sinusoidal": lambda: sinusoids(length, D),
        "scalar": lambda: (p.sin() + p.cos()).expand(length, D),
        "learned": lambda: module.table[:length],
        "none": lambda: torch.zeros(length, D),
    }[module.encoding]()


@pytest.mark.parametrize("encoding", ["sinusoidal", "scalar", "learned", "none"])
def test_adds_scale_times_x_and_positions(encoding):
    module = nn.PositionalEncoding(D, encoding, max_length=20, scale=3.0, dropout=0.5).eval()
    x = randn(B, L, D)
    torch.testing.assert_close(module(x, 4), 3 * x + expected_table(module, 20)[4 : 4 + L])
    offsets = torch.tensor([0, 7])
    expected = torch.stack([3 * x[b] + expected_table(module, 20)[offsets[b] :][:L] for b in range(B)])
    torch.testing.assert_close(module(x, offsets), expected)


@pytest.mark.parametrize("encoding", ["sinusoidal", "learned"])
def test_embeds_tokens_as_torch_does(encoding):
    module = nn.TokenEmbedding(11, D, encoding, max_length=20, scale=2.0, padding_idx=0)
    theirs = torch.nn.Embedding(11, D, padding_idx=0)
    theirs.load_state_dict({"weight": module.weight.detach()})
    tokens = torch.tensor([[3, 0, 3, 10], [1, 2, 0, 0]])
    ours = module(tokens, 5)
    expected = 2 * theirs(tokens) + expected_table(module, 20)[5:9]
    torch.testing.assert_close(ours, expected)
    grad = randn(*ours.shape)
    (ours * grad).sum().backward()
    found = [p.grad for p in module.parameters()]  # the table, where there is one, and the weight
    module.zero_grad()
    (expected * grad).sum().backward()
    torch.testing.assert_close(found[-1], theirs.weight.grad)
    if module.table is not None:
        torch.testing.assert_close(found[0], module.table.grad)


def test_an_image_grid():
    x = randn(B, 3, 5, D)
    module = nn.PositionalEncoding(D, "sincos2d")
    torch.testing.assert_close(module(x), mmkern.add_positional_encoding(x, "sincos2d"))
    assert not torch.equal(module(x)[:, 0], x[:, 0])


def test_dropout_only_in_training():
    module = nn.SinusoidalPositionalEncoding(D, dropout=0.5)
    x = randn(B, L, D) + 10
    torch.manual_seed(0)
    dropped = module(x)
    zero = dropped == 0
    assert 0.2 < zero.float().mean() < 0.8
    whole = module.eval()(x)
    torch.testing.assert_close(whole, x + sinusoids(L, D))
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


def test_learned_positions_under_autocast_follow_the_activations():
    module = nn.PositionalEncoding(D, "learned", max_length=L)
    x = randn(B, L, D)
    out = module(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x + module.table, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("options", [{}, {"base": 100.0, "layout": "interleaved", "rotary_dim": 4}])
def test_rotary_leaves_scores_to_the_distance(options):
    module = nn.RotaryEmbedding(**options)
    q, k = randn(1, 1, 1, D).expand(1, 1, L, D), randn(1, 1, 1, D, seed=1).expand(1, 1, L, D)
    turned_q, turned_k = module(q, k)
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(-L + 1, L):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same))
    assert scores[0].std() > 0.1
    later_q, later_k = (module(t, positions=torch.arange(5, 5 + L)) for t in (q, k))
    torch.testing.assert_close((later_q @ later_k.mT)[0, 0], scores, rtol=1e-5, atol=1e-5)


def test_softmax_is_torchs_and_takes_a_mask():
    x, mask = randn(B, L, D), torch.rand(L, D) < 0.5
    mask[:, 0] = True
    for dim in (-1, 1):
        torch.testing.assert_close(nn.Softmax(dim)(x), torch.nn.Softmax(dim)(x))
    torch.testing.assert_close(nn.Softmax(-1)(x, mask), F.softmax(x.masked_fill(~mask, -torch.inf), -1))


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match=r"encoding: expected one of sinusoidal, .* got 'rotary'"):
        nn.PositionalEncoding(D, "rotary")
    with pytest.raises(ValueError, match="max_length: a learned table needs at least 1, got 0"):
        nn.PositionalEncoding(D, "learned")
    with pytest.raises(IndexError, match="exceeds max_length 4"):
        nn.PositionalEncoding(D, "learned", max_length=4)(randn(B, L, D))
