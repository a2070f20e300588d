"""A model's classification as ONNX: our operators are written out by their reference formulas, in standard ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from mmkern import reference
from mmkern.model.multimodal import MultimodalModel

FORMULAS: dict[str, Callable[..., Any]] = {
    "attention_fwd": reference.attention,
    "embed_tokens_fwd": reference.embed_tokens,
    "add_positional_encoding_fwd": reference.add_positional_encoding,
    "rotary_fwd": reference.rotary,
    "rotary_qk_fwd": reference.rotary_qk,
}
NAMES = ("images", "tokens", "lengths")


class _Classification(nn.Module):
    """Pictures (where the model takes any) and prompts to logits of classes."""

    def __init__(self, model: MultimodalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor | None, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.model.classify(*self.model.encode(images, None, tokens, lengths))


def export_classification(model: MultimodalModel, path: Path) -> None:
    """Writes an ONNX model of "images" (B, 3, side, side) in [0, 1], "tokens" (B, P) and "lengths" (B,) -> "logits".

    A model that takes no pictures has no "images". Tokens are padded at the end; a length may be 0, P at least 1. Any B
    and P fit. Needs onnx and onnxscript.

    Raises:
        ValueError: the model has no classes.
    """
    c, device = model.config, next(model.parameters()).device
    if not c.classes:
        raise ValueError("classes: this model was made without a classification head")
    images = torch.rand(2, 3, c.image_size, c.image_size, device=device) if c.image_size else None
    tokens, lengths = torch.full((2, 3), c.end, device=device), torch.tensor([3, 2], device=device)
    batch, prompt = Dim("batch", min=1, max=1 << 20), Dim("prompt", min=1, max=c.max_tokens)
    shapes = (None if images is None else {0: batch}, {0: batch, 1: prompt}, {0: batch})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of torch's own deprecations
        program = torch.export.export(_Classification(model.eval()), (images, tokens, lengths), dynamic_shapes=shapes)
        ours = {node.target for node in program.graph.nodes if str(node.target).startswith("mmkern.")}
        program = program.run_decompositions({op: FORMULAS[op._opname.removesuffix("_called")] for op in ours})
        names = NAMES if images is not None else NAMES[1:]
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=names, output_names=["logits"], external_data=False
        )
        assert written is not None
        written.save(path)
