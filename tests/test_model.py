"""The multimodal model: every choice trains, what a sample lacks or what pads it changes nothing, and it learns."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from model_cases import CHOICES, TINY, alone, batch_of, tiny

import mmkern
from mmkern.model import Batch, ModelConfig, MultimodalModel
from mmkern.model.config import ENCODINGS
from mmkern.nn import MultiheadAttention, PositionalEncoding, RotaryEmbedding


def trained(steps: int, backend: str, **changes) -> tuple[list[float], MultimodalModel]:
    """Losses of some steps, and the model after them with the gradients of the last."""
    model, batch = tiny(dropout=0.1, **changes), batch_of()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    with mmkern.backend(backend):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = sum(model.loss(batch).values())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize(("block", "encoding", "similarity"), CHOICES)
def test_every_choice_trains_and_equals_the_reference(block, encoding, similarity):
    choice = {"block": block, "encoding": encoding, "similarity": similarity}
    expected, _ = trained(3, "reference", **choice)
    actual, model = trained(3, "cpu", **choice)
    assert actual == pytest.approx(expected, abs=1e-4)
    assert len(set(actual)) == 3
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_choices_that_do_not_go_together_are_refused():
    for changes in ({"encoding": "rotary"}, {"encoding": "alibi"}, {"similarity": "cosine"}):
        with pytest.raises(ValueError, match="block: 'mlp' has no attention"):
            replace(TINY, block="mlp", **changes)


def mlp(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    first, second = block.mlp[0], block.mlp[2]
    return F.linear(F.gelu(F.linear(x, first.weight, first.bias)), second.weight, second.bias)


def test_the_mlp_block_is_its_formula():
    """hidden = MLP(input + positions), output = MLP(hidden + positions)."""
    model = tiny(block="mlp", encoder_layers=1, decoder_layers=1)
    images, prompts = torch.rand(2, 3, 32, 32), torch.randint(3, 20, (2, 5))
    text = model.text.tokens.weight * 16**0.5
    picture = model.stem(images).flatten(1, 2)
    inputs = torch.cat([picture + model.modality[0], text[prompts] + model.modality[1]], 1)
    angles = torch.arange(inputs.shape[1])[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
    positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    memory, lengths = model.encode(images, None, prompts, None)
    torch.testing.assert_close(memory, mlp(model.encoder[0], inputs + positions))
    assert lengths.tolist() == [inputs.shape[1]] * 2
    tokens = torch.randint(3, 20, (2, 4))
    hidden = text[tokens] + memory.mean(1, keepdim=True)
    output = model.decode(memory, lengths, tokens)
    torch.testing.assert_close(output, mlp(model.decoder[0], hidden + positions[:4]))


@pytest.mark.parametrize(("block", "encoding", "similarity"), [c for c in CHOICES if "euclidean" not in c[2]])
def test_a_batch_equals_its_samples_alone(block, encoding, similarity):
    """Padding, missing pictures and prompts, and what stands beside a sample reach nothing of it."""
    model, batch = tiny(block=block, encoding=encoding, similarity=similarity), batch_of()
    together = model(batch)
    for i in range(4):
        for name, expected in model(alone(batch, i)).items():
            torch.testing.assert_close(together[name][i : i + 1], expected, rtol=1e-4, atol=1e-5)


def test_each_modality_and_the_text_so_far_are_used():
    model, batch = tiny(), batch_of()
    whole = model(batch)
    changes = {
        "images": 1 - batch.images.nan_to_num(),
        "prompts": batch.prompts.flip(1),
        "inputs": torch.cat([batch.inputs[:, :3], batch.inputs[:, 3:].flip(1)], 1),
    }
    for name, changed in changes.items():
        other = model(replace(batch, **{name: changed}))
        moved = (other["hidden"] - whole["hidden"]).abs().amax(-1) > 1e-4  # (samples, tokens)
        reached = {"images": batch.image_present, "prompts": batch.prompt_lengths > 0, "inputs": torch.ones(4).bool()}
        assert moved[reached[name], -1].all(), name
        assert not moved[~reached[name]].any(), name
        assert name != "inputs" or not moved[:, :3].any(), "a token saw a later one"


def test_positions_are_told():
    """The same words in another order are another prompt, but not without an encoding."""
    batch = replace(batch_of(), images=None, image_present=None, prompt_lengths=None)
    for encoding in ("sinusoidal", "learned", "rotary", "alibi", "none"):
        model = tiny(encoding=encoding)
        a, b = (model(replace(batch, prompts=p))["class_logits"] for p in (batch.prompts, batch.prompts.roll(1, 1)))
        assert torch.allclose(a, b, atol=1e-6) == (encoding == "none"), encoding


def test_losses_by_their_definition():
    model, batch = tiny(), batch_of()
    batch.image_embeddings[2] = torch.nan
    losses, outputs = model.loss(batch), model(batch)
    logits = outputs["hidden"] @ model.text.tokens.weight.T + model.text.bias
    torch.testing.assert_close(model.logits(outputs["hidden"]), logits)
    torch.testing.assert_close(losses["text"], F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    torch.testing.assert_close(losses["class"], F.cross_entropy(outputs["class_logits"], batch.labels))
    there = torch.tensor([0, 1, 3])
    expected = F.mse_loss(outputs["image_embedding"][there], batch.image_embeddings[there])
    torch.testing.assert_close(losses["image"], expected)
    given = model.loss(batch, outputs)
    assert {name: loss.item() for name, loss in given.items()} == {name: loss.item() for name, loss in losses.items()}


def test_a_batch_that_asks_nothing_costs_nothing():
    model, batch = tiny(), batch_of()
    nothing = torch.full_like(batch.image_embeddings, torch.nan)
    no_targets, no_labels = torch.full_like(batch.targets, -100), torch.full_like(batch.labels, -100)
    losses = model.loss(replace(batch, targets=no_targets, labels=no_labels, image_embeddings=nothing))
    sum(losses.values()).backward()
    assert [loss.item() for loss in losses.values()] == [0.0, 0.0, 0.0]
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    only = model.loss(Batch(prompts=batch.prompts, labels=batch.labels))
    assert list(only) == ["class"]


@pytest.mark.parametrize("freeze", [True, False])
def test_word_vectors(freeze):
    vectors = torch.randn(20, 7)
    torch.manual_seed(0)
    config = replace(TINY, word_vector_dim=7, freeze_words=freeze)
    model, batch = MultimodalModel(config, vectors), batch_of()
    x = model.text(batch.prompts)
    projection = model.text.projected.weight
    angles = torch.arange(5)[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)
    positions = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    torch.testing.assert_close(x, vectors[batch.prompts] @ projection.T + positions)
    hidden = torch.randn(2, 3, 16)
    torch.testing.assert_close(model.logits(hidden), hidden @ (vectors @ projection.T).T, rtol=1e-4, atol=1e-4)
    losses = model.loss(batch)
    sum(losses.values()).backward()
    assert (model.text.tokens.weight.grad is None) == freeze
    assert projection.grad.any()
    assert torch.equal(model.text.tokens.weight, vectors)
    again = MultimodalModel(config)
    again.load_state_dict(model.state_dict())
    assert again.loss(batch)["text"] == losses["text"]
    with pytest.raises(ValueError, match=r"word_vectors: expected .* \(20, 7\), got \(20, 8\)"):
        MultimodalModel(config, torch.randn(20, 8))


@pytest.mark.parametrize(
    ("block", "encoding"), [("transformer", "rotary"), ("transformer", "learned"), ("mlp", "scalar")]
)
def test_a_checkpoint_brings_the_model_back(block, encoding, tmp_path):
    model, batch = tiny(block=block, encoding=encoding, similarity="dot").eval(), batch_of()
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    again = MultimodalModel(ModelConfig(**saved["config"])).eval()
    assert not torch.equal(again(batch)["hidden"], model(batch)["hidden"])
    again.load_state_dict(saved["weights"])
    for name, expected in model(batch).items():
        assert torch.equal(again(batch)[name], expected)


@pytest.mark.parametrize("block", ["transformer", "mlp"])
def test_autocast_trains_in_bfloat16(block):
    model, batch = tiny(block=block, encoding="learned"), batch_of()
    expected = model.loss(batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.loss(batch)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.03, atol=0.03)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("block", ["transformer", "mlp"])
def test_compiles_to_one_graph(block):
    model, batch = tiny(block=block), batch_of()
    arguments = batch.images.nan_to_num(), None, batch.prompts, batch.prompt_lengths
    compiled = torch.compile(model.encode, fullgraph=True, backend="aot_eager")
    (memory, lengths), (expected, _) = compiled(*arguments), model.encode(*arguments)
    torch.testing.assert_close(memory, expected, rtol=1e-5, atol=1e-5)
    decode = torch.compile(model.decode, fullgraph=True, backend="aot_eager")
    actual = decode(memory, lengths, batch.inputs)
    torch.testing.assert_close(actual, model.decode(memory, lengths, batch.inputs), rtol=1e-5, atol=1e-5)


def colours(samples: int, generator: torch.Generator) -> Batch:
    """A red, green or blue noisy picture; prompt 3 asks for its name (3 tokens), 4 for the name of the next colour."""
    colour = torch.randint(0, 3, (samples,), generator=generator)
    images = torch.rand(samples, 3, 32, 32, generator=generator) * 0.7
    images[torch.arange(samples), colour] += 0.3
    question = torch.randint(0, 2, (samples,), generator=generator)
    answer = (colour + question) % 3
    words = torch.tensor([[10, 11, 12], [13, 10, 14], [15, 16, 10]])[answer]
    start, end = torch.full((samples, 1), 1), torch.full((samples, 1), 2)
    return Batch(
        images=images,
        prompts=(3 + question)[:, None],
        inputs=torch.cat([start, words], 1),
        targets=torch.cat([words, end], 1),
        labels=answer,
    )


@pytest.mark.parametrize(("block", "stem"), [("transformer", "conv"), ("transformer", "patch"), ("mlp", "conv")])
def test_learns_what_needs_picture_and_prompt(block, stem):
    model = tiny(block=block, image_stem=stem, width=32, encoder_layers=1, decoder_layers=1, image_embedding=0)
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(120):
        losses = model.loss(colours(32, generator))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    test = colours(64, generator)
    outputs = model.eval()(test)
    accuracy = (outputs["class_logits"].argmax(-1) == test.labels).float().mean()
    said = (model.logits(outputs["hidden"]).argmax(-1) == test.targets).float().mean()
    assert said > 0.95, said
    if block == "transformer":  # a mean over tokens that never met adds picture and question up, which is not enough
        assert accuracy > 0.95, accuracy


def test_wrong_inputs_are_named():
    model, batch = tiny(), batch_of()
    for changes, message in (
        ({"images": None, "image_present": None, "prompts": None}, "images, tokens: expected at least one"),
        ({"images": torch.rand(4, 3, 30, 32)}, r"images: expected \(B, 3, 32, 32\).*got \(4, 3, 30, 32\)"),
        ({"prompts": torch.ones(4, 13).long()}, r"tokens: expected .*max_tokens = 12\), got \(4, 13\)"),
        (
            {"prompts": torch.ones(3, 2).long(), "prompt_lengths": None},
            "tokens: expected the 4 samples of images, got 3",
        ),
        ({"inputs": None}, "asks for the loss 'text', but there is no 'hidden'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.loss(replace(batch, **changes))
    with pytest.raises(IndexError, match="20"):
        model.loss(replace(batch, inputs=torch.full((4, 6), 20)))
    with pytest.raises(ValueError, match="classes: this model was made without"):
        tiny(classes=0).classify(torch.zeros(1, 2, 16), torch.tensor([2]))
    with pytest.raises(ValueError, match=r"images: expected \(B, 3, 0, 0\)"):
        tiny(image_size=0)(batch)
    with pytest.raises(ValueError, match="batch: expected tensors of one number of samples"):
        len(replace(batch, labels=torch.zeros(3).long()))


def test_a_model_of_text_alone():
    model = tiny(image_size=0)
    assert not any(name.startswith(("stem", "grid")) for name, _ in model.named_parameters())
    batch = replace(batch_of(), images=None, image_present=None)
    assert model(batch)["hidden"].shape == (4, 6, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "rnn"}, "block: expected one of transformer, mlp, got 'rnn'"),
        ({"similarity": "l1"}, "similarity: expected one of"),
        ({"encoding": "rope"}, "encoding: expected one of"),
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"width": 1 << 15}, "width: expected at most 16384, got 32768"),
        ({"width": 1 << 14, "decoder_layers": 200}, "width: with these layers and tokens expected at most 4294967296"),
        ({"classes": -1}, "classes: expected at least 0, got -1"),
        ({"width": 18}, "width: expected a multiple of 4 and of heads = 2, got 18"),
        ({"width": 12, "heads": 4, "encoding": "rotary"}, "heads: rotary needs an even width / heads"),
        ({"mlp_ratio": 0.01}, "mlp_ratio: expected at least one hidden channel"),
        ({"dropout": 1.0}, r"dropout: expected a chance in \[0, 1\), got 1.0"),
        ({"end": 20}, "end: expected a token below vocab_size 20, got 20"),
    ],
)
def test_wrong_configurations_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_a_batch_moves_between_devices():
    batch = batch_of().to("meta")
    assert {t.device.type for t in vars(batch).values()} == {"meta"}
    assert Batch(prompts=torch.ones(2, 3)).to("cpu").images is None
    assert len(batch) == 4


def emptied(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module made on meta that has been given memory, with NaN in it, and then the state."""
    module.to_empty(device="cpu")
    for t in module.state_dict().values():
        t.fill_(torch.nan)
    module.load_state_dict(state)
    return module.eval()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_model_made_on_meta_is_whole_after_a_strict_load(encoding):
    """No constant is lost that the state dict lacks, whether memory is given first or weights are assigned."""
    model, batch = tiny(encoding=encoding).eval(), batch_of()
    expected = model(batch)
    for assign in (False, True):
        with torch.device("meta"):
            again = MultimodalModel(replace(TINY, encoding=encoding))
        if assign:
            again.eval().load_state_dict(model.state_dict(), assign=True)
        else:
            emptied(again, model.state_dict())
        for name, actual in again(batch).items():
            assert torch.equal(actual, expected[name]), (name, assign)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiheadAttention(16, 4, batch_first=True, alibi=True),
        lambda: MultiheadAttention(16, 4, batch_first=True, similarity="cosine", rotary=True),
        *(lambda e=e: PositionalEncoding(16, e, max_length=8) for e in ("sinusoidal", "scalar", "learned", "none")),
        RotaryEmbedding,
    ],
)
def test_a_module_made_on_meta_is_whole_after_a_strict_load(make):
    module, x = make().eval(), torch.randn(2, 6, 16)
    with torch.device("meta"):
        again = make()
    emptied(again, module.state_dict())
    actual, expected = (m(x, x, x)[0] if isinstance(m, MultiheadAttention) else m(x) for m in (again, module))
    assert torch.equal(actual, expected)


def test_slopes_are_rounded_by_no_cast():
    slopes = mmkern.alibi_slopes(12)
    assert not torch.equal(slopes.bfloat16().float(), slopes)
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.float64)):
        module = cast(MultiheadAttention(24, 12, alibi=True))
        assert torch.equal(module.alibi_slopes, slopes)
