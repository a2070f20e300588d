"""MultiheadAttention against torch's, against its features written out, and with keys that are kept."""

import math

import pytest
import torch
import torch.nn.functional as F

import mmkern
from mmkern.nn import KVCache, MultiheadAttention, attention_weights
from mmkern.testing import randn

B, L, S, E, H = 3, 5, 7, 16, 4
SIMILARITIES = ("dot", "cosine", "euclidean", "squared_euclidean")


def masks() -> dict[str, dict]:
    torch.manual_seed(1)
    some = torch.rand(L, S) < 0.4
    some[:, 0] = False  # torch gives NaN where a query sees nothing
    padding = torch.arange(S) >= torch.tensor([[S], [3], [1]])
    each = torch.rand(B * H, L, S) < 0.4
    each[..., 0] = False
    square = torch.ones(L, S, dtype=torch.bool).triu(1)
    added = torch.randn(L, S)
    added[0, 1] = -torch.inf
    return {
        "none": {},
        "bool": {"attn_mask": some},
        "float": {"attn_mask": added},
        "each head": {"attn_mask": each},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.zeros(B, S).masked_fill(padding, -torch.inf)},
        "bool and padding": {"attn_mask": some, "key_padding_mask": padding},
        "float and bool padding": {"attn_mask": added.clamp(min=-5), "key_padding_mask": padding},
        "causal": {"attn_mask": square, "is_causal": True},
    }


def pair(**options) -> tuple[torch.nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours, of one seed."""
    found = []
    for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        found.append(kind(E, H, **options))
    return found[0], found[1]


def assert_same(theirs, ours, inputs, **call) -> None:
    """One result and one gradient of inputs and parameters."""
    results = []
    for module in (theirs, ours):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out, weights = module(*leaves, **call)
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape)
        extra = 0 if weights is None else (weights * torch.linspace(0, 1, weights.numel()).view(weights.shape)).sum()
        ((out * grad).sum() + extra).backward()
        gradients = [t.grad for t in (*leaves, *dict(module.named_parameters()).values())]
        results.append([out, *([] if weights is None else [weights]), *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Support for mismatched")  # torch's, of two masks of two kinds
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("name", masks())
def test_equals_torch_with_every_kind_of_mask(name, average):
    theirs, ours = pair(batch_first=True)
    inputs = randn(B, L, E), randn(B, S, E, seed=1), randn(B, S, E, seed=2)
    assert_same(theirs, ours, inputs, average_attn_weights=average, **masks()[name])


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}, {"dtype": torch.float64}], ids=str)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_equals_torch_in_every_layout(options, batched, need_weights):
    theirs, ours = pair(**options)  # length first
    batch, dtype = (B,) if batched else (), options.get("dtype", torch.float32)
    inputs = [randn(*shape).to(dtype) for shape in ((L, *batch, E), (S, *batch, 6), (S, *batch, 10))]
    if "kdim" not in options:
        inputs[1:] = [randn(S, *batch, E, seed=i).to(dtype) for i in (1, 2)]
    assert_same(theirs, ours, inputs, need_weights=need_weights)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_parameters_are_torchs(options):
    theirs, ours = pair(**options)
    expected, actual = theirs.state_dict(), ours.state_dict()
    assert list(actual) == list(expected)
    for name, t in expected.items():
        assert torch.equal(actual[name], t), name
    torch.nn.init.normal_(theirs.out_proj.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.out_proj.weight, theirs.out_proj.weight)


def test_self_attention_by_one_projection_equals_three():
    ours = pair(batch_first=True)[1]
    x = randn(B, L, E)
    torch.testing.assert_close(ours(x, x, x)[0], ours(x, x.clone(), x.clone())[0])


CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "lower right": {"is_causal": True, "causal_alignment": "lower_right", "key_lengths": torch.tensor([7, 6, 2])},
    "lengths": {"key_lengths": torch.tensor([7, 3, 0])},
    "alibi": {"alibi_slopes": mmkern.alibi_slopes(H), "key_lengths": torch.tensor([7, 3, 1])},
    "temperature": {"temperature": torch.tensor([0.5, 1.0, 2.0, 4.0])},
    "bool mask": {"attn_mask": masks()["each head"]["attn_mask"].view(B, H, L, S)},
    "float mask": {"attn_mask": masks()["float"]["attn_mask"], "is_causal": True},
}


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("call", CALLS)
def test_maps_are_the_weights_that_attention_sums_with(similarity, call):
    """With the identity as value, attention's output is its weights."""
    q, k = randn(B, H, L, 8), randn(B, 2, S, 8, seed=1)
    options = {"scale": 0.7, "similarity": similarity, **CALLS[call]}
    mask = options.pop("attn_mask", None)
    identity = torch.eye(S).expand(B, 2, S, S)
    expected, lse = mmkern.scaled_dot_product_attention(
        q, k, identity, mask, enable_gqa=True, return_lse=True, **options
    )
    actual = attention_weights(q, k, lse, mask, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert (actual == 0).equal(expected == 0)


def test_a_nan_in_a_hidden_key_does_not_reach_the_maps():
    attention = MultiheadAttention(E, H, batch_first=True)
    x = randn(B, S, E)
    x[1, 3:] = torch.nan
    out, weights = attention(x[:, :3], x, x, key_lengths=torch.tensor([S, 3, 3]))
    assert out.isfinite().all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 3))


