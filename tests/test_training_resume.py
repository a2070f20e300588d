"""What a run depends on is what it was when the run goes on, and a folder has one run at a time."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from training_cases import CONFIG, ask, configuration, draw_shapes, refused, trainer

from mmkern.training import checkpoints, files
from mmkern.training.checkpoints import CheckpointError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data, a configuration and a run of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    draw_shapes(folder / "shapes", 30)
    (folder / "config.toml").write_text(CONFIG.format(steps=4))
    from mmkern import cli

    with pytest.raises(SystemExit) as done:
        cli.main(["train", str(folder / "config.toml"), "--output", str(folder / "run")])
    assert done.value.code == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    """The same in a folder of its own, to be edited."""
    shutil.copytree(trained, tmp_path / "copy")
    config = tmp_path / "copy/run/config.json"
    config.write_text(config.read_text().replace(str(trained), str(tmp_path / "copy")))
    return tmp_path / "copy"


def edit_rows(folder, **changes):
    """Rows of the table with other values: name="was>is"."""
    table = folder / "shapes/table.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row in rows:
        for name, change in changes.items():
            was, now = change.split(">")
            if row.get(name) == was:
                row[name] = now
    table.write_text("\n".join(map(json.dumps, rows)))


def test_a_run_goes_on_where_its_data_lie_now(copy, capsys):
    assert ask(capsys, "train", "--output", copy / "run", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"label": "green>lime"}, "classes[1] was 'green', is 'lime'"),
        ({"label": "red>aardvark"}, "classes[0] was 'blue', is 'aardvark'"),
        ({"prompt": "colour>which colour"}, "class_prompt was 'colour', is 'which colour'"),
        ({"prompt": "name>what is it"}, "data.test_prompt was '"),
        ({"text": "blue disc>blue circle"}, "data.t"),
        ({"group": "name>words"}, "data.test_group was '"),
        ({"split": "validation>train"}, "was trained on 36 samples, the data now have 48"),
    ],
)
def test_edited_data_are_refused_with_the_difference(copy, capsys, changes, line):
    edit_rows(copy, **changes)
    assert line in refused(capsys, "train", "--output", copy / "run", "--resume")


def test_an_edited_picture_seed_or_teacher_is_refused(copy, capsys, tmp_path):
    run = copy / "run"
    with Image.open(copy / "shapes/0.png") as image:
        image.transpose(Image.Transpose.ROTATE_180).save(copy / "shapes/0.png")
    assert "data.train_image was '" in refused(capsys, "train", "--output", run, "--resume")
    draw_shapes(tmp_path / "shapes", 30)
    shutil.copy(tmp_path / "shapes/0.png", copy / "shapes/0.png")
    whole = (run / "config.json").read_text()
    (run / "config.json").write_text(whole.replace('"learning_rate": 0.005', '"learning_rate": 0.006'))
    assert "run.training.learning_rate was 0.005, is 0.006" in refused(capsys, "train", "--output", run, "--resume")
    (run / "config.json").write_text(whole[: len(whole) // 2])
    assert "config.json: is no JSON" in refused(capsys, "train", "--output", run, "--resume")
    student = trainer(tmp_path / "student", teacher=trainer(tmp_path / "teacher").model)
    student.run()
    checkpoint = checkpoints.last_good(tmp_path / "student/checkpoints")[0]
    other = trainer(tmp_path / "teacher")
    torch.nn.init.ones_(other.model.modality)
    with pytest.raises(CheckpointError, match=r"data.teacher was '\w{16}', is '"):
        trainer(tmp_path / "student", teacher=other.model).restore(checkpoint)


def test_a_folder_has_one_run_at_a_time(copy, capsys):
    """Another process holds the folder; what is in it stays as it is, and its end lets go, a kill as well."""
    hold = "import sys; from pathlib import Path; from mmkern.training import files\n"
    hold += "with files.alone(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(copy / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    before = {p: p.read_bytes() for p in (copy / "run").rglob("*") if p.is_file()}
    for arguments in (["--resume"], [copy / "config.toml"]):
        line = refused(capsys, "train", "--output", copy / "run", *arguments)
        assert line.endswith("run: another process is training in this folder")
    assert {p: p.read_bytes() for p in (copy / "run").rglob("*") if p.is_file()} == before
    process.kill()
    process.communicate()
    assert ask(capsys, "train", "--output", copy / "run", "--resume")[0] == 0


def resealed(path: Path, name: str, content: bytes | None, manifest=lambda found: None) -> None:
    """Puts a file into a checkpoint with a manifest that fits; None: only the manifest is edited."""
    found = json.loads((path / "manifest.json").read_bytes())
    if content is not None:
        (path / name).write_bytes(content)
        found["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest(found)
    rest = {key: value for key, value in found.items() if key != "sha256"}
    sealed = rest | {"sha256": hashlib.sha256(checkpoints._json(rest)).hexdigest()}
    (path / "manifest.json").write_bytes(checkpoints._json(sealed))


def json_edits(original):
    """Contents of config.json that no run writes, and what is said of them."""
    text = original.decode()
    found = json.loads(text)

    def with_(*keys, value):
        changed = json.loads(text)
        place = changed
        for key in keys[:-1]:
            place = place[key]
        if value is None:
            del place[keys[-1]]
        else:
            place[keys[-1]] = value
        return json.dumps(changed).encode()

    return [
        (original[:100], "is no JSON"),
        (b"[" * 100000, "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[]", "expected an object, got a list"),
        (b"{}", "run: field required"),
        (with_("model", value=None), "model: field required"),
        (with_("classes", value=None), "classes: field required"),
        (with_("class_prompt", value=3), "class_prompt: input should be a valid string"),
        (with_("classes", value=[1, 2, 3]), "classes.0: input should be a valid string"),
        (with_("classes", value=["red"]), "names 1 classes, the model has 3"),
        (with_("model", "width", value="wide"), "model.width: input should be a valid integer"),
        (with_("model", "width", value=10**9), "model.width: expected at most"),
        (
            with_("model", "width", value=found["model"]["width"] * 2),
            "has (3, 32) float32 for class_head.weight, expected (3, 64)",
        ),
        (with_("model", "depth", value=3), "unknown key model.depth"),
        (with_("model", "heads", value=None), "model.heads: field required"),
        (with_("model", "image_stem", value="resnet"), "has "),
        (with_("model", "vocab_size", value=100), "for text.bias, expected (100,)"),
        (with_("run", "training", "steps", value=-1), "run.training.steps: input should be greater"),
        (with_("run", "training", value=[]), "run.training: input should be"),
    ]


def test_edited_settings_with_the_right_hash_are_refused_by_name(copy, capsys):
    path = checkpoints.newest(copy / "run/checkpoints")
    edits = json_edits((path / "config.json").read_bytes())
    for content, line in edits:
        resealed(path, "config.json", content)
        said = refused(capsys, "evaluate", copy / "run")
        assert str(path) in said, said
        assert line in said
    resealed(path, "config.json", None, lambda found: found["files"].pop("config.json"))
    assert "config.json" in refused(capsys, "evaluate", copy / "run")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"{}", "tokenizer.json: is no tokenizer"),
        (b"\xff", "tokenizer.json is no JSON"),
        (b"[" * 100000, "tokenizer.json: is no tokenizer"),
        (b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 7000}, "unk_token": "a"}}', "token 7000"),
    ],
)
def test_an_edited_tokenizer_with_the_right_hash_is_refused(copy, capsys, content, line):
    path = checkpoints.newest(copy / "run/checkpoints")
    resealed(path, "tokenizer.json", content)
    said = refused(capsys, "generate", copy / "run", "--prompt", "name")
    assert str(path) in said
    assert line in said


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"step": "7"}, "step: input should be a valid integer"),
        ({"step": -1}, "step: input should be greater"),
        ({"score": "high"}, "score: input should be a valid number"),
        ({"progress": []}, "progress: input should be a valid dictionary"),
        ({"files": {"/dev/zero": {"bytes": 1, "sha256": ""}}}, "files./dev/zero"),
        ({"files": {"../config.json": {"bytes": 1, "sha256": ""}}}, "files.../config.json"),
        ({"files": {"model.safetensors": {"bytes": 2**60, "sha256": ""}}}, "files.model.safetensors.bytes"),
        ({"files": {"model.safetensors": 3}}, "files.model.safetensors: input should be"),
        ({"more": 1}, "unknown key more"),
        ({"files": {}}, "config.json"),
    ],
)
def test_an_edited_manifest_with_the_right_hash_is_refused(trained, tmp_path, change, line):
    path = Path(shutil.copytree(checkpoints.newest(trained / "run/checkpoints"), tmp_path / "step-1"))
    resealed(path, "", None, lambda found: found.update(change))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(path)
    assert str(path) in str(caught.value)
    assert line in str(caught.value)


def test_pipes_devices_and_huge_files_are_not_read(trained, tmp_path):
    import os

    path = Path(shutil.copytree(checkpoints.newest(trained / "run/checkpoints"), tmp_path / "step-1"))
    for name in ("manifest.json", "config.json", "model.safetensors"):
        whole = (path / name).read_bytes()
        for make in (os.mkfifo, lambda p: os.symlink("/dev/zero", p)):
            (path / name).unlink()
            make(path / name)
            with pytest.raises(CheckpointError, match=rf"{name}.*cannot be read \(is no regular file"):
                checkpoints.load(path)
        (path / name).unlink()
        with (path / name).open("wb") as file:
            file.truncate(1 << 40)  # sparse
        with pytest.raises(CheckpointError, match=rf"{name}.*has 1099511627776 bytes"):
            checkpoints.load(path)
        (path / name).write_bytes(whole)
    resealed(path, "", None, lambda found: found["files"]["config.json"].update(bytes=files.JSON + 1))
    with (path / "config.json").open("r+b") as file:
        file.truncate(files.JSON + 1)
    with pytest.raises(CheckpointError, match=r"config.json: has \d+ bytes, of which at most"):
        checkpoints.load(path)


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("model", {"modality": torch.full((2, 16), torch.nan)}, "a value of modality that is not finite"),
        (
            "model",
            {"modality": torch.zeros(2, 16).double()},
            r"has \(2, 16\) float64 for modality, expected \(2, 16\) float32",
        ),
        ("model", {"extra": torch.zeros(1)}, r"has \(1,\) float32 for extra, expected nothing"),
        ("optimizer", {"0.exp_avg_sq": None}, r"optimizer: has nothing for 0.exp_avg_sq, expected \(\d+"),
        (
            "optimizer",
            {"0.exp_avg": torch.tensor(1.0)},
            r"optimizer: has \(\) float32 for 0.exp_avg, expected \(\d+",
        ),
        (
            "optimizer",
            {"0.step": torch.tensor(1)},
            r"optimizer: has \(\) int64 for 0.step, expected \(\) float32",
        ),
        ("optimizer", {"x.step": torch.tensor(1.0)}, r"optimizer: has \(\) float32 for x.step, expected nothing"),
        ("random", {"0.cpu": None}, "random.safetensors: holds no state"),
        ("random", {"0.cpu": torch.zeros(3, dtype=torch.uint8)}, "random.safetensors: holds no state"),
        ("random", {"0.cpu": torch.zeros(5056)}, "random.safetensors: holds no state"),
        ("progress", {"rate": "fast"}, "manifest.json: progress: rate: input should be a valid number"),
        ("progress", {"samples": None}, "manifest.json: progress: samples: field required"),
        ("progress", {"plateau": {}}, "manifest.json: progress: plateau.best: field required"),
        ("progress", {"patience": 3}, "manifest.json: progress: patience: input should be"),
    ],
)
def test_an_edited_state_with_the_right_hash_is_refused(tmp_path, name, change, line):
    config = configuration(steps=1)
    trainer(tmp_path, config).run()
    path = checkpoints.newest(tmp_path / "checkpoints")

    def edited(found):
        return {k: v for k, v in (found | change).items() if v is not None}

    if name == "progress":
        resealed(path, "", None, lambda found: found.update(progress=edited(found["progress"])))
    else:
        tensors = edited(checkpoints.load(path).tensors(name))
        resealed(path, f"{name}.safetensors", safetensors.torch.save(tensors))
    with pytest.raises(CheckpointError, match=line) as caught:
        trainer(tmp_path / "again", config).restore(checkpoints.load(path))
    assert str(path) in str(caught.value)
