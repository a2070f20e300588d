"""A problem small enough to be learned within a test: the colour of a picture, as a class and as a word."""

import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers

from mmkern import cli
from mmkern.model import Batch, MultimodalModel
from mmkern.training import checkpoints
from mmkern.training.config import parse
from mmkern.training.loop import Trainer
from mmkern.training.problem import Problem, Sample

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.1, 0.2, 0.9), "grey": (0.5, 0.5, 0.5)}
VOCABULARY = ["[PAD]", "[START]", "[END]", "[UNK]", "which", "colour", *COLOURS]
SIDE = 12
KILLABLE_STEPS = 600  # more than 20 processes make before they are killed


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


def averaged(folder):
    """A run whose last gradients do not depend on the number of processes."""
    config = configuration({"dropout": 0.0}, steps=8, evaluate_every=4, clip=0.0, optimizer="sgd")
    return trainer(Path(folder), config)


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


# The commands: a folder of drawn shapes, a configuration, and what a command answers.

CONFIG = """
[model]
width = 32
heads = 2
encoder_layers = 1
decoder_layers = 1
image_size = 24
max_tokens = 16
[data]
source = "shapes"
vocabulary = 300
workers = 0
[training]
steps = {steps}
batch_size = 16
learning_rate = 0.005
warmup = 5
evaluate_every = 30
checkpoint_every = 15
"""


def draw_shapes(folder, count=90, extra=""):
    folder.mkdir()
    draw, rows = random.Random(0), []
    for i in range(count):
        colour, round_ = draw.choice(("red", "green", "blue")), draw.random() < 0.5
        image = Image.new("RGB", (24, 24), "white")
        x, y = draw.randrange(4, 10), draw.randrange(4, 10)
        pen = ImageDraw.Draw(image)
        (pen.ellipse if round_ else pen.rectangle)((x, y, x + 10, y + 10), fill=colour)
        image.save(folder / f"{i}.png")
        split = ("train", "train", "train", "test", "validation")[i % 5]
        name = f"{colour} {'disc' if round_ else 'box'}"
        rows.append({"image": f"{i}.png", "prompt": "name", "text": name, "split": split, "group": "name"})
        rows.append(
            {"image": f"{i}.png", "prompt": "colour", "label": colour + extra, "split": split, "group": "colour"}
        )
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))


def ask(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return done.value.code, out, err


def refused(capsys, *arguments):
    """The one line that a wrong command leaves on stderr."""
    code, _, err = ask(capsys, *arguments)
    lines = err.strip().splitlines()
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("mmkern: ")
    return lines[0]