FEATURES = [
    {"similarity": "cosine"},
    {"similarity": "euclidean", "alibi": True},
    {"similarity": "squared_euclidean", "kv_heads": 2},
    {"rotary": True, "rotary_base": 100.0},
    {"rotary": True, "alibi": True, "kv_heads": 1, "bias": False},
]


def written_out(m: MultiheadAttention, x: torch.Tensor, lengths: torch.Tensor, temperature: float) -> torch.Tensor:
    """Causal self-attention with all that m has, a head and a query at a time."""
    d, rows = m.head_dim, []
    projected = x @ m.in_proj_weight.T + (0 if m.in_proj_bias is None else m.in_proj_bias)
    q, k, v = (t.unflatten(-1, (-1, d)) for t in projected.split([E, m.kv_heads * d, m.kv_heads * d], -1))
    slopes = mmkern.alibi_slopes(H)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            heads = []
            for h in range(H):
                g, scores = h // (H // m.kv_heads), []
                for j in range(min(i + 1, int(lengths[b]))):
                    one, other = q[b, i, h], k[b, j, g]
                    if m.rotary_base:
                        one, other = (
                            mmkern.rotary(t[None], positions=torch.tensor([p]), base=m.rotary_base)[0]
                            for t, p in ((one, i), (other, j))
                        )
                    score = {
                        "dot": one @ other / math.sqrt(d),
                        "cosine": temperature * F.cosine_similarity(one, other, dim=0),
                        "euclidean": -(one - other).square().sum().sqrt(),
                        "squared_euclidean": -(one - other).square().sum() / (2 * math.sqrt(d)),
                    }[m.similarity]
                    scores.append(score - (slopes[h] * (i - j) if m.alibi_slopes is not None else 0))
                weights = torch.stack(scores).softmax(0)
                heads.append(weights @ v[b, : len(scores), g])
            rows.append(m.out_proj(torch.cat(heads)))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("options", FEATURES, ids=str)
def test_features_written_out(options):
    torch.manual_seed(0)
    m = MultiheadAttention(E, H, batch_first=True, **options)
    x, lengths = randn(2, L, E), torch.tensor([L, 3])
    out, _ = m(x, x, x, is_causal=True, key_lengths=lengths, need_weights=False)
    torch.testing.assert_close(out, written_out(m, x, lengths, temperature=10.0), rtol=1e-5, atol=1e-5)


def test_the_learned_temperature_gets_a_gradient_and_stays_below_100():
    m = MultiheadAttention(E, H, batch_first=True, similarity="cosine")
    x = randn(2, L, E)
    m(x, x, x)[0].square().sum().backward()
    assert (m.log_temperature.grad != 0).all()
    with torch.no_grad():
        outs = []
        for temperature in (100.0, 1000.0):
            m.log_temperature.fill_(math.log(temperature))
            outs.append(m(x, x, x)[0])
    torch.testing.assert_close(outs[0], outs[1])


def test_lengths_mean_what_a_padding_mask_means():
    m = MultiheadAttention(E, H, batch_first=True)
    x, lengths = randn(B, S, E), torch.tensor([S, 3, 1])
    expected = m(x, x, x, key_padding_mask=torch.arange(S) >= lengths[:, None])
    for actual, other in zip(m(x, x, x, key_lengths=lengths), expected, strict=True):
        torch.testing.assert_close(actual, other)


def test_a_query_that_sees_nothing_gets_the_bias():
    m = MultiheadAttention(E, H, batch_first=True)
    torch.nn.init.normal_(m.out_proj.bias)
    x = randn(1, 2, E)
    out, weights = m(x, x, x, key_lengths=torch.tensor([0]))
    torch.testing.assert_close(out, m.out_proj.bias.expand(1, 2, -1))
    assert (weights == 0).all()


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"alibi": True, "kv_heads": 2}, {"similarity": "cosine"}])
def test_attending_step_by_step_equals_attending_at_once(options):
    torch.manual_seed(0)
    m = MultiheadAttention(E, H, batch_first=True, **options)
    x, cache = randn(B, 40, E), KVCache()
    with torch.inference_mode():
        expected, maps = m(x, x, x, is_causal=True)
        start = 0
        for step in (3, 1, 1, 20, 1, 14):  # a prompt, tokens, and more than the first capacity of 16
            part = x[:, start : start + step]
            out, weights = m(part, part, part, is_causal=True, cache=cache)
            torch.testing.assert_close(out, expected[:, start : start + step], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weights, maps[:, start : start + step, : start + step], rtol=1e-5, atol=1e-5)
            start += step
        assert cache.length == 40


