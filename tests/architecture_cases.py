"""Any architecture of Transformers, small and random, with eager attention and with mmkern's."""

import contextlib
import inspect
from collections import Counter

import torch
import torch.nn.functional as F
import transformers
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

import mmkern

LENGTH = 13
_SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim n_embed",
    64: "intermediate_size d_ff ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_inner ffn_hidden_size mlp_dim "
    "moe_intermediate_size shared_expert_intermediate_size feed_forward_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers depth top_k "
    "moe_k num_decoder_layers num_experts_per_tok num_experts_per_token num_key_value_heads num_kv_heads n_head_kv "
    "multi_query_group_num encoder_num_hidden_layers decoder_num_hidden_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts",
    8: "head_dim d_kv attention_head_size v_head_dim qk_nope_head_dim qk_rope_head_dim",
    16: "q_lora_rank kv_lora_rank",
    96: "vocab_size encoder_vocab_size decoder_vocab_size",
    256: "max_position_embeddings n_positions n_ctx max_sequence_length",
    1: "n_group topk_group bos_token_id decoder_start_token_id",
    5: "sliding_window attention_window local_attention window_size",  # less than the sequence's length
}
_SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "eos_token_id": 2}
_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def shrink(config, depth=0):
    """Set what is a size by its name, in this configuration and those it holds."""
    for name in list(vars(config)):
        value = getattr(config, name, None)
        if isinstance(value, transformers.PreTrainedConfig) and depth < 4:
            shrink(value, depth + 1)
        elif name.startswith("num_key_value") and getattr(config, "kv_lora_rank", None):
            setattr(config, name, 4)
        elif name in _SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            setattr(config, name, _SIZES[name])
        elif name in _LAYERS and isinstance(value, list | tuple) and len(value) > 2:
            setattr(config, name, (list(dict.fromkeys(value)) * 2)[:2])
        elif name in _TOKENS:
            setattr(config, name, _TOKENS[name])
    return config


def model_class(kind):
    """The class to try: one that generates, where there is one."""
    for names in (
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_MAPPING_NAMES,
    ):
        if kind in names:
            found = names[kind]
            return getattr(transformers, found if isinstance(found, str) else found[0])
    return None


def build(kind, attention):
    config = shrink(CONFIG_MAPPING[kind]())
    config._attn_implementation = attention
    return model_class(kind)._from_config(config).eval()


def pair(kind):
    """Eager and mmkern's, of the same weights: large enough that what attention hides makes a difference."""
    torch.manual_seed(0)
    eager = build(kind, "eager")
    generator = torch.Generator().manual_seed(5)
    for name, t in eager.named_parameters():
        if t.is_floating_point() and (t.dim() >= 2 or "sink" in name):
            torch.nn.init.normal_(t.data, std=0.15, generator=generator)
    ours = build(kind, "mmkern")
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def inputs(model, padding):
    """Arguments of a call and the mask of what counts; None where padding is asked of a model without tokens."""
    names, config = inspect.signature(model.forward).parameters, model.config
    generator = torch.Generator().manual_seed(2)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    if padding == "right":
        mask[0, 8:] = mask[1, 10:] = 0
    elif padding == "left":
        mask[0, :5] = mask[1, :3] = 0
    if "input_ids" in names:
        found = {"input_ids": torch.randint(3, 90, mask.shape, generator=generator)}
        if "attention_mask" in names:
            found["attention_mask"] = mask
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
            found["decoder_input_ids"] = torch.randint(3, 90, (3, 7), generator=generator)
        return found, mask
    size = getattr(config, "image_size", 32)
    if padding != "none" or "pixel_values" not in names:
        return None
    size = size if isinstance(size, int) else size[0]
    shape = (2, getattr(config, "num_channels", 3), size, size)
    return {"pixel_values": torch.randn(shape, generator=generator)}, mask


class _Softmaxes(TorchFunctionMode):
    """Counts the softmaxes that torch computes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in (F.softmax, torch.softmax, torch.Tensor.softmax)
        return func(*args, **(kwargs or {}))


def run(model, arguments):
    """Its main output, the attention kernels that mmkern ran, and the softmaxes that torch ran."""
    with torch.no_grad(), _Softmaxes() as softmaxes:
        found = []
        ran = Counter(
            choice.backend
            for choice in mmkern.explain(lambda: found.append(model(**arguments)))
            if choice.op == "attention_fwd"
        )
    (output,) = found
    for name in ("last_hidden_state", "logits"):
        if isinstance(output.get(name), torch.Tensor):
            return output[name], ran, softmaxes.count
    return next(t for t in output.values() if isinstance(t, torch.Tensor)), ran, softmaxes.count


def assert_agree(kind):
    """Equal outputs under every padding, and each of mmkern's attentions in the place of one softmax; their number."""
    eager, ours = pair(kind)
    hits = 0
    for padding in ("none", "right", "left"):
        given = inputs(eager, padding)
        if given is None:
            continue
        (expected, _, all_softmaxes), (actual, ran, left) = (run(model, given[0]) for model in (eager, ours))
        if expected.shape[:2] == given[1].shape:
            expected, actual = (t[given[1].bool()] for t in (expected, actual))
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, f"{kind}, padding {padding}: {error:.1e}"
        hits = ran.total()
        assert hits + left == all_softmaxes, f"{kind}, padding {padding}: {hits} attentions, {left} of {all_softmaxes}"
        assert set(ran) <= {"cpu"}
    return hits


def assert_generates_alike(kind):
    """Greedy tokens with a cache, of prompts padded on the left, and the logits behind them."""
    found = []
    for model in pair(kind):
        arguments, _ = inputs(model, "left")
        if arguments.pop("decoder_input_ids", None) is not None:
            arguments["decoder_start_token_id"] = 1
        with contextlib.redirect_stderr(None):
            made = model.generate(
                **arguments, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True,
                eos_token_id=None,
            )  # fmt: skip
        found.append((made.sequences, torch.stack(made.logits)))
    assert torch.equal(found[0][0], found[1][0]), kind
    error = (found[0][1] - found[1][1]).abs().max() / found[0][1].abs().max()
    assert error < 2e-5, f"{kind}: {error:.1e}"
