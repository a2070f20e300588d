"""A trained model as transformers knows models: once this is imported, `AutoModel` and `AutoConfig` open its folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

import mmkern
from mmkern.model.config import Batch, ModelConfig
from mmkern.model.multimodal import MultimodalModel
from mmkern.nn import MultiheadAttention


class MmkernConfig(PreTrainedConfig):
    """A `ModelConfig` (`settings`), the names of its classes (`id2label`), and the prompt that asks for them."""

    model_type = "mmkern"

    def __init__(self, settings: dict[str, Any] | None = None, class_prompt: str = "", **options: Any) -> None:
        self.settings = settings or asdict(ModelConfig(vocab_size=3))
        self.class_prompt = class_prompt
        super().__init__(**options)


@dataclass
class MmkernOutput(ModelOutput):
    """logits: (B, classes) of the sample's class. text_logits: (B, T, vocab_size) of each next token. Or None."""

    logits: Tensor | None = None
    text_logits: Tensor | None = None


class MmkernModel(PreTrainedModel):
    """A `MultimodalModel`, which is its `model`: `mmkern.model.generate(opened.model, batch, max_tokens=16)` writes."""

    config_class = MmkernConfig
    main_input_name = "pixel_values"

    def __init__(self, config: MmkernConfig) -> None:
        super().__init__(config)
        self.model = MultimodalModel(ModelConfig(**config.settings))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Slopes are in no state dict, and transformers leaves them as the memory was; all else is read or drawn."""
        if isinstance(module, MultiheadAttention) and module.alibi_slopes is not None:
            module.alibi_slopes.copy_(mmkern.alibi_slopes(module.num_heads))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
    ) -> MmkernOutput:
        """The class, and the logits of the text so far.

        Args:
            pixel_values: (B, 3, side, side) in [0, 1], not normalised.
            input_ids, attention_mask: (B, P) of the prompt, padded at the end; no mask: all of them.
            decoder_input_ids: (B, T), start and the text so far; None: no text is asked for.
        """
        lengths = None if attention_mask is None else attention_mask.sum(1)
        batch = Batch(images=pixel_values, prompts=input_ids, prompt_lengths=lengths, inputs=decoder_input_ids)
        found = self.model(batch)
        hidden = found.get("hidden")
        return MmkernOutput(found.get("class_logits"), None if hidden is None else self.model.logits(hidden))


AutoConfig.register("mmkern", MmkernConfig, exist_ok=True)
AutoModel.register(MmkernConfig, MmkernModel, exist_ok=True)


def save(model: MultimodalModel, tokenizer: Any, classes: list[str], class_prompt: str, folder: Path) -> None:
    """Writes what `AutoConfig`, `AutoModel` and `AutoTokenizer` open; tokenizer: a tokenizers.Tokenizer."""
    names = dict(enumerate(classes))
    config = MmkernConfig(asdict(model.config), class_prompt, id2label=names, label2id={n: i for i, n in names.items()})
    wrapped = MmkernModel(config)
    wrapped.model.load_state_dict(model.state_dict())
    wrapped.save_pretrained(folder)
    special = {"pad_token": model.config.pad, "bos_token": model.config.start, "eos_token": model.config.end}
    tokens = {name: tokenizer.id_to_token(place) for name, place in special.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="right", **tokens).save_pretrained(folder)