def test_a_reordered_cache_goes_on_from_other_samples():
    m = MultiheadAttention(E, H, batch_first=True)
    x, cache, order = randn(B, 4, E), KVCache(), torch.tensor([2, 0, 0])
    with torch.inference_mode():
        m(x[:, :3], x[:, :3], x[:, :3], is_causal=True, cache=cache)
        cache.reorder(order)
        last = x[:, 3:]
        out, _ = m(last, last, last, is_causal=True, cache=cache)
        whole = torch.cat([x[order, :3], last], 1)
        torch.testing.assert_close(out, m(whole, whole, whole, is_causal=True)[0][:, 3:], rtol=1e-5, atol=1e-5)


def test_a_fixed_cache_keeps_the_keys_of_the_first_call():
    m = MultiheadAttention(E, H, batch_first=True)
    x, memory, cache = randn(B, 2, E), randn(B, S, E, seed=1), KVCache(fixed=True)
    with torch.inference_mode():
        expected, _ = m(x, memory, memory)
        for i in range(2):
            anything = memory if i == 0 else torch.full_like(memory, torch.nan)
            torch.testing.assert_close(m(x[:, i : i + 1], anything, anything, cache=cache)[0], expected[:, i : i + 1])


def test_dropout_only_in_training_and_by_torchs_seed():
    m = MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    x = randn(B, S, E)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(m(x, x, x, need_weights=False)[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    m.eval()
    plain = MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict(m.state_dict())
    torch.testing.assert_close(m(x, x, x)[0], plain(x, x, x)[0])


def test_autocast_computes_in_bfloat16():
    m = MultiheadAttention(E, H, batch_first=True, similarity="cosine", rotary=True)
    x = randn(B, S, E)
    expected = m(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = m(x, x, x)
    assert (out.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), expected[0], rtol=0.05, atol=0.02)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, S), rtol=1e-4, atol=0)


def test_compiles_to_one_graph():
    m = MultiheadAttention(E, H, batch_first=True, similarity="cosine", rotary=True, alibi=True, kv_heads=2)
    x = randn(B, S, E)
    call = {"key_lengths": torch.tensor([S, 3, 1]), "attn_mask": torch.rand(S, S) < 0.3, "is_causal": True}
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x, x, x, **call), m(x, x, x, **call), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 10, "num_heads": 4}, "embed_dim: expected a multiple of num_heads = 4, got 10"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"similarity": "angle"}, "similarity: expected one of dot, cosine, .* got 'angle'"),
        ({"embed_dim": 12, "rotary": True}, "rotary: needs an even embed_dim / num_heads, got 3"),
        ({"add_bias_kv": True}, "add_bias_kv"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MultiheadAttention(**{"embed_dim": E, "num_heads": H, **options})


def test_wrong_inputs_are_named():
    m = MultiheadAttention(E, H, batch_first=True)
    x = randn(B, S, E)
    for call, message in (
        ((x[0], x, x), r"key: expected 3 dims, or 2"),
        ((x[..., :8], x, x), r"query: expected 16 channels, got shape \(3, 7, 8\)"),
        ((x, x, x, torch.zeros(B, S + 1).bool()), r"key_padding_mask: expected \(3, 7\), got \(3, 8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            m(*call)
    with pytest.raises(ValueError, match=r"attn_mask: expected shape \(7, 7\) or \(12, 7, 7\), got \(7, 8\)"):
        m(x, x, x, attn_mask=torch.zeros(S, S + 1))


@pytest.mark.parametrize("options", [{}, {"similarity": "cosine"}], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_torchs_encoder_layers(batch_first, options):
    """In inference, too, where torch would compute its own attention from the weights."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, batch_first=batch_first, dropout=0.0).eval()
    ours = MultiheadAttention(E, H, batch_first=batch_first, **options)
    ours.load_state_dict(layer.self_attn.state_dict(), strict=not options)
    x, padding = randn(B, L, E), torch.arange(L) >= torch.tensor([[L], [3], [1]])
    x = x if batch_first else x.transpose(0, 1)
    expected = layer(x, src_key_padding_mask=padding)
    layer.self_attn = ours.eval()
    encoder = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    found = [encoder(x, src_key_padding_mask=padding)]
    with torch.no_grad():
        ran = mmkern.explain(lambda: found.append(encoder(x, src_key_padding_mask=padding)))
        causal = torch.nn.Transformer.generate_square_subsequent_mask(L)
        torch.testing.assert_close(encoder(x, mask=causal), encoder(x, mask=causal, is_causal=True))
    assert [choice.op for choice in ran] == ["attention_fwd"]
    torch.testing.assert_close(found[1], found[0])
    assert torch.allclose(found[0], expected, atol=1e-5) == (not options)


def test_alibi_slopes_survive_meta_construction_and_casts():
    built = MultiheadAttention(E, H, batch_first=True, alibi=True)
    x = randn(B, L, E)
    expected = built(x, x, x)[0]
    for how in ("to_empty", "assign"):
        with torch.device("meta"):
            made = MultiheadAttention(E, H, batch_first=True, alibi=True)
        if how == "to_empty":
            made.to_empty(device="cpu")
        made.load_state_dict(built.state_dict(), assign=how == "assign")
        torch.testing.assert_close(made(x, x, x)[0], expected)
    assert torch.equal(built.bfloat16().alibi_slopes, mmkern.alibi_slopes(H))
