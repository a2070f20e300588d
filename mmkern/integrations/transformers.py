"""mmkern's attention for Hugging Face Transformers, under the name "mmkern".

    mmkern.integrations.transformers.register()
    model = AutoModel.from_pretrained(path, attn_implementation="mmkern")

or, for a model already loaded, `model.set_attn_implementation("mmkern")`. Grouped key heads, scale, softcap, causal and
sliding-window masks, attention sinks, position biases (T5) and key selections (DeepSeek V3.2) arrive as Transformers
passes them. A model that computes its attention itself, without Transformers' attention interface, is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.output_capturing import _active_collector

import mmkern
from mmkern.integrations._told_mask import ToldMask, added
from mmkern.nn.maps import attention_weights

_names: set[str] = set()  # under which mmkern is registered

# Keywords that say nothing about the result of attention; `attention_forward` refuses what it neither applies nor finds
# here. Positions are in the queries, and in the mask where they tell packed sequences apart.
_HARMLESS = frozenset({
    "cache_position", "deterministic", "input_ids", "labels", "logits_to_keep", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "position_ids",
    "return_dict", "use_cache",
})  # fmt: skip


def register(name: str = "mmkern") -> None:
    """Make `attn_implementation=name` mean mmkern's attention, in every model of this process; again is harmless.

    From then on a model whose code does not use Transformers' attention interface refuses that name with a ValueError,
    when it is built, in `set_attn_implementation` and as `config._attn_implementation`: it would compute its attention
    itself, with masks meant for another's.
    """
    if not _names:
        model: Any = PreTrainedModel
        config: Any = PreTrainedConfig
        config._attn_implementation = _guard_config(config._attn_implementation)
        model.get_correct_attn_implementation = _guard_one(model.get_correct_attn_implementation)
        model.set_attn_implementation = _guard_all(model.set_attn_implementation)
    _names.add(name)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


# ---- Which models may use it


def _guard_one(original: Callable[..., str]) -> Callable[..., str]:
    """`PreTrainedModel.get_correct_attn_implementation`, which every model calls when it is built, refusing."""

    @wraps(original)
    def guarded(self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        if requested_attention in _names:
            _check_uses_interface(type(self), requested_attention)
        return original(self, requested_attention, *args, **kwargs)

    return guarded


def _guard_all(original: Callable[..., None]) -> Callable[..., None]:
    """`PreTrainedModel.set_attn_implementation`, which passes over a model that cannot, refusing."""

    @wraps(original)
    def guarded(self: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        asked = _asked(self.config, attn_implementation)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                name = asked.get(id(module.config), asked[id(self.config)])
                if name in _names:
                    _check_uses_interface(type(module), str(name))
        original(self, attn_implementation, *args, **kwargs)

    return guarded


def _asked(config: PreTrainedConfig, implementation: Any) -> dict[int, str | None]:
    """id of a configuration and of each one in it -> the attention it is asked to use, by one name or by a dict."""
    by_name = isinstance(implementation, dict)
    found = {id(config): implementation.get("") if by_name else implementation}
    for key in config.sub_configs:
        if (inner := getattr(config, key, None)) is not None:
            found |= _asked(inner, implementation.get(key) if by_name else implementation)
    return found


def _guard_config(original: property) -> property:
    """`PreTrainedConfig._attn_implementation`, written after a model was built, refusing: eager would run, unasked."""

    def guarded(self: PreTrainedConfig, value: Any) -> None:
        name = value.get("") if isinstance(value, dict) else value
        module_name = _modeling(self)
        if name in _names and module_name in sys.modules and (own := _own_attention(module_name)):
            raise ValueError(_refusal(name, type(self).__name__, own))
        assert original.fset is not None
        original.fset(self, value)

    return original.setter(guarded)


def _modeling(config: Any) -> str:
    """The name of the module of a configuration's models."""
    return type(config).__module__.replace(".configuration_", ".modeling_")


def _check_uses_interface(model: type, name: str) -> None:
    for one in model.__mro__:
        if issubclass(one, PreTrainedModel) and one is not PreTrainedModel and (own := _own_attention(one.__module__)):
            raise ValueError(_refusal(name, model.__name__, own))


def _refusal(name: str, who: str, own: str) -> str:
    return (
        f"attn_implementation={name!r}: {who} computes its attention itself, in {own}, without Transformers' attention "
        "interface; use attn_implementation='eager', or 'sdpa' where it has it, inside "
        "mmkern.integrations.torch.patched()"
    )


@torch.compiler.assume_constant_result
def _about(module_name: str) -> tuple[str | None, bool]:
    """What is to be known of the models defined there."""
    return _own_attention(module_name), _knows_sdpa(module_name)


