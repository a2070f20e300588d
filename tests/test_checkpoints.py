"""Checkpoints: what is written is read back to the bit, whatever is not is refused, a kill leaves the last good one."""

import errno
import os
import pickle
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mmkern.training import checkpoints
from mmkern.training.checkpoints import CheckpointError, Snapshot, Writer


def snapshot(step, score=None):
    torch.manual_seed(step)
    model = {"a.weight": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "none": torch.empty(0, 2)}
    tensors = {
        "model": model,
        "optimizer": {"0.step": torch.tensor(float(step))},
        "random": {"torch": torch.get_rng_state()},
    }
    return Snapshot(step, tensors, {"width": 4}, '{"token": "\u00e9"}', {"losses": [0.1, step / 3]}, score)


def same(found, expected):
    for name, tensors in expected.tensors.items():
        read = found.tensors(name)
        assert read.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert read[key].dtype == tensor.dtype
            assert torch.equal(read[key], tensor)
    assert (found.step, found.score, found.progress) == (expected.step, expected.score, expected.progress)
    assert (found.config, found.tokenizer) == (expected.config, expected.tokenizer)


def test_what_is_written_is_read_back_to_the_bit(tmp_path):
    path = checkpoints.save(tmp_path, snapshot(7, 0.25))
    assert path.name == "step-00000007"
    same(checkpoints.load(path), snapshot(7, 0.25))


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step, score in enumerate([0.1, 0.9, None, 0.3, 0.2], start=1):
        checkpoints.save(tmp_path, snapshot(step, score), keep=2)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["2", "4", "5"]
    assert checkpoints.newest(tmp_path).name[-1] == "5"
    assert checkpoints.best(tmp_path).name[-1] == "2"


@pytest.mark.parametrize(
    "file", ["model.safetensors", "random.safetensors", "config.json", "tokenizer.json", "manifest.json"]
)
def test_a_flipped_bit_anywhere_is_refused(tmp_path, file):
    path = checkpoints.save(tmp_path, snapshot(1)) / file
    whole = path.read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 60))
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"{file}: is damaged or foreign") as caught:
            checkpoints.load(path.parent)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    same(checkpoints.load(path.parent), snapshot(1))


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
@pytest.mark.parametrize("left", [0, 1, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, file, left):
    path = checkpoints.save(tmp_path, snapshot(1)) / file
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=file):
        checkpoints.load(path.parent)


