"""What a stranger may have written: each bad configuration, table, picture and name is one line before work starts."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
import torch
import typer
from PIL import Image
from training_cases import CONFIG, ask, draw_shapes, refused

from mmkern.console import keep_caches
from mmkern.training import console, pictures, records, run_page
from mmkern.training.config import ConfigError, parse, read
from mmkern.training.files import DataError


@pytest.mark.parametrize(
    ("section", "name", "value", "line"),
    [
        ("data", "vocabulary", 1e12, "input should be less than or equal to 1048576"),
        ("data", "workers", 10**6, "input should be less than or equal to 256"),
        ("data", "limit", 10**30, "input should be less than or equal to 1000000000"),
        ("data", "seed", 2**64, "input should be less than or equal to 9007199254740992"),
        ("data", "source", "\udcff", "'utf-8' codec can't encode"),
        ("training", "seed", 2**63, "input should be less than or equal to 9007199254740992"),
        ("training", "seed", -(2**60), "input should be greater than or equal to -9007199254740992"),
        ("training", "betas", [0.9, 1.0], "input should be less than 1"),
        ("training", "betas", [-0.1, 0.9], "input should be greater than or equal to 0"),
        ("training", "steps", 10**400, "input should be less than or equal to 1000000000"),
        ("training", "steps", 0, "input should be greater than or equal to 1"),
        ("training", "batch_size", 10**12, "input should be less than or equal to 65536"),
        ("training", "learning_rate", float("inf"), "input should be a finite number"),
        ("training", "learning_rate", 10**400, "input should be a valid number"),
        ("training", "temperature", 1e-300, "input should be greater than or equal to 0.001"),
        ("training", "weights", {"text": -1}, "input should be greater than or equal to 0"),
        ("model", "width", 10**9, "expected at most 16384"),
        ("model", "encoder_layers", 10**9, "expected at most 256"),
        ("model", "image_size", 10**6, "expected at most 2048"),
        ("model", "max_tokens", 10**12, "expected at most 65536"),
        ("model", "mlp_ratio", 1e30, "expected at most 64.0"),
        ("model", "dropout", float("nan"), "input should be a finite number"),
    ],
)
def test_every_number_has_a_limit(section, name, value, line):
    with pytest.raises(ConfigError) as caught:
        parse({section: {name: value}})
    said = str(caught.value)
    assert said.startswith(f"configuration: {section}.{name}")
    assert line in said
    assert len(said) < 200


def test_each_size_may_be_allowed_and_all_together_too_large():
    with pytest.raises(ConfigError, match=r"model.width: with these layers and tokens expected at most 4294967296"):
        parse({"model": {"width": 16384, "encoder_layers": 200}})


def test_deep_settings_pipes_and_devices_are_one_line(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(f"[data]\ntasks = {'[' * 5000}{']' * 5000}")
    with pytest.raises(ConfigError, match=r"c.toml: is no TOML that can be read: it is nested too deeply"):
        read(file)
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        file.unlink()
        make(file)
        with pytest.raises(ConfigError, match=r"c.toml: cannot be read \(is no regular file\)"):
            read(file)
    file.unlink()
    file.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match=r"c.toml: cannot be read \(has 1048577 bytes, of which at most 1048576"):
        read(file)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    draw_shapes(folder / "shapes", 10)
    (folder / "config.toml").write_text(CONFIG.format(steps=2))
    Image.new("RGB", (8, 8)).save(folder / "outside.png")
    return folder


@pytest.fixture
def folder(shapes, tmp_path):
    return shutil.copytree(shapes, tmp_path / "input")


def rows(folder, edit):
    table = folder / "shapes/table.jsonl"
    found = [json.loads(line) for line in table.read_text().splitlines()]
    for row in found:
        edit(row)
    table.write_text("\n".join(map(json.dumps, found)))


def first(**changes):
    return lambda folder: rows(folder, lambda row: row.update(changes) if row["image"] == "0.png" else None)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width=4, height=4, more=b""):
    content = zlib.compress(b"".join(b"\0" + b"\x10" * 3 * 4 for _ in range(4)))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def as_picture(make):
    """0.png is made anew: by content, or by a function of its path."""

    def edit(folder):
        path = folder / "shapes/0.png"
        path.unlink()
        path.write_bytes(make) if isinstance(make, bytes) else make(path)

    return edit


def as_table(content):
    return lambda folder: (folder / "shapes/table.jsonl").write_bytes(content)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
BOMB = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000)))
BOMBS = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(70))


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (as_picture(lambda path: Image.new("RGB", (1, 65000)).save(path)), "0.png: is 1 x 65000; one side may be 50"),
        (as_picture(png(10**5, 10**5)), "0.png: has more pixels than Pillow's limit"),
        (as_picture(png(10**4, 10**4)), "0.png: has more pixels than Pillow's limit"),
        (as_picture(png(more=BOMB)), "0.png: is a broken picture (Decompressed data too large"),
        (as_picture(png(more=BOMBS)), "0.png: is a broken picture (Too much memory used in text chunks"),
        (as_picture(EPS), "0.png: is no picture that Pillow can read as AVIF"),
        (as_picture(os.mkfifo), "0.png: is no regular file"),
        (as_picture(lambda path: os.symlink("/dev/zero", path)), "0.png is outside the folder"),
        (as_picture(lambda path: os.symlink(path.parents[1] / "outside.png", path)), "0.png is outside the folder"),
        (first(image="../outside.png"), "line 1: "),
        (first(image="../shapes/../outside.png"), "outside.png is outside the folder; data.allow_outside = true"),
        (lambda folder: first(image=str(folder / "outside.png"))(folder), "outside.png is outside the folder"),
        (first(image="a\0b"), "line 1: no picture a"),
        (first(prompt="a\ud800"), r"line 1: prompt: is no Unicode text, it has half a surrogate pair: 'a\ud800'"),
        (first(group="\udfff"), "line 1: group: is no Unicode text"),
        (first(prompt={"a": 1}), "line 1: prompt: expected a text, got a dict"),
        (as_table(b'{"prompt":' + b"[" * 5000 + b"]" * 5000 + b"}"), "line 1: is nested too deeply"),
        (as_table(b'{"prompt":' + b"1" * 5000 + b"}"), "line 1: Exceeds the limit"),
        (as_table(b'{"prompt": "cut'), "line 1: Unterminated string"),
        (lambda folder: rows(folder, lambda row: "label" in row and row.update(label="red")), "every label is 'red'"),
        (
            as_table(b"\n".join(b'{"prompt": "x", "label": "%d", "split": "train"}' % i for i in range(4097))),
            "has 4097 classes, 4096 at most",
        ),
    ],
)
def test_data_that_training_cannot_use_are_one_line(folder, capsys, edit, line):
    edit(folder)
    said = refused(capsys, "train", folder / "config.toml", "--output", folder / "run")
    assert line in said
    assert not (folder / "run/config.json").exists()


def test_pictures_outside_the_folder_are_read_where_that_is_allowed(folder, capsys):
    first(image="../outside.png")(folder)
    text = (folder / "config.toml").read_text().replace("[data]", "[data]\nallow_outside = true")
    (folder / "config.toml").write_text(text)
    assert ask(capsys, "train", folder / "config.toml", "--output", folder / "run")[0] == 0


def test_a_table_that_lies_elsewhere_or_is_a_pipe(folder, capsys):
    table = folder / "shapes/table.jsonl"
    table.rename(folder / "table.jsonl")
    os.symlink(folder / "table.jsonl", table)
    command = ("train", folder / "config.toml", "--output", folder / "run")
    assert "table.jsonl is outside the folder" in refused(capsys, *command)
    table.unlink()
    os.mkfifo(table)
    assert "table.jsonl: is no regular file" in refused(capsys, *command)


def test_a_model_without_pictures_is_not_given_any(folder, capsys):
    text = (folder / "config.toml").read_text().replace("image_size = 24", "image_size = 0")
    (folder / "config.toml").write_text(text)
    said = refused(capsys, "train", folder / "config.toml", "--output", folder / "run")
    assert "model.image_size: 0, but" in said


@pytest.mark.parametrize(
    ("name", "make", "line"),
    [
        ("v.txt", os.mkfifo, "v.txt: is no regular file"),
        ("v.bin", lambda path: os.symlink("/dev/zero", path), "v.bin: is no regular file"),
        ("v.bin", lambda path: path.write_bytes(b"1 99999999\nred "), "has 99999999 channels; at most 16384"),
        ("v.bin", lambda path: path.write_bytes(b"1 0\nred "), "has 0 channels"),
        ("v.txt", lambda path: path.write_bytes(b"red" + b" 1" * 20000), "word 1 has 20000 channels"),
        ("v.npy", lambda path: path.write_bytes(b"PK\3\4"), "v.npy: is no array of numbers"),
        ("v.npy", os.mkfifo, "v.npy: is no regular file"),
    ],
)
def test_word_vectors_that_are_none(folder, capsys, name, make, line):
    (folder / "v.vocab").write_text("red\n")
    make(folder / name)
    text = (folder / "config.toml").read_text().replace("[data]", f'[data]\nword_vectors = "{name}"')
    (folder / "config.toml").write_text(text)
    assert line in refused(capsys, "train", folder / "config.toml", "--output", folder / "run")


def test_a_long_picture_is_scaled_before_it_is_made_square():
    image = Image.new("RGB", (9000, 200), "red")
    found = pictures.square(image, 90)
    assert [tuple(found[:, y, 45].tolist()) for y in (0, 43, 44, 45, 46, 89)] == [
        (255, 255, 255), (255, 255, 255), (255, 0, 0), (255, 0, 0), (255, 255, 255), (255, 255, 255),
    ]  # fmt: skip


NAMES = [
    "[/x]",
    "$\\frac{$",
    "_hidden",
    ":red_car:",
    "--><script>alert(1)</script>",
    "a: most frequent",
    "na\u00efve \u2603",
]


def test_names_that_look_like_markup_are_shown_as_they_are(folder, capsys):
    """Classes, groups, prompts and the run's folder, through the terminal, the curves, the page and TensorBoard."""
    labels = dict(zip(("red", "green", "blue"), NAMES, strict=False))
    rows(folder, lambda row: row.update({"label": labels[row["label"]]} if "label" in row else {}))
    names = iter(NAMES * 10)
    tested = ("1.png", "2.png", "3.png", "4.png")
    rows(folder, lambda row: row.update(split="test" if row["image"] in tested else "train"))
    rows(folder, lambda row: row.update(group=next(names), prompt=NAMES[0]))
    output = folder / "[/x] $\\frac{$ :red_car:"
    code, out, err = ask(capsys, "train", folder / "config.toml", "--output", output)
    assert code == 0, err
    assert f"written: {output} " in out
    for name in NAMES:
        assert any(line.startswith(f" {name[:10]}") for line in out.splitlines()), name
    page = (output / "page.html").read_text("utf-8")
    assert "<script>" not in page
    assert "mmkern: x] $\\frac{$ :red_car:</title>" in page  # the folder's last part
    assert json.loads((output / "test.json").read_text())["test"].keys() == {*NAMES}
    code, out, _ = ask(capsys, "classify", output, folder / "shapes/0.png", "--top", "3")
    assert code == 0
    assert all(label in out for label in labels.values())
    code, out, _ = ask(capsys, "evaluate", output)
    assert code == 0
    assert " [/x] " in out