@cache
def _own_attention(module_name: str) -> str | None:
    """An attention class of a module whose attention does not, or not always, go through the interface; or None."""
    module = sys.modules.get(module_name)
    if module is None:
        return None
    for value in vars(module).values():  # tables by name of implementation, ours not among them
        if isinstance(value, dict) and isinstance(value.get("eager"), type):
            return f"{module_name}.{value['eager'].__name__}"
    if any(isinstance(value, AttentionInterface) for value in vars(module).values()):
        return None
    for value in vars(module).values():
        here = isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == module_name
        if here and any(word in value.__name__.lower() for word in ("attention", "attn")):
            return f"{module_name}.{value.__name__}"
    return None


@cache
def _knows_sdpa(module_name: str) -> bool:
    """Whether a model of this module takes boolean masks; of an unknown module, as most do, yes."""
    models = [
        value
        for value in vars(sys.modules.get(module_name, torch)).values()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module_name
    ]
    return not models or any(model._supports_sdpa for model in models)


# ---- Masks


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, (batch, 1, q_length, kv_length). None means that every query sees every key.

    Boolean where the model knows sdpa, True for what a query sees; else, as in eager attention, of `dtype` and added to
    scores: such a model may compute with it.

    Causality is always in the mask: whether a layer's own `is_causal` can be believed differs between models. Where the
    mask is no more than causal, or hides padding on the right, or both, it is a `ToldMask`, which takes no memory
    and lets attention skip what is hidden.
    """
    own, knows_sdpa = _about(_modeling(config))
    if own:  # a configuration was given the name after its model had been built
        raise ValueError(_refusal(config._attn_implementation, type(config).__name__, own))
    kind = torch.bool if knows_sdpa else dtype
    shape = (batch_size, 1, q_length, kv_length)
    tracing = not _readable(attention_mask, q_offset, kv_offset)
    if not tracing:
        q_offset, kv_offset = int(q_offset), int(kv_offset)
        causal = mask_function is causal_mask_function
        if (causal or mask_function is bidirectional_mask_function) and q_offset == kv_offset:
            known, lengths = _lengths(attention_mask, kv_length, kv_offset)
            if known and not causal and lengths is None and allow_is_bidirectional_skip:
                return None
            if known:
                return ToldMask.tell(shape, kind, device, is_causal=causal, lengths=lengths)
    mask = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not tracing,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        device=device,
        **kwargs,
    )
    # sdpa's None under a causal mask: one query sees all keys; more of them start where the keys start.
    if mask is None and allow_is_causal_skip and q_length > 1:
        return ToldMask.tell(shape, kind, device, is_causal=True, lengths=None)
    return mask if mask is None or kind == torch.bool else added(mask, dtype)


def _readable(*values: Any) -> bool:
    """Whether these tensors' values are facts of this call, not examples (tracing) or placeholders."""
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    ):
        return False
    return all(not isinstance(t, Tensor) or (type(t) is Tensor and not t.is_meta) for t in values) and all(
        isinstance(t, Tensor | int | None) for t in values
    )


def _lengths(padding: Tensor | None, keys: int, offset: int) -> tuple[bool, Tensor | None]:
    """Whether a padding mask (batch, keys) hides at most the ends of rows; and the lengths that remain, if it does."""
    if padding is None:
        return True, None
    if padding.dim() != 2 or offset or padding.shape[1] > keys:
        return False, None
    lengths = padding.sum(-1)
    if not torch.equal(padding, torch.arange(padding.shape[1], device=padding.device) < lengths[:, None]):
        return False, None
    whole = padding.shape[1] == keys and bool((lengths == keys).all())
    return True, None if whole else lengths