def test_a_file_of_another_checkpoint_is_refused(tmp_path):
    one, two = checkpoints.save(tmp_path / "a", snapshot(1)), checkpoints.save(tmp_path / "b", snapshot(2))
    (one / "model.safetensors").write_bytes((two / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged or foreign"):
        checkpoints.load(one)
    (one / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read \(No such file"):
        checkpoints.load(one)


class Trap:
    """Unpickling it writes a file: nobody may."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_a_pickle_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Trap()))
    path = checkpoints.save(tmp_path / "run", snapshot(1))
    for name in ("model.pt", "model.pkl"):
        pickled = (tmp_path / name).read_bytes()
        with pytest.raises(CheckpointError, match="is a pickle, which mmkern never loads"):
            checkpoints.load(tmp_path / name)
        for file in ("model.safetensors", "manifest.json"):
            whole = (path / file).read_bytes()
            (path / file).write_bytes(pickled)
            with pytest.raises(CheckpointError, match=f"{file}: is a pickle, which mmkern never loads"):
                checkpoints.load(path)
            (path / file).write_bytes(whole)
    assert not (tmp_path / "unpickled").exists()


def test_a_pickle_with_the_right_hash_is_refused_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save", lambda tensors: b"XX" + pickle.dumps(sorted(tensors)))
    path = checkpoints.save(tmp_path, snapshot(1))
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a safetensors file"):
        checkpoints.load(path).tensors("model")


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"\xff\xfe", b"[" * 100000, b'{"sha256": ""}'])
def test_a_foreign_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest.json: is damaged or foreign"):
        checkpoints.load(tmp_path)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", "mmkern checkpoint 9")
    path = checkpoints.save(tmp_path, snapshot(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has the format 'mmkern checkpoint 9'"):
        checkpoints.load(path)


def test_no_checkpoint_is_one_line(tmp_path):
    for wrong in (checkpoints.newest, checkpoints.best, checkpoints.last_good):
        with pytest.raises(CheckpointError, match="has no checkpoint"):
            wrong(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: its manifest.json cannot be read"):
        checkpoints.load(tmp_path)


class Killed(BaseException):
    pass


def kill_at(monkeypatch, module, moment):
    """Makes the moment-th call that touches the disk the last one; returns how many there were."""
    calls = [0]

    def counted(function):
        def call(*args, **kw):
            calls[0] += 1
            if calls[0] == moment:
                raise Killed
            return function(*args, **kw)

        return call

    for owner, name in [
        (os, "fsync"),
        (os, "replace"),
        (module.shutil, "rmtree"),
        (module.Path, "mkdir"),
        (module.Path, "rename"),
    ]:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    monkeypatch.setattr("builtins.open", counted(open))
    return calls


def test_a_kill_at_any_disk_operation_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """Each call that touches the disk in turn is the last one; what is there afterwards loads, and a new save works."""
    moment = 0
    while True:
        moment += 1
        folder = tmp_path / str(moment)
        for step, score in [(1, 0.9), (2, 0.1), (3, 0.2)]:
            checkpoints.save(folder, snapshot(step, score))
        with monkeypatch.context() as patch:
            calls = kill_at(patch, checkpoints, moment)
            try:
                checkpoints.save(folder, snapshot(4, 0.3))
            except Killed:
                pass
            else:
                break
        for path in folder.glob("step-*"):
            checkpoints.load(path)  # none is half there
        found, refused = checkpoints.last_good(folder)
        assert refused == []
        assert found.step in (3, 4)
        same(found, snapshot(found.step, found.score))
        assert checkpoints.best(folder).name[-1] == "1"
        checkpoints.save(folder, snapshot(5, 0.4))
        assert [p for p in folder.iterdir() if p.name.startswith(".")] == []
    assert moment > calls[0] > 12


def test_the_last_good_one_is_found_behind_a_damaged_one_and_written_over_it(tmp_path):
    for step in (1, 2):
        path = checkpoints.save(tmp_path, snapshot(step))
    (path / "model.safetensors").write_bytes(b"")
    found, refused = checkpoints.last_good(tmp_path)
    assert found.step == 1
    assert "step-00000002" in str(refused[0])
    checkpoints.save(tmp_path, snapshot(2))
    same(checkpoints.last_good(tmp_path)[0], snapshot(2))


def test_the_writer_writes_beside_the_caller_and_hands_errors_on(tmp_path, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    written = checkpoints.save

    def slow(*args):
        started.set()
        assert go_on.wait(10)
        return written(*args)

    monkeypatch.setattr(checkpoints, "save", slow)
    writer = Writer(tmp_path)
    writer.submit(snapshot(1))
    assert started.wait(10)
    assert not (tmp_path / "step-00000001").exists()  # submit has returned all the same
    go_on.set()
    writer.wait()
    same(checkpoints.load(tmp_path / "step-00000001"), snapshot(1))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save", full)
    writer.submit(snapshot(2))
    with pytest.raises(OSError, match="No space left"):
        writer.submit(snapshot(3))
    writer.wait()


def holding(state):
    """A checkpoint with this state of an optimizer."""
    contents = {"optimizer.safetensors": safetensors.torch.save(state)}
    return checkpoints.Checkpoint(Path("step-1"), 1, None, {}, {}, None, contents)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_restored_optimizer_takes_the_same_steps(kind):
    def steps(weights, optimizer, count):
        for i in range(count):
            optimizer.zero_grad()
            sum((w * w * (i + 1)).sum() for w in weights[:2]).backward()  # the third has no gradient, hence no state
            optimizer.step()

    options = {"lr": 0.01} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    first = [torch.randn(3, 2, requires_grad=True) for _ in range(3)]
    one = kind(first, **options)
    steps(first, one, 3)
    second = [w.detach().clone().requires_grad_() for w in first]
    two = kind(second, **options)
    holding(checkpoints.flattened(one)).restore_optimizer(two)
    for weights, optimizer in ((first, one), (second, two)):
        steps(weights, optimizer, 3)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    state = checkpoints.flattened(one)
    with pytest.raises(CheckpointError, match=r"optimizer: has \(\) float32 for 3.step, expected nothing"):
        holding(state | {"3.step": torch.tensor(1.0)}).restore_optimizer(two)
    name = "0.momentum_buffer" if kind is torch.optim.SGD else "0.exp_avg"
    wrong = rf"optimizer: has \(7,\) float32 for {name}, expected \(3, 2\) float32"
    with pytest.raises(CheckpointError, match=wrong):
        holding(state | {name: torch.zeros(7)}).restore_optimizer(two)
