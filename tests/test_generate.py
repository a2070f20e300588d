"""Generation: with kept keys as without, a batch as its samples alone, beams against every text there is."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from model_cases import alone, batch_of, tiny

import mmkern
from mmkern.model import Batch, MultimodalModel, generate

STRATEGIES = ("greedy", "sample", "beam")
MODELS = (
    {"encoding": "rotary"},
    {"encoding": "alibi", "similarity": "cosine"},
    {"encoding": "learned"},
    {"block": "mlp", "encoding": "learned"},
)


def talkative(seed: int = 0, **changes) -> MultimodalModel:
    """An untrained model with tied weights repeats what it read; stirred up, it heeds memory, text and positions."""
    model = tiny(seed, **changes)
    with torch.no_grad():
        if changes.get("block") == "mlp":
            model.encoder[-1].mlp[2].weight.mul_(10)
            for block in model.decoder:
                block.positions.table.normal_()
                block.mlp[2].weight.mul_(6)
            return model
        model.decoder_norm.weight.normal_(0, 2)
        for block in model.decoder:
            block.attention.out_proj.weight.mul_(8)
            block.cross.out_proj.weight.mul_(8)
    return model


def log_likelihood(model: MultimodalModel, batch: Batch, tokens: list[int], ended: bool) -> float:
    """Of what one sample says; pad and start are never said."""
    c = model.config
    said = torch.tensor([[*tokens, c.end] if ended else tokens])
    memory, lengths = model.encode(batch.images, None, batch.prompts, None)
    logits = model.logits(model.decode(memory, lengths, torch.cat([torch.tensor([[c.start]]), said[:, :-1]], 1)))
    logits[..., [c.pad, c.start]] = -torch.inf
    return logits.log_softmax(-1).gather(-1, said[..., None]).sum().item()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_with_kept_keys_as_without(changes, strategy):
    model, batch = talkative(**changes), batch_of()
    options = {"max_tokens": 12, "strategy": strategy, "seed": 0}
    kept = generate(model, batch, **options)
    assert kept == generate(model, batch, use_cache=False, **options)
    assert len({token for text in kept for token in text}) >= 3
    with mmkern.backend("reference"):
        assert kept == generate(model, batch, **options)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_a_batch_of_unequal_prompts_and_missing_pictures_says_what_each_says_alone(changes, strategy):
    model, batch = talkative(**changes), batch_of()
    together = generate(model, batch, max_tokens=12, strategy=strategy)
    assert together == [generate(model, alone(batch, i), max_tokens=12, strategy=strategy)[0] for i in range(4)]
    assert len({tuple(text) for text in together}) > 1


def test_greedy_says_the_likeliest_token_each_time():
    model, batch = talkative(), alone(batch_of(), 0)
    (text,) = generate(model, batch, max_tokens=12)
    memory, lengths = model.encode(batch.images, None, batch.prompts, None)
    for i, token in enumerate(text):
        logits = model.logits(model.decode(memory, lengths, torch.tensor([[1, *text[:i]]])))[0, -1]
        logits[[0, 1]] = -torch.inf
        assert token == logits.argmax()


def test_beams_that_hold_every_text_find_the_likeliest():
    lengths, batch = set(), replace(alone(batch_of(), 0), prompts=torch.tensor([[3, 5]]))
    for seed in range(20, 30):
        model = talkative(seed, vocab_size=6)
        likely = {
            words: log_likelihood(model, batch, list(words), ended=n < 3)
            for n in range(4)
            for words in product((3, 4, 5), repeat=n)
        }
        (found,) = generate(model, batch, max_tokens=3, strategy="beam", beams=64)
        assert tuple(found) == max(likely, key=likely.__getitem__)
        lengths.add(len(found))
    assert lengths >= {0, 1, 3}, "only texts of one length were tried"


def test_one_beam_is_greedy_and_more_find_likelier_texts():
    better = worse = 0  # four beams may lose what greedy finds, but seldom
    for seed in range(12):
        model = talkative(seed)
        texts = {}
        for beams in (1, 4):
            texts[beams] = generate(model, batch_of(), max_tokens=6, strategy="beam", beams=beams)
        greedy = generate(model, batch_of(), max_tokens=6)
        assert texts[1] == greedy
        one = alone(batch_of(), 0)
        by_beam, by_greedy = (log_likelihood(model, one, t[0], ended=len(t[0]) < 6) for t in (texts[4], greedy))
        better += by_beam > by_greedy + 1e-4
        worse += by_beam < by_greedy - 1e-4
    assert better >= 3 * max(1, worse)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_tokens_end_a_text_and_are_not_part_of_it(strategy):
    model, batch = talkative(), batch_of()
    free = generate(model, batch, max_tokens=12, strategy=strategy, seed=0)
    stop = free[0][2]
    stopped = generate(model, batch, max_tokens=12, strategy=strategy, seed=0, stop=[stop])
    assert all(stop not in text for text in stopped)
    if strategy != "beam":  # whose best text may be another one
        cut = [text[: text.index(stop)] if stop in text else text for text in free]
        assert stopped[0] == cut[0]
        assert strategy == "sample" or stopped == cut


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ends_by_itself_and_never_says_pad_or_start(strategy):
    model, batch = talkative(), batch_of()
    with torch.no_grad():
        model.text.bias[[0, 1]] = 100.0
        texts = generate(model, batch, max_tokens=12, strategy=strategy, seed=0)
        assert not {0, 1, 2} & {token for text in texts for token in text}
        assert all(len(text) <= 12 for text in texts)
        model.text.bias[2] = 100.0
    assert generate(model, batch, max_tokens=12, strategy=strategy, seed=0) == [[]] * 4


def test_a_seed_repeats_and_the_default_generator_does_too():
    model, batch = talkative(), batch_of()
    draw = lambda seed: generate(model, batch, max_tokens=12, strategy="sample", seed=seed)  # noqa: E731
    assert draw(0) == draw(0) != draw(1)
    texts = []
    for _ in range(2):
        torch.manual_seed(5)
        texts.append(draw(None))
    assert texts[0] == texts[1]


def test_sampling_narrowed_to_one_token_is_greedy():
    model, batch = talkative(), batch_of()
    greedy = generate(model, batch, max_tokens=12)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        assert generate(model, batch, max_tokens=12, strategy="sample", seed=0, **options) == greedy, options


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}]
)
def test_tokens_are_drawn_as_often_as_the_options_say(options):
    model, one, draws = talkative(), alone(batch_of(), 0), 4000
    memory, lengths = model.encode(one.images, None, one.prompts, None)
    logits = model.logits(model.decode(memory, lengths, torch.tensor([[1]])))[0, 0].detach()
    logits[[0, 1]] = -torch.inf
    p = (logits / options.get("temperature", 1.0)).softmax(-1)
    if "top_k" in options:
        p[p < p.sort().values[-options["top_k"]]] = 0
        p /= p.sum()
    if "top_p" in options:
        order = p.argsort(descending=True).tolist()
        kept, mass = [], 0.0
        while mass < options["top_p"]:
            kept.append(order[len(kept)])
            mass += p[kept[-1]].item()
        p[[i for i in order if i not in kept]] = 0
        p /= p.sum()
    many = Batch(images=one.images.expand(draws, -1, -1, -1), prompts=one.prompts.expand(draws, -1))
    texts = generate(model, many, max_tokens=1, strategy="sample", seed=0, **options)
    drawn = torch.bincount(torch.tensor([text[0] if text else 2 for text in texts]), minlength=20) / draws
    assert (drawn[p == 0] == 0).all()
    assert (drawn - p).abs().max() < 5 * 0.5 / draws**0.5


def test_leaves_the_model_as_it_was():
    model, batch = tiny(dropout=0.5), batch_of()
    assert generate(model, batch, max_tokens=12) == generate(model, batch, max_tokens=12)
    assert model.training
    assert generate(model.eval(), batch, max_tokens=1)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    model.train()
    with pytest.raises(ValueError, match="images, tokens"):
        generate(model, Batch(), max_tokens=1)
    assert model.training


def test_runs_under_autocast():
    model, batch = talkative(encoding="learned"), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        for strategy in STRATEGIES:
            assert len(generate(model, batch, max_tokens=5, strategy=strategy, seed=0)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy: expected one of greedy, sample, beam, got 'best'"),
        ({"max_tokens": 13}, "max_tokens: expected 1..12, as config.max_tokens, got 13"),
        ({"max_tokens": 0}, "max_tokens: expected 1..12"),
        ({"temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 1.5}, r"top_p: expected a number in \(0, 1\], got 1.5"),
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"stop": [20]}, "stop: expected tokens below vocab_size 20"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), batch_of(), **{"max_tokens": 5, **options})
