"""A model elsewhere: opened by transformers, and its classification run by ONNX Runtime, it says the same."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from model_cases import batch_of, tiny
from tokenizers import Tokenizer, models
from transformers import AutoModel, AutoTokenizer

from mmkern.model import Batch, pretrained
from mmkern.model.onnx import export_classification
from mmkern.testing import assert_accurate

CHOICES = [
    {},
    {"encoding": "rotary", "similarity": "cosine"},
    {"encoding": "alibi", "similarity": "euclidean"},
    {"encoding": "learned", "similarity": "squared_euclidean", "image_stem": "patch"},
    {"encoding": "scalar", "block": "mlp"},
    {"image_size": 0, "word_vector_dim": 6},
]


def tokenizer():
    return Tokenizer(models.WordLevel({f"<{name}>": i for i, name in enumerate(("pad", "start", "end", "x"))}, "<pad>"))


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_transformers_opens_it_with_the_same_bits(tmp_path, changes):
    model, batch = tiny(image_embedding=0, **changes).eval(), batch_of()
    pretrained.save(model, tokenizer(), ["a", "b", "c"], "which?", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "a", "1": "b", "2": "c"}
    opened = AutoModel.from_pretrained(tmp_path)
    assert asdict(opened.model.config) == asdict(model.config)
    assert opened.config.class_prompt == "which?"
    images = torch.rand(4, 3, 32, 32) if model.config.image_size else None
    mask = torch.arange(5) < torch.tensor([5, 3, 2, 1])[:, None]
    whole = Batch(images=images, prompts=batch.prompts, prompt_lengths=mask.sum(1), inputs=batch.inputs)
    with torch.no_grad():
        expected = model(whole)
        found = opened(images, batch.prompts, mask, batch.inputs)
    assert torch.equal(found.logits, expected["class_logits"])
    assert torch.equal(found.text_logits, model.logits(expected["hidden"]))
    words = AutoTokenizer.from_pretrained(tmp_path)
    assert (words.pad_token_id, words.bos_token_id, words.eos_token_id) == (0, 1, 2)
    assert words("<x>")["input_ids"] == [3]


def test_a_fresh_process_opens_it_once_the_module_is_imported(tmp_path):
    pretrained.save(tiny(), tokenizer(), ["a", "b", "c"], "", tmp_path)
    script = """
import sys
import mmkern
assert "transformers" not in sys.modules
import mmkern.model.pretrained
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=180)
    assert done.stdout.strip() == "MmkernModel", done.stderr


@pytest.mark.parametrize("changes", CHOICES, ids=str)
def test_onnx_classifies_the_same(tmp_path, changes):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = tiny(encoder_layers=1, **changes).eval()
    export_classification(model, tmp_path / "x.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(tmp_path / "x.onnx", options, providers=["CPUExecutionProvider"])
    exact = tiny(encoder_layers=1, **changes).eval().double()
    for samples, longest in ((1, 1), (4, 7), (3, 12)):
        g = torch.Generator().manual_seed(samples)
        lengths = torch.randint(0 if model.config.image_size else 1, longest + 1, (samples,), generator=g)
        tokens = torch.randint(3, 20, (samples, longest), generator=g)
        images = torch.rand(samples, 3, 32, 32, generator=g) if model.config.image_size else None
        given = {"images": images, "tokens": tokens, "lengths": lengths}
        (found,) = session.run(None, {name: t.numpy() for name, t in given.items() if t is not None})
        with torch.no_grad():
            ours = model.classify(*model.encode(images, None, tokens, lengths))
            wide = exact.classify(*exact.encode(None if images is None else images.double(), None, tokens, lengths))
        assert_accurate(torch.from_numpy(found), wide, ours, "forward")


def test_a_model_without_classes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="classes: this model was made without a classification head"):
        export_classification(tiny(classes=0), tmp_path / "x.onnx")
