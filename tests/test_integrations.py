"""mmkern inside Transformers models gives what their own attention gives."""

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F

import mmkern
import mmkern.testing
from mmkern.benchmarks import model as minilm

transformers = pytest.importorskip("transformers")
import architecture_cases  # noqa: E402

from mmkern.integrations._told_mask import ToldMask, added  # noqa: E402
from mmkern.integrations.transformers import attention_forward, register  # noqa: E402

needs_weights = pytest.mark.skipif(bool(minilm.missing()), reason=f"MiniLM: {minilm.missing()}")


@pytest.fixture(autouse=True)
def _registered():
    register()


load = functools.cache(minilm.load)


def ops_of(function, *args, **kwargs) -> list[str]:
    with torch.no_grad():
        return [choice.op for choice in mmkern.explain(function, *args, **kwargs)]


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


ATTENTION = types.SimpleNamespace()  # a module that says nothing about itself


def heads(*lengths: int) -> list[torch.Tensor]:
    return [mmkern.testing.randn(1, 2, length, 8, seed=seed) for seed, length in enumerate(lengths)]


def test_a_keyword_that_is_not_known_is_refused():
    q, k, v = heads(3, 3, 3)
    expected = attention_forward(ATTENTION, q, k, v, None)[0]
    for name in ("position_ids", "deterministic", "output_router_logits", "max_length_q"):
        assert torch.equal(attention_forward(ATTENTION, q, k, v, None, **{name: 1})[0], expected), name
    assert torch.equal(attention_forward(ATTENTION, q, k, v, None, block_indices=None)[0], expected)
    for name in ("block_indices", "cache", "anything"):
        with pytest.raises(ValueError, match=f"{name}: SimpleNamespace passes it.*eager"):
            attention_forward(ATTENTION, q, k, v, None, **{name: 1})
    with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k: expected both"):
        attention_forward(ATTENTION, q, k, v, None, cu_seq_lens_q=torch.tensor([0, 3]))


def test_keywords_that_say_what_is_visible_are_applied():
    q, k, v = heads(6, 6, 6)
    same = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()
    chosen = torch.eye(6).bool() | (torch.arange(6) == 3)
    sinks = mmkern.testing.randn(1, 2, 6, 1, seed=4)
    starts, owner = torch.tensor([0, 2, 6]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    indices = torch.tensor([[[i, 3, -1] for i in range(6)]])
    scores = q @ k.mT / 8**0.5
    for visible, keywords in (
        (same, {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}),
        (same, {"seq_idx": owner}),
        (chosen, {"indices": indices}),
        (chosen & same, {"indices": indices, "seq_idx": owner}),
        (same, {"seq_idx": owner, "sinks": sinks}),
    ):
        expected = torch.cat([scores.masked_fill(~visible, -torch.inf), keywords.get("sinks", scores[..., :0])], -1)
        expected = expected.softmax(-1)[..., :6]
        out, weights = attention_forward(ATTENTION, q, k, v, None, output_attentions=True, **keywords)
        torch.testing.assert_close(out.transpose(1, 2), expected @ v)
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt_oss", "gemma2", "bart", "distilbert", "inkling2_text"])
def test_attention_maps_are_those_of_eager(kind):
    eager, ours = architecture_cases.pair(kind)
    arguments, mask = architecture_cases.inputs(eager, "right")
    rows = mask.bool()
    with torch.no_grad():
        expected, actual = (m(**arguments, output_attentions=True, use_cache=False) for m in (eager, ours))
    names = [name for name in expected if name.endswith("attentions") and expected[name]]
    assert names
    for name in names:
        for layer in zip(actual[name], expected[name], strict=True):
            own = layer[0].shape[-2] == rows.shape[-1]  # queries that are padding see what nobody asks for
            torch.testing.assert_close(*(t.transpose(1, 2)[rows] if own else t for t in layer), rtol=1e-4, atol=1e-6)


def test_told_masks_are_what_they_say_and_notice_edits():
    lengths = torch.tensor([5, 3])
    for dtype in (torch.bool, torch.float32):
        for causal in (True, False):
            visible = (torch.arange(5) < lengths[:, None])[:, None, None] & torch.ones(5, 5).tril(
                5 * (not causal)
            ).bool()
            expected = visible if dtype == torch.bool else added(visible, dtype)
            told = ToldMask.tell((2, 1, 5, 5), dtype, "cpu", is_causal=causal, lengths=lengths)
            assert (told.shape, told.dtype, told.ndim) == ((2, 1, 5, 5), dtype, 4)
            assert told.written is None
            assert type(told[:, :, 1:]) is torch.Tensor
            assert torch.equal(told[:, :, 1:], expected[:, :, 1:])
            assert torch.equal(copy.deepcopy(told) + 0, expected + 0)
    q, k, v = (torch.cat([t, t]) for t in heads(5, 5, 5))
    told = ToldMask.tell((2, 1, 5, 5), torch.bool, "cpu", is_causal=True, lengths=lengths)
    plain = told.clone()
    for mask in (told, plain):
        mask[0, 0, :, 1] = False
        mask[1].logical_not_()
    want = F.scaled_dot_product_attention(q, k, v, plain).transpose(1, 2)
    torch.testing.assert_close(attention_forward(ATTENTION, q, k, v, told)[0], want)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_nothing_of_an_example_stays_in_a_traced_model():
    eager, ours = architecture_cases.pair("bert")

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = ours

        def forward(self, tokens, mask):
            return self.model(input_ids=tokens, attention_mask=mask).logits

    example = tuple(architecture_cases.inputs(ours, "right")[0].values())
    with torch.no_grad():
        made = [torch.jit.trace(Logits(), example, check_trace=False), torch.export.export(Logits(), example).module()]
        made.append(torch.compile(Logits(), backend="eager", fullgraph=True))
        for padding in ("right", "left", "none"):
            arguments, mask = architecture_cases.inputs(eager, padding)
            expected = eager(**arguments).logits[mask.bool()]
            for model in made:
                torch.testing.assert_close(model(*arguments.values())[mask.bool()], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_trains_as_eager():
    """Gradients of parameters, position bias and sinks among them, also when layers are computed again."""
    for kind in ("t5", "gpt_oss"):
        found = []
        for model in architecture_cases.pair(kind):
            arguments, mask = architecture_cases.inputs(model, "right")
            if kind == "gpt_oss":
                model.gradient_checkpointing_enable()
                model.train()
            logits = model(**arguments, use_cache=False).logits
            logits = logits if kind == "t5" else logits[mask.bool()]
            (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
            found.append([p.grad for p in model.parameters() if p.grad is not None])
        for expected, actual in zip(*found, strict=True):
            assert (actual - expected).norm() < 1e-4 * expected.norm() + 1e-6


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_other_ways_to_generate(options):
    found = []
    for model in architecture_cases.pair("gpt_oss"):
        arguments, _ = architecture_cases.inputs(model, "left")
        found.append(model.generate(**arguments, max_new_tokens=6, do_sample=False, eos_token_id=None, **options))
    assert torch.equal(*found)
