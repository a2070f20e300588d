"""The commands as a user meets them: a run, what is asked of it, and one clear line for whatever is wrong."""

import json
import pickle
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image, ImageDraw
from training_cases import CONFIG, ask, draw_shapes, refused

from mmkern import cli
from mmkern.nn import MultiheadAttention
from mmkern.training import checkpoints, commands, compress, pictures, records, run_page
from mmkern.training.evaluation import Prediction


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with data, a configuration and a trained run."""
    folder = tmp_path_factory.mktemp("commands")
    draw_shapes(folder / "shapes")
    (folder / "config.toml").write_text(CONFIG.format(steps=120))
    with pytest.raises(SystemExit) as done:
        cli.main(["train", str(folder / "config.toml"), "--output", str(folder / "run")])
    assert done.value.code == 0
    return folder


def test_training_writes_the_run_and_learns(run):
    written = {p.name for p in (run / "run").iterdir()}
    assert written == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "test.json",
        "curves.svg",
        "page.html",
    }
    found = json.loads((run / "run/test.json").read_text())["test"]
    assert found["colour"]["accuracy"] > 0.8
    assert found["name"]["token_f1"] > 0.6
    assert sum(map(sum, found["colour"]["confusion"])) == found["colour"]["samples"] == 18
    baselines = json.loads((run / "run/test.json").read_text())["baselines"]
    assert baselines["nearest picture"]["colour"]["accuracy"] > 0.5 > baselines["most frequent"]["colour"]["accuracy"]
    page = (run / "run/page.html").read_text()
    assert page.count("data:image/png;base64,") == 36
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert page.count("<svg") == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "run/tensorboard"))
    board.Reload()
    losses = [r["loss"] for r in records.read(run / "run") if r["split"] == "train"]
    assert [e.value for e in board.Scalars("train/loss")] == pytest.approx(losses)


def test_evaluate_gives_the_numbers_of_the_run(run, capsys):
    code, out, _ = ask(capsys, "evaluate", run / "run", "--device", "cpu")
    assert code == 0
    found = json.loads((run / "run/test.json").read_text())["test"]
    assert f"{found['colour']['accuracy']:.3f}" in out
    assert f"{found['name']['chrf']:.3f}" in out


def test_evaluate_pruned_and_in_int8_shows_both_sizes(run, capsys):
    code, out, _ = ask(capsys, "evaluate", run / "run", "--prune", "0.3", "--int8")
    assert code == 0
    assert "as trained" in out
    assert "30% pruned + int8" in out
    stored = [float(line.split(" MiB")[0]) for line in out.splitlines() if " MiB" in line]
    assert len(stored) == 2
    assert stored[1] < stored[0]


def test_generate_and_classify_a_picture_of_ones_own(run, capsys, tmp_path):
    image = Image.new("RGBA", (50, 40), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((14, 10, 34, 30), fill="blue")
    image.save(tmp_path / "mine.png")
    code, out, _ = ask(capsys, "generate", run / "run", "--image", tmp_path / "mine.png", "--prompt", "name")
    assert code == 0
    assert "blue" in out
    code, out, _ = ask(capsys, "classify", run / "run", tmp_path / "mine.png", run / "shapes/0.png", "--top", "2")
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith(f"{tmp_path / 'mine.png'}: blue ")
    assert second.count("%") == 2
    drawn = [
        ask(capsys, "generate", run / "run", "--prompt", "name", "--strategy", "sample", "--seed", s)[1]
        for s in "3344567"
    ]
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3]
    assert len(set(drawn)) > 1


def test_an_exported_run_answers_elsewhere_as_here(run, capsys, tmp_path, monkeypatch):
    from onnxruntime import InferenceSession
    from transformers import AutoModel, AutoTokenizer

    folder = tmp_path / "exported"
    assert ask(capsys, "export", run / "run", folder, "--onnx")[0] == 0
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    images = torch.stack([pictures.square(pictures.read(run / f"shapes/{i}.png"), 24) / 255 for i in (0, 1)])
    asked = tokenizer([model.config.class_prompt] * 2, return_tensors="pt")
    with torch.no_grad():
        found = model(images, asked["input_ids"], asked["attention_mask"]).logits
    (elsewhere,) = InferenceSession(folder / "classify.onnx").run(
        None,
        {
            "images": images.numpy(),
            "tokens": asked["input_ids"].numpy(),
            "lengths": asked["attention_mask"].sum(1).numpy(),
        },
    )
    torch.testing.assert_close(torch.from_numpy(elsewhere), found, rtol=1e-4, atol=1e-5)
    said = ask(capsys, "classify", run / "run", run / "shapes/0.png", run / "shapes/1.png", "--top", "1")[1]
    for line, share in zip(said.splitlines(), found.softmax(-1), strict=True):
        assert line.endswith(f": {model.config.id2label[int(share.argmax())]} {share.max():.1%}")
    assert "is not an empty folder" in refused(capsys, "export", run / "run", folder)
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, "export", run / "run", tmp_path / "other", "--onnx")
    assert line == "mmkern: --onnx needs onnx, which is not installed: pip install 'mmkern[onnx]'"


def test_wrong_input_is_one_line(run, capsys, tmp_path):
    broken, half = tmp_path / "broken.png", tmp_path / "half.png"
    broken.write_text("not a picture")
    half.write_bytes((run / "shapes/0.png").read_bytes()[:60])
    known = run / "run"
    assert "no.png: No such file" in refused(capsys, "classify", known, tmp_path / "no.png")
    assert "broken.png: is no picture" in refused(capsys, "classify", known, broken)
    assert "half.png: is a broken picture" in refused(capsys, "generate", known, "--image", half)
    assert "give --image, --prompt" in refused(capsys, "generate", known)
    assert "strategy: expected one of" in refused(capsys, "generate", known, "--prompt", "x", "--strategy", "best")
    assert "no-run: no such folder" in refused(capsys, "evaluate", tmp_path / "no-run")
    assert "is no checkpoint: its manifest.json cannot be read" in refused(capsys, "evaluate", tmp_path)
    assert "--split: expected train" in refused(capsys, "evaluate", known, "--split", "exam")
    assert "share: expected a number in [0, 1)" in refused(capsys, "evaluate", known, "--prune", "1.5")
    (tmp_path / "model.pt").write_bytes(pickle.dumps({}))
    assert "is a pickle, which mmkern never loads" in refused(capsys, "evaluate", tmp_path / "model.pt")
    draw_shapes(tmp_path / "more", 10, extra=" indeed")
    line = refused(capsys, "evaluate", known, "--data", tmp_path / "more")
    assert "knows 3 classes; the data also have" in line
    assert "indeed'" in line


def test_wrong_configurations_are_one_line(run, capsys, tmp_path):
    config = tmp_path / "config.toml"
    assert "config.toml: cannot be read (No such file" in refused(capsys, "train", config)
    for text, line in [
        ("[training]\nstep = 3", "unknown key training.step; did you mean training.steps?"),
        ("[training]\nsteps = 0", "training.steps: input should be greater than or equal to 1, got 0"),
        ("[data]\nsource = 'nowhere'", "nowhere: no such folder"),
        ("[data]\ntasks = []", "no sample to train on"),
        ("[training]\ndevice = 'warp'", "training.device: warp"),
        ("[training]\nteacher = 'nobody'", "nobody: no such folder"),
        ("[model]\nimage_stem = 'vgg99'", "image_stem"),
    ]:
        config.write_text(text)
        assert line in refused(capsys, "train", config, "--output", tmp_path / "out"), text
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/table.csv").write_text("image,label\n")
    draw_shapes(tmp_path / "bad", 20)
    (tmp_path / "bad/0.png").write_text("not a picture")
    for workers in (0, 1):
        config.write_text(f"[data]\nsource = 'bad'\nworkers = {workers}\n[training]\nsteps = 3")
        code, _, err = ask(capsys, "train", config, "--output", tmp_path / f"bad-{workers}")
        assert code == 2
        assert err.splitlines()[-1].startswith(f"mmkern: {tmp_path / 'bad/0.png'}: is no picture")
        assert "Traceback" not in err
    config.write_text("[data]\nsource = 'empty'")
    assert "table.csv: has no rows" in refused(capsys, "train", config, "--output", tmp_path / "out")
    assert "holds a run; go on with --resume" in refused(capsys, "train", "--output", run / "run")
    assert "holds no run" in refused(capsys, "train", "--output", tmp_path / "out", "--resume")
    assert "differs; leave the others out" in refused(
        capsys, "train", "--output", run / "run", "--resume", "--steps", "7"
    )


def test_a_finished_run_resumed_stays_as_it_is_and_a_damaged_checkpoint_is_passed_over(run, capsys, tmp_path):
    draw_shapes(tmp_path / "shapes", 30)
    (tmp_path / "config.toml").write_text(CONFIG.format(steps=45))
    assert ask(capsys, "train", tmp_path / "config.toml", "--output", tmp_path / "run")[0] == 0
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert ask(capsys, "train", "--output", tmp_path / "run", "--resume")[0] == 0
    assert (tmp_path / "run/metrics.jsonl").read_text() == before
    weights = tmp_path / "run/checkpoints/step-00000045/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = ask(capsys, "train", "--output", tmp_path / "run", "--resume")
    assert code == 0
    assert "passed over" in err
    losses = [[r["loss"] for r in records.read(tmp_path / "run") if r["split"] == "train"]]
    losses.append([r["loss"] for r in map(json.loads, before.splitlines()) if r["split"] == "train"])
    assert losses[0] == losses[1]
    for path in (tmp_path / "run/checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: has 0 bytes" in refused(capsys, "evaluate", tmp_path / "run")


def test_a_student_of_another_size_learns_from_a_run(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "LOGGED", 8)
    text = CONFIG.format(steps=20).replace("width = 32", "width = 16").replace('"shapes"', f'"{run / "shapes"}"')
    (tmp_path / "config.toml").write_text(text + f'teacher = "{run / "run"}"\ntemperature = 3.0\n')
    code, _, err = ask(capsys, "train", tmp_path / "config.toml", "--output", tmp_path / "student")
    assert code == 0, err
    first = records.read(tmp_path / "student")[0]
    assert {"text", "class", "distill_text", "distill_class"} <= first.keys()
    told = [line.split(", ") for line in err.splitlines() if line.startswith("training ")]
    curve = [r for r in records.read(tmp_path / "student") if r["split"] == "train"]
    for step, (loss, rate, left) in zip((8, 16, 20), told, strict=True):  # no terminal: a line every so many steps
        assert loss == f"training {step}/20 loss {curve[step - 1]['loss']:.3f}"
        assert rate == f"learning rate {curve[step - 1]['learning_rate']:.2g}"
        assert re.fullmatch(r"0:00:\d\d left", left)
    assert first["loss"] == pytest.approx(sum(first[n] for n in ("text", "class", "distill_text", "distill_class")))
    (tmp_path / "config.toml").write_text(
        (tmp_path / "config.toml").read_text().replace("image_size = 24", "image_size = 32")
    )
    line = refused(capsys, "train", tmp_path / "config.toml", "--output", tmp_path / "other")
    assert "model.image_size: 32, but 24 in" in line


def test_an_interrupted_run_says_how_to_go_on(run, tmp_path):
    command = [sys.executable, "-m", "mmkern.cli", "train", str(run / "config.toml"), "--output", str(tmp_path / "run")]
    command += ["--steps", "100000"]  # it ends when it is told to
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    while not list(tmp_path.glob("run/checkpoints/step-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == f"mmkern: stopped; mmkern train --output {tmp_path / 'run'} --resume goes on"
    assert "Traceback" not in err
    assert checkpoints.last_good(tmp_path / "run/checkpoints")[0].step >= 15


class Reader(torch.nn.Module):
    """Every kind of matrix that a model has, but convolutions."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden = torch.nn.Embedding(10, 64), torch.nn.Linear(64, 64)
        self.attention = MultiheadAttention(64, 2, batch_first=True)

    def forward(self, tokens):
        x = self.hidden(self.words(tokens))
        return self.attention(x, x, x, need_weights=False)[0]


