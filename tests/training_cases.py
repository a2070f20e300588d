"""A problem small enough to be learned within a test: the colour of a picture, as a class and as a word."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from mmkern.model import Batch, MultimodalModel
from mmkern.training import checkpoints
from mmkern.training.config import parse
from mmkern.training.loop import Trainer
from mmkern.training.problem import Problem

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9), "grey": (0.5, 0.5, 0.5)}
VOCABULARY = ["[PAD]", "[START]", "[END]", "[UNK]", "which", "colour", *COLOURS]
SIDE = 12
KILLABLE_STEPS = 600  # more than 20 processes make before they are killed


@dataclass
class Sample:
    image: torch.Tensor
    prompt: str
    text: str | None
    label: int | None
    group: str


def samples(count, seed):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        label = int(torch.randint(len(COLOURS), (), generator=draw))
        name = list(COLOURS)[label]
        colour = torch.tensor(COLOURS[name])[:, None, None]
        image = (colour + 0.2 * torch.randn(3, SIDE, SIDE, generator=draw)).clamp(0, 1)
        named = i % 2
        found.append(Sample(image, "which colour", *((name, None, "name") if named else (None, label, "class"))))
    return found


def collate(chosen, generators):
    image = torch.stack([s.image for s in chosen])
    if generators is not None:
        noise = [torch.randn(3, SIDE, SIDE, generator=generator) for generator in generators]
        image = (image + 0.01 * torch.stack(noise)).clamp(0, 1)
    words = [[VOCABULARY.index(s.text), 2] if s.text else [-100, -100] for s in chosen]
    targets = torch.tensor(words)
    inputs = torch.cat([torch.ones(len(chosen), 1, dtype=torch.long), targets[:, :1].clamp(min=0)], 1)
    labels = torch.tensor([-100 if s.label is None else s.label for s in chosen])
    return Batch(
        images=image, prompts=torch.tensor([[4, 5]] * len(chosen)), inputs=inputs, targets=targets, labels=labels
    )


def problem(count=48):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return Problem(samples(count, 1), samples(16, 2), samples(16, 3), list(COLOURS), tokenizer, collate)


MODEL = {
    "width": 16,
    "heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "image_size": SIDE,
    "image_stem": "patch",
    "patch_size": 6,
    "max_tokens": 8,
}
TRAINING = {"steps": 20, "batch_size": 8, "learning_rate": 0.01, "warmup": 5, "evaluate_every": 5, "device": "cpu"}


def configuration(model=None, **training):
    return parse({"model": MODEL | (model or {}), "data": {"workers": 0}, "training": TRAINING | training})


def built(config, seed=0):
    torch.manual_seed(seed)
    return MultimodalModel(config.model.build(len(VOCABULARY), len(COLOURS), pad=0, start=1, end=2))


def trainer(folder, config=None, **options):
    config = config or configuration()
    folder.mkdir(parents=True, exist_ok=True)
    return Trainer(config, problem(), built(config), folder, **options)


def killable(folder):
    """What a test kills: training, from the last good checkpoint where there is one."""
    torch.set_num_threads(1)
    config = configuration({"dropout": 0.2}, steps=KILLABLE_STEPS, evaluate_every=50, checkpoint_every=2)
    run = trainer(Path(folder), config)
    if list(Path(folder).glob("checkpoints/step-*")):
        found, refused = checkpoints.last_good(Path(folder) / "checkpoints")
        assert refused == []
        run.restore(found)
    run.run()