def test_curves_show_any_name(tmp_path):
    lines = [{"step": 1, "split": "train", "loss": 1.0}]
    lines += [{"step": 1, "split": "validation", "score": 1.0, **{f"{name}/accuracy": 0.5 for name in NAMES}}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = run_page.curves(records.read(tmp_path))
    assert "<script>" not in drawn.split("<svg")[1].replace("<!-- accuracy of - -><script>", "")
    for name in ("[/x]", "$\\frac{$", "_hidden", ":red_car:"):
        assert f"<!-- accuracy of {name} -->" in drawn  # the text that the glyphs after it draw


def test_a_prompt_that_is_no_text_and_numbers_beyond_their_range(folder, capsys):
    assert ask(capsys, "train", folder / "config.toml", "--output", folder / "run")[0] == 0
    run = folder / "run"
    assert "--prompt: is no Unicode text" in refused(capsys, "generate", run, "--prompt", "\udcff")
    assert "--prompt: is no Unicode text" in refused(
        capsys, "classify", run, folder / "outside.png", "--prompt", "\udcff"
    )
    assert "--seed" in refused(capsys, "generate", run, "--prompt", "x", "--seed", 2**70)
    assert "--beams" in refused(capsys, "generate", run, "--prompt", "x", "--strategy", "beam", "--beams", 10**9)
    assert "training.seed" in refused(
        capsys, "train", folder / "config.toml", "--output", folder / "r2", "--seed", 2**70
    )
    assert ask(capsys, "generate", run, "--prompt", "x", "--strategy", "sample", "--temperature", "1e-320")[0] == 0
    fifo = folder / "fifo.png"
    os.mkfifo(fifo)
    (folder / "x.eps").write_bytes(EPS)
    assert "fifo.png: is no regular file" in refused(capsys, "classify", run, fifo)
    assert "x.eps: is no picture" in refused(capsys, "generate", run, "--image", folder / "x.eps")
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    shutil.copy(folder / "outside.png", odd)
    assert ask(capsys, "classify", run, odd)[1].startswith(str(folder))
    assert "--output: is no Unicode text" in refused(capsys, "train", folder / "config.toml", "--output", odd + "x")


def test_every_format_that_is_named_is_read(tmp_path):
    image = Image.new("RGB", (16, 16), (200, 30, 40))
    Image.init()
    for name in set(pictures.FORMATS) & Image.SAVE.keys():
        image.save(tmp_path / "picture", format=name)
        found = pictures.read(tmp_path / "picture").convert("RGB").getpixel((8, 8))
        assert max(abs(a - b) for a, b in zip(found, (200, 30, 40), strict=True)) < 12, name
    image.save(tmp_path / "picture", format="TGA")
    with pytest.raises(DataError, match="is no picture"):
        pictures.read(tmp_path / "picture")


def test_caches_go_to_the_users_cache_folder(folder, tmp_path, monkeypatch):
    """A first run writes nothing beside its own folder and the cache folder."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG", "MPL", "TORCHINDUCTOR"))}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmkern.cli", "train", "config.toml", "--output", "run"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in home.iterdir()} == {".cache"}
    assert {p.name for p in (home / ".cache").iterdir()} == {"matplotlib", "torchinductor"}
    assert list(temporary.iterdir()) == []
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    keep_caches()
    assert "MPLCONFIGDIR" not in os.environ


def test_a_memory_too_small_is_one_line_and_other_errors_are_not_hidden():
    with pytest.raises(typer.BadParameter, match="the memory is too small for these sizes"), console.one_line():
        torch.empty(1 << 46)  # 256 TiB: more than there are addresses
    with pytest.raises(RuntimeError, match="must match"), console.one_line():
        torch.zeros(2) + torch.zeros(3)