# ---- Attention


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as a Transformers layer calls it.

    Args:
        query: (batch, heads, q_len, head_dim); key, value: (batch, key heads, k_len, head_dim).
        attention_mask: from `attention_mask` above: True where a query sees a key; or a float mask that is added. It
            says everything; None hides nothing.
        is_causal: read where there is no mask; the module's attribute of this name is not.
        position_bias: (1 or batch, heads, q_len, k_len), added to the scores.
        sliding_window: keys a query sees, itself included; part of the mask where there is one.
        s_aux: (heads,) attention sinks. sinks: (batch, heads, q_len, 1), one for each query.
        indices: integers (batch, q_len, n): the keys each query may see; -1 is none.
        cu_seq_lens_q, cu_seq_lens_k: int (n + 1,): where packed sequences start, the last one's end included.
        seq_idx: int (batch, length): to which packed sequence a position belongs.

    Returns:
        (batch, q_len, heads, head_dim), and the weights (batch, heads, q_len, k_len) before dropout where
        `output_attentions` is asked for, else None.

    Raises:
        ValueError: a keyword is neither understood nor known to be harmless.
    """
    for name, argument in kwargs.items():
        if argument is not None and name not in _HARMLESS:
            raise ValueError(
                f"{name}: {type(module).__name__} passes it to its attention, and mmkern's does not know it; use "
                "attn_implementation='eager'"
            )
    q_len, k_len = query.size(2), key.size(2)
    causal = bool(is_causal) and attention_mask is None and q_len > 1
    lengths = None
    if isinstance(attention_mask, ToldMask):
        if attention_mask.written is None and attention_mask.shape[-2:] == (q_len, k_len):
            causal, lengths, attention_mask = attention_mask.is_causal, attention_mask.key_lengths, None
        else:
            attention_mask = attention_mask.write()
    elif sliding_window is not None and attention_mask is None and sliding_window < k_len:
        attention_mask = _window(sliding_window, causal, q_len, k_len, query.device)
    packed = _packed(cu_seq_lens_q, cu_seq_lens_k, query, k_len)
    same = None if seq_idx is None else (seq_idx[:, :, None] == seq_idx[:, None, :])[:, None]
    for more in (_selected(indices, k_len), packed, same, position_bias):
        attention_mask = _combine(attention_mask, more)
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, torch.float32):
        attention_mask = attention_mask.to(query.dtype)
    scores: dict[str, Any] = {
        "is_causal": causal,
        "scale": query.size(-1) ** -0.5 if scaling is None else scaling,
        "key_lengths": lengths,
        "softcap": softcap or None,
    }
    wanted = _weights_wanted(module, kwargs)
    output = mmkern.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        enable_gqa=query.size(1) != key.size(1),
        sinks=s_aux,
        return_lse=wanted or sinks is not None,
        **scores,
    )
    if not wanted and sinks is None:
        return output.transpose(1, 2).contiguous(), None
    output, lse = output
    weights = None
    if wanted:
        weights = attention_weights(query, key, lse, attention_mask, sinks=s_aux, **scores).to(query.dtype)
    if sinks is not None:  # one more score in a row's sum leaves each weight this share of itself
        share = torch.sigmoid(lse[..., None] - sinks).to(query.dtype)
        output, weights = output * share, None if weights is None else weights * share
    return output.transpose(1, 2).contiguous(), weights


def _weights_wanted(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller asks for attention maps: by a keyword, or of Transformers' recorder of layers' outputs."""
    if kwargs.get("output_attentions"):
        return True
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _window(size: int, causal: bool, q_len: int, k_len: int, device: torch.device) -> Tensor:
    """Keys less than `size` away, the last query standing at the last key."""
    distance = torch.arange(k_len - q_len, k_len, device=device)[:, None] - torch.arange(k_len, device=device)
    return (distance < size) & (distance >= (0 if causal else 1 - size))


def _selected(indices: Tensor | None, k_len: int) -> Tensor | None:
    if indices is None:
        return None
    if indices.dim() != 3 or indices.is_floating_point():
        raise ValueError(f"indices: expected integers (batch, q_len, n), got {indices.dtype} {tuple(indices.shape)}")
    chosen = torch.zeros((*indices.shape[:2], k_len + 1), dtype=torch.bool, device=indices.device)
    place = torch.where((indices >= 0) & (indices < k_len), indices.long(), k_len)
    return chosen.scatter(-1, place, True)[:, None, :, :k_len]


def _packed(q_starts: Tensor | None, k_starts: Tensor | None, query: Tensor, k_len: int) -> Tensor | None:
    """Each query sees the keys of its own sequence."""
    if q_starts is None and k_starts is None:
        return None
    if q_starts is None or k_starts is None or query.size(0) != 1:
        raise ValueError("cu_seq_lens_q, cu_seq_lens_k: expected both, and sequences packed into a batch of one")
    of_query, of_key = (
        torch.bucketize(torch.arange(length, device=query.device), starts.to(query.device), right=True)
        for length, starts in ((query.size(2), q_starts), (k_len, k_starts))
    )
    return (of_query[:, None] == of_key)[None, None]


def _combine(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Both masks as one: bool where both are, else float."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == torch.bool and other.dtype == torch.bool:
        return mask & other
    if mask.dtype != torch.bool and other.dtype != torch.bool:
        return mask + other
    hidden, bias = (mask, other) if mask.dtype == torch.bool else (other, mask)
    return torch.where(hidden, bias, float("-inf"))
