"""Writing text: greedily, by sampling, or by beam search."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

import mmkern
from mmkern.model.config import Batch
from mmkern.model.multimodal import DecoderCache, MultimodalModel

STRATEGIES = ("greedy", "sample", "beam")


def generate(
    model: MultimodalModel,
    batch: Batch,
    *,
    max_tokens: int,
    strategy: str = "greedy",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    beams: int = 4,
    stop: Collection[int] = (),
    seed: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """What the model says to each sample's picture and prompt.

    Args:
        model: is run in evaluation mode, without gradients, and put back as it was.
        batch: images and prompts, either of which may be missing in a sample; inputs and targets are not read.
        max_tokens: most tokens to write, at most config.max_tokens.
        strategy: "greedy": the likeliest token each time. "sample": drawn from the model's distribution, as the next
            three change it. "beam": the likeliest text found while `beams` candidates are kept; its score is the sum
            of log-probabilities, that of the end included.
        temperature: divides the logits before sampling; > 0.
        top_k: sample among the k likeliest tokens.
        top_p: then, among the likeliest tokens, as few as together have this probability.
        beams: candidates of beam search, at least 1.
        stop: tokens that end a text, besides config.end.
        seed: of sampling; None: torch's default generator.
        use_cache: keep keys and values from token to token. False computes them anew each time, with the same result.

    Returns:
        Each sample's tokens, without start and without the one that ended it. pad and start are never written.

    Raises:
        ValueError: an unknown strategy, or a number out of range. Those of `MultimodalModel.encode`.

    Source: Holtzman et al. 2020 (top_p).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if not 1 <= max_tokens <= model.config.max_tokens:
        raise ValueError(f"max_tokens: expected 1..{model.config.max_tokens}, as config.max_tokens, got {max_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p}")
    if beams < 1:
        raise ValueError(f"beams: expected at least 1, got {beams}")
    stops = {model.config.end, *stop}
    if not all(0 <= token < model.config.vocab_size for token in stops):
        raise ValueError(f"stop: expected tokens below vocab_size {model.config.vocab_size}, got {sorted(stops)}")
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            memory, lengths = model.encode(batch.images, batch.image_present, batch.prompts, batch.prompt_lengths)
            ends = torch.tensor(sorted(stops), device=memory.device)
            if strategy == "beam":
                tokens = _beam_search(_Writer(model, memory, lengths, beams, use_cache), ends, max_tokens, beams)
            else:
                generator = None if seed is None else torch.Generator(memory.device).manual_seed(seed)
                options = (temperature, top_k, top_p, generator) if strategy == "sample" else None
                tokens = _write(_Writer(model, memory, lengths, 1, use_cache), ends, max_tokens, options)
    finally:
        model.train(training)
    return [_before(row, stops) for row in tokens.tolist()]


def _before(tokens: list[int], stops: Collection[int]) -> list[int]:
    """The tokens before the first that stops."""
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]


class _Writer:
    """The texts so far, (rows, t) with start, of each sample `copies` rows; and what the model says comes next."""

    def __init__(self, model: MultimodalModel, memory: Tensor, lengths: Tensor, copies: int, use_cache: bool) -> None:
        self.model = model
        self.memory, self.lengths = (t.repeat_interleave(copies, 0) for t in (memory, lengths))
        c = model.config
        self.tokens = lengths.new_full((len(self.memory), 1), c.start)
        self.never = sorted({c.pad, c.start} - {c.end})  # they are no words, and no target holds them
        self.cache: DecoderCache | None = model.new_cache() if use_cache else None

    def logits(self) -> Tensor:
        """(rows, V) float32, of the next token."""
        unread = self.tokens if self.cache is None else self.tokens[:, self.cache.length :]
        hidden = self.model.decode(self.memory, self.lengths, unread, self.cache)
        logits = self.model.logits(hidden[:, -1]).float()
        logits[:, self.never] = -torch.inf
        return logits

    def append(self, tokens: Tensor, rows: Tensor | None = None) -> None:
        """tokens (rows,); where `rows` is given, text i goes on from text rows[i]."""
        if rows is not None:
            self.tokens = self.tokens[rows]
            if self.cache is not None:
                self.cache.reorder(rows)
        self.tokens = torch.cat([self.tokens, tokens[:, None]], 1)


_Sampling = tuple[float, int | None, float | None, torch.Generator | None]


def _write(writer: _Writer, ends: Tensor, max_tokens: int, sampling: _Sampling | None) -> Tensor:
    """Texts (B, t), each with whatever comes after its end."""
    done = torch.zeros(len(writer.tokens), dtype=torch.bool, device=ends.device)
    for _ in range(max_tokens):
        logits = writer.logits()
        token = logits.argmax(-1) if sampling is None else _sample(logits, *sampling)
        writer.append(token)
        done |= torch.isin(token, ends)
        if done.all():
            break
    return writer.tokens[:, 1:]


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token (B,) from logits (B, V)."""
    # the largest is 0, so that no quotient overflows: towards 0 the temperature makes sampling greedy
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    p = mmkern.masked_softmax(ordered, keep)
    if top_p is not None:  # a token stays if those before it do not have that probability yet
        p = p.where(p.cumsum(-1) - p < top_p, 0.0)
    place = torch.multinomial(p, 1, generator=generator)
    return order.gather(1, place).squeeze(1)


def _beam_search(writer: _Writer, ends: Tensor, max_tokens: int, beams: int) -> Tensor:
    """The best text (B, t) of each sample, with whatever comes after its end.

    Texts that have ended stay among the candidates, with the score they have. Scores only fall as a text grows, so
    a sample is done when its best candidate has ended.
    """
    device, batch = ends.device, len(writer.tokens) // beams
    first = torch.arange(batch, device=device)[:, None] * beams  # row of each sample's first candidate
    scores = torch.full((batch, beams), -torch.inf, device=device)
    scores[:, 0] = 0.0  # at first all candidates are the same text
    done = torch.zeros(batch, beams, dtype=torch.bool, device=device)
    for _ in range(max_tokens):
        step = mmkern.log_softmax(writer.logits(), dim=-1).view(batch, beams, -1)
        vocabulary = step.shape[-1]
        step = step.masked_fill(done[..., None], -torch.inf)
        step[..., ends[0]] = step[..., ends[0]].where(~done, 0.0)
        scores, chosen = (scores[..., None] + step).flatten(1).topk(beams, dim=-1)
        parent, token = chosen // vocabulary, chosen % vocabulary
        writer.append(token.flatten(), (first + parent).flatten())
        done = done.gather(1, parent) | torch.isin(token, ends)
        if done[:, 0].all():
            break
    return writer.tokens[first[:, 0], 1:]