def test_pruning_takes_the_smallest_weights():
    torch.manual_seed(0)
    model = Reader()
    smaller = compress.pruned(model, 0.4)
    whole, kept = (
        torch.cat([w.flatten() for w in (m.hidden.weight, m.attention.in_proj_weight, m.attention.out_proj.weight)])
        for m in (model, smaller)
    )
    assert (kept == 0).float().mean() == pytest.approx(0.4, abs=1e-3)
    assert whole[kept == 0].abs().max() <= whole[kept != 0].abs().min()
    assert torch.equal(kept[kept != 0], whole[kept != 0])
    assert torch.equal(smaller.words.weight, model.words.weight)
    assert compress.size(smaller).zeros > 0.35
    assert compress.size(smaller).packed < 0.9 * compress.size(model).packed


def test_int8_takes_every_matrix_and_stays_close():
    torch.manual_seed(0)
    model, tokens = Reader().eval(), torch.arange(10)[None]
    small = compress.quantized(model)
    expected = model(tokens)
    assert 0 < (small(tokens) - expected).norm() / expected.norm() < 0.05
    kept = [t for _, t in small.named_parameters() if t.dim() == 2 and t.shape[1] > 1]
    assert [t.dtype for t in kept] == [torch.int8, torch.int8]  # embedding, input projections
    weight = small.attention.in_proj_weight
    step = model.attention.in_proj_weight.abs().amax(1, keepdim=True) / 127
    assert ((weight - model.attention.in_proj_weight).abs() <= 0.501 * step).all()
    assert compress.size(small).stored < 0.35 * compress.size(model).stored


def test_the_page_escapes_what_it_shows(tmp_path):
    class Sample:
        image, prompt, text, label, group = None, "<script>alert(1)</script>", "b", None, "g"

    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    confusions = [{"chrf": 0.5, "confusion": [[3, 41], [0, 5]]}, {"confusion": [[77, 0], [0, 0]]}]
    metrics = [("g", "", confusions[0]), ("g", "baseline", confusions[1])]
    page = run_page.write(tmp_path, {"a": "<b>"}, metrics, [Prediction(Sample, text="<i>")], ["<u>", "v"])
    text = page.read_text()
    assert "<script>" not in text
    assert "&lt;i&gt;" in text
    assert "expected: b" in text
    assert "&lt;u&gt;</th>" in text
    assert [count for count in ("3", "41", "5", "77") if f">{count}</td>" in text] == ["3", "41", "5"]
    assert run_page.smoothed([1.0, 1.0, 4.0], keep=0.5) == pytest.approx([1.0, 1.0, (0.25 + 0.5 + 4) / 1.75])
