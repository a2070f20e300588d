"""mmkern inside torch modules and Transformers models gives what their own attention gives."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import mmkern
import mmkern.testing
from mmkern.benchmarks import model as minilm
from mmkern.integrations import torch as integration

transformers = pytest.importorskip("transformers")
from mmkern.integrations.transformers import register  # noqa: E402

needs_weights = pytest.mark.skipif(bool(minilm.missing()), reason=f"MiniLM: {minilm.missing()}")
OPS = ("scaled_dot_product_attention", "softmax", "log_softmax")


@pytest.fixture(autouse=True)
def _registered():
    register()


load = functools.cache(minilm.load)


def ops_of(function, *args, **kwargs) -> list[str]:
    with torch.no_grad():
        return [choice.op for choice in mmkern.explain(function, *args, **kwargs)]


# ---- Transformers


@needs_weights
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_minilm_embeds_as_with_sdpa(side):
    (batch,) = minilm.batches([*minilm.sentences(12), minilm.passages(1)[0][:900]], 13)
    if side == "left":
        batch = {name: t.flip(1) for name, t in batch.items()}
    elif side == "none":
        shortest = batch["attention_mask"].sum(1).min()
        batch = {name: t[:, :shortest] for name, t in batch.items()}
    ours, theirs = load("mmkern"), load("sdpa")
    a, b = minilm.embed(ours, batch), minilm.embed(theirs, batch)
    assert torch.allclose(a, b, rtol=0, atol=2e-6), (a - b).abs().max()
    assert ops_of(ours, **batch) == ["attention_fwd"] * 6
    assert ops_of(theirs, **batch) == []


@needs_weights
def test_right_padding_arrives_as_lengths_and_left_padding_as_a_mask(monkeypatch):
    seen = []
    real = mmkern.scaled_dot_product_attention
    monkeypatch.setattr(
        mmkern,
        "scaled_dot_product_attention",
        lambda *a, **k: seen.append((k["key_lengths"], k["attn_mask"])) or real(*a, **k),
    )
    (batch,) = minilm.batches(minilm.sentences(4), 4)
    encoder = load("mmkern")
    minilm.embed(encoder, batch)
    assert torch.equal(seen[0][0], batch["attention_mask"].sum(1))
    assert seen[0][1] is None
    minilm.embed(encoder, {name: t.flip(1) for name, t in batch.items()})
    assert seen[-1][0] is None
    assert seen[-1][1].dtype == torch.bool


def tiny(kind: str, attention: str, **changes):
    """A small random decoder; the same weights for every `attention`."""
    common = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "attn_implementation": attention,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **(common | changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


DECODERS = {
    "llama": ("llama", {}, "sdpa"),  # grouped heads, causal
    "mistral": ("mistral", {"sliding_window": 7}, "sdpa"),
    "gemma2": ("gemma2", {"sliding_window": 7, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 20}, "eager"),
    "gpt_oss": (
        "gpt_oss", {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1}, "eager",
    ),  # attention sinks
}  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_agree_with_their_own_attention(name, padding):
    kind, changes, own = DECODERS[name]
    ours, theirs = tiny(kind, "mmkern", **changes), tiny(kind, own, **changes)
    if name == "gpt_oss":
        for one in (ours, theirs):
            for layer in one.model.layers:
                torch.nn.init.normal_(layer.self_attn.sinks, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(3, 64, (3, 21), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    if padding == "right":
        mask[0, 13:], mask[1, 18:] = 0, 0
    elif padding == "left":
        mask[0, :8], mask[1, :3] = 0, 0
    with torch.no_grad():
        a, b = (m(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (ours, theirs))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (a - b).abs().max()
    assert ops_of(ours, tokens, attention_mask=mask, use_cache=False) == ["attention_fwd"] * 2


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_with_a_cache_gives_the_same_tokens(name):
    kind, changes, own = DECODERS[name]
    tokens = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    found = []
    for attention in ("mmkern", own):
        made = tiny(kind, attention, **changes).generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append((made.sequences, torch.stack(made.logits)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_t5_position_bias(padded):
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4}
    encoders = []
    for attention in ("mmkern", "sdpa"):
        torch.manual_seed(0)
        config = transformers.T5Config(**sizes, attn_implementation=attention)
        encoders.append(transformers.T5EncoderModel._from_config(config).eval())
    tokens = torch.randint(1, 64, (2, 17), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, 11:] = 0
    with torch.no_grad():
        a, b = (e(tokens, attention_mask=mask).last_hidden_state[mask.bool()] for e in encoders)
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), (a - b).abs().max()
    assert ops_of(encoders[0], tokens, attention_mask=mask) == ["attention_fwd"] * 2


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"output_attentions.*eager"):
        tiny("llama", "mmkern")(torch.ones(1, 3, dtype=torch.long), output_attentions=True)


# ---- torch


def attend(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(F.scaled_dot_product_attention(x, x, x, is_causal=True), dim=-1)


def test_patched_is_explicit_nested_and_undone():
    before = {name: getattr(F, name) for name in OPS}
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = attend(x)
    assert ops_of(attend, x) == []
    with integration.patched():
        with integration.patched():
            assert F.scaled_dot_product_attention is mmkern.scaled_dot_product_attention
        assert ops_of(attend, x) == ["attention_fwd", "softmax_fwd"]
        assert torch.allclose(attend(x), expected, atol=1e-6)
        assert F.softmax(x, -1, dtype=torch.float64).dtype == torch.float64
        with pytest.warns(UserWarning, match="Implicit dimension"):
            F.softmax(x)
    assert {name: getattr(F, name) for name in OPS} == before
    with pytest.raises(ZeroDivisionError), integration.patched():
        1 / 0  # noqa: B018
    assert {name: getattr(F, name) for name in OPS} == before
    assert ops_of(attend, x) == []


@pytest.mark.parametrize("grad", [False, True])
def test_patch_reaches_torch_encoder_layers_even_in_inference(grad):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(2, 7, 32)
    with torch.set_grad_enabled(grad):
        expected = encoder(x)
        fast = torch.backends.mha.get_fastpath_enabled()
        assert integration.patch(encoder) is encoder
        assert integration.patch(encoder) is encoder
        assert [c.op for c in mmkern.explain(encoder, x)] == ["attention_fwd"] * 2
        assert torch.allclose(encoder(x), expected, atol=1e-5)
        assert integration.unpatch(encoder) is encoder
        assert [c.op for c in mmkern.explain(encoder, x)] == []
        assert torch.equal(encoder(x), expected)
    assert "forward" not in vars(encoder)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    integration.unpatch(encoder)


def test_gradients_pass_through_a_patched_model():
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)

    def gradient():
        attention.zero_grad()
        attention(x, x, x, need_weights=False)[0].square().sum().backward()
        return attention.in_proj_weight.grad.clone()

    expected = gradient()
    integration.patch(attention)
    assert torch.allclose(gradient(), expected, rtol=1e-4, atol=1e-5)


def test_importing_patches_nothing():
    code = (
        "import torch.nn.functional as F; before = F.scaled_dot_product_attention, F.softmax;"
        "import mmkern, mmkern.integrations.torch, sys;"
        "assert before == (F.scaled_dot_product_attention, F.softmax);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cross_entropy_is_patched_with_its_gradient():
    x, target, weight = mmkern.testing.randn(6, 9).requires_grad_(), torch.tensor([0, 8, 3, -100, 1, 1]), torch.rand(9)
    loss = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    want = torch.autograd.grad(loss(x, target), x)[0]
    with integration.patched():
        ran = mmkern.explain(lambda: loss(x, target).backward())
        summed = torch.nn.functional.cross_entropy(x, target, size_average=False)
    assert next(choice.op for choice in ran) == "cross_entropy_fwd"
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(summed, torch.nn.functional.cross_entropy(x, target, reduction="sum"))
