"""Transformers' architectures: with mmkern's attention each answers as with eager attention, or refuses the name."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from architecture_cases import assert_agree, assert_generates_alike, build, inputs, model_class  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402

from mmkern.integrations.transformers import register  # noqa: E402

# By the number of attentions in a forward pass of two layers.
AGREE = {
    1: """
        lfm3 minimax
    """,
    2: """
        afmoe albert apertus arcee aria axk2 beit bert bert-generation biogpt bitnet clip_text_model
        clip_vision_model cohere cohere2 cohere2_moe ctrl cwm deepseek_v3 deepseek_v4 deepseek_vl deit dinov2
        dinov3_vit distilbert doge dpr electra ernie4_5 ernie4_5_moe eurobert evolla exaone4 exaone_moe
        flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2
        gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa gte helium hy_v3 hy_v4
        idefics2 idefics3 inkling2_text internvl jais2 jetmoe jina_embeddings_v3 kimi_k25 laguna layoutlm lfm2
        llama llama4_text llava llava_onevision markuplm mellum mimo_v2_flash minicpm3 minimax_m2
        minimax_m3_vl_text ministral3 mistral mistral3 mistral_large4 mixtral mllama mobilebert modernbert
        modernbert-decoder molmo2_text moshi nanochat nomic_bert olmo olmo2 olmo3 olmoe openai_privacy_filter
        opt paligemma persimmon phi phi3 phimoe qwen2 qwen3 qwen3_vl_text seed_oss siglip_vision_model smollm3
        solar_open splinter stablelm starcoder2 tipsv2_text_model ultrabert vaultgemma vit whisper
        xlm-roberta-xl
    """,
    4: """
        bigbird_pegasus diffllama longt5
    """,
    6: """
        bart blenderbot encoder-decoder m2m_100 marian mbart mt5 nllb-moe pegasus plbart switch_transformers t5
        umt5
    """,
    24: """
        kosmos-2.5
    """,
}
HITS = {kind: hits for hits, kinds in AGREE.items() for kind in kinds.split()}
GENERATE = """
    afmoe axk2 bart bert-generation biogpt cohere2 ctrl deepseek_v3 deepseek_v4 diffllama doge encoder-decoder
    exaone4 gemma2 gemma3_text glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss granite_swa hy_v4 inkling2_text jetmoe
    lfm2 llama llama4_text longt5 m2m_100 mimo_v2_flash minimax ministral3 mistral mixtral modernbert-decoder moshi
    mt5 nllb-moe olmo3 opt pegasus phi3 qwen3 stablelm starcoder2 t5
"""
# These compute attention by code of their own.
REFUSE = """
    bark big_bird blip bloom bros canine clvp codegen convbert cpmant cvt data2vec-vision deberta deberta-v2
    deepseek_vl_hybrid falcon fastspeech2_conformer fastspeech2_conformer_with_hifigan flaubert flava fsmt funnel
    git glpn got_ocr2 gpt_neo gpt_neox_japanese gptj granite_speech granite_speech_plus grounding-dino groupvit
    hiera ibert imagegpt layoutlmv3 levit lilt luke lxmert mask2former megatron-bert mgp-str mm-grounding-dino
    mobilevit mobilevitv2 mpnet mpt mra mvp nystromformer oneformer openai-gpt perceiver prophetnet pvt pvt_v2
    rembert roformer rwkv sam sam_hq sam_hq_vision_model sam_vision_model seggpt sew-d speecht5 squeezebert
    swiftformer tapas timesformer trocr tvp unlimited_ocr vilt visual_bert vitdet vits wavlm xglm xlm xlnet yoso
"""


@pytest.fixture(autouse=True)
def _registered():
    register()
    transformers.logging.set_verbosity_error()


def known(kind):
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"Transformers {transformers.__version__} has no {kind}")
    return kind


@pytest.mark.parametrize("kind", HITS)
def test_agrees_with_eager(kind):
    assert assert_agree(known(kind)) == HITS[kind]


@pytest.mark.parametrize("kind", GENERATE.split())
def test_generates_as_eager(kind):
    assert_generates_alike(known(kind))


@pytest.mark.parametrize("kind", REFUSE.split())
def test_refuses(kind):
    with pytest.raises(ValueError, match=r"'mmkern': \w+ computes its attention itself, in [\w.]+.*eager.*patched"):
        build(known(kind), "mmkern")


def test_refuses_a_built_model_and_its_heirs():
    class Heir(transformers.BloomForCausalLM):
        pass

    with pytest.raises(ValueError, match=r"(Heir|BloomConfig) computes.*BloomAttention"):
        Heir._from_config(build("bloom", "eager").config, attn_implementation="mmkern")
    model = build("bloom", "eager")
    with pytest.raises(ValueError, match="BloomForCausalLM computes"):
        model.set_attn_implementation("mmkern")
    with pytest.raises(ValueError, match="BloomForCausalLM computes"):
        model.set_attn_implementation({"": "mmkern"})


@pytest.mark.parametrize("kind", ["bloom", "deberta", "xlnet"])
def test_refuses_in_the_configuration_of_a_built_model(kind):
    """Models that make their own masks never ask for ours, and would go on in eager."""
    model = build(known(kind), "eager")
    with pytest.raises(ValueError, match=r"Config computes its attention itself"):
        model.config._attn_implementation = "mmkern"
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation_internal = "mmkern"
    if kind == "bloom":  # and at the first call, where the mask is ours
        with pytest.raises(ValueError, match="BloomConfig computes"):
            model(**inputs(model, "left")[0])


def test_a_dict_chooses_for_parts_of_a_model():
    model = build(known("llava"), "eager")
    model.set_attn_implementation({"text_config": "mmkern", "vision_config": "eager"})
    config = model.config
    assert [c._attn_implementation for c in (config.text_config, config.vision_config)] == ["mmkern", "eager"]


@pytest.mark.architectures
@pytest.mark.parametrize("kind", sorted(set(CONFIG_MAPPING) - set(HITS) - set(REFUSE.split())))
def test_every_other_that_can_be_built_small(kind):
    """Not run by default: `make architectures`."""
    try:
        model = build(kind, "eager") if model_class(kind) else None
        given = model and inputs(model, "none")
        assert given
        with torch.no_grad():
            model(**given[0])
    except Exception as error:
        pytest.skip(f"not by this recipe: {type(error).__name__}: {error}")
    assert_agree(kind)
