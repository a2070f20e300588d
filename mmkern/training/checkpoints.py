"""Checkpoints that survive a kill at any moment, and are never loaded when a bit of them is wrong.

A checkpoint is a folder:

    model.safetensors  optimizer.safetensors  random.safetensors  config.json  tokenizer.json  manifest.json

manifest.json holds the step, the score, what else the loop must know, and size and sha256 of each other file and of
itself. The folder is written under a temporary name, every file and then the folder is fsynced, and it is renamed:
it is there whole, or not at all. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mmkern.training import files
from mmkern.training.config import ConfigError, checked

FORMAT = "mmkern checkpoint 1"
MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickle; torch.save's zip


class CheckpointError(Exception):
    """A checkpoint is not there, or is not what was written; one line that names the file."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _File(_Strict):
    bytes: int = Field(ge=0, le=files.TENSORS)
    sha256: str


class _Manifest(_Strict):
    format: str
    step: int = Field(ge=0, le=10**9)
    score: float | None
    progress: dict[str, Any]
    # a plain name: nothing is read that lies elsewhere
    files: dict[Annotated[str, Field(pattern=r"^([a-z]+\.safetensors|config\.json|tokenizer\.json)$")], _File]
    sha256: str


@dataclass
class Snapshot:
    """What a checkpoint is written from; tensors are copies that nobody changes any more."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # "model", "optimizer", "random"
    config: dict[str, Any]
    tokenizer: str | None = None  # its JSON
    progress: dict[str, Any] = field(default_factory=dict)  # JSON
    score: float | None = None  # of an evaluation at this step; higher is better


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; what is read from it has the hash that was written."""

    path: Path
    step: int
    score: float | None
    progress: dict[str, Any]
    config: dict[str, Any]
    tokenizer: str | None
    contents: dict[str, bytes] = field(repr=False)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors.

        Raises:
            CheckpointError: there is no such file, or it is none of safetensors.
        """
        file = f"{name}.safetensors"
        if file not in self.contents:
            raise CheckpointError(f"{self.path}: has no {file}")
        try:
            return safetensors.torch.load(self.contents[file])
        except Exception as error:  # SafetensorError, and what torch says of kinds and sizes it does not know
            raise CheckpointError(f"{self.path / file}: not a safetensors file ({error})") from None


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory that share no storage, as safetensors wants them."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def flattened(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as "index.key" tensors; learning rates and the like are the configuration's."""
    state = optimizer.state_dict()["state"]
    return copied({f"{i}.{key}": torch.as_tensor(v) for i, values in state.items() for key, v in values.items()})


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts `flattened` tensors back.

    Raises:
        CheckpointError: a tensor belongs to no parameter, is not of its parameter's shape and kind, or is missing.
    """
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise CheckpointError(f"optimizer: {name} belongs to none of {len(parameters)} parameters")
        expected = torch.empty(()) if key == "step" else parameters[int(index)]
        if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
            same = tensor.shape == expected.shape
            has, wants = (t.dtype if same else tuple(t.shape) for t in (tensor, expected))
            raise CheckpointError(f"optimizer: {name} is {has}, its parameter {wants}")
        state.setdefault(int(index), {})[key] = tensor
    for i, found in state.items():
        if found.keys() != names:
            raise CheckpointError(f"optimizer: has {sorted(found)} of parameter {i}, expected {sorted(names)}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(folder: Path, snapshot: Snapshot, keep: int = 2) -> Path:
    """Writes a checkpoint into `folder`, then removes those that are neither among the last `keep` nor the best.

    Raises:
        OSError: the disk is full, or the folder cannot be written; the checkpoints that were there are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {f"{name}.safetensors": safetensors.torch.save(ts) for name, ts in snapshot.tensors.items()}
    contents["config.json"] = _json(snapshot.config)
    if snapshot.tokenizer is not None:
        contents["tokenizer.json"] = snapshot.tokenizer.encode()
    manifest = {
        "format": FORMAT,
        "step": snapshot.step,
        "score": snapshot.score,
        "progress": snapshot.progress,
        "files": {name: {"bytes": len(b), "sha256": _sha256(b)} for name, b in contents.items()},
    }
    contents[MANIFEST] = _json(manifest | {"sha256": _sha256(_json(manifest))})
    target = folder / f"step-{snapshot.step:08d}"
    partial = folder / f"{_PARTIAL}{target.name}-{os.getpid()}"
    _remove(partial)
    partial.mkdir()
    for name, content in contents.items():
        with open(partial / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync(partial)
    if target.exists():  # of a run that went on from an older checkpoint, or a damaged one
        os.replace(target, aside := folder / f"{_PARTIAL}replaced-{target.name}-{os.getpid()}")
        os.replace(partial, target)
        _remove(aside)
    else:
        os.replace(partial, target)
    _sync(folder)
    _sweep(folder, target, keep)
    return target


def _sweep(folder: Path, written: Path, keep: int) -> None:
    for leftover in folder.glob(f"{_PARTIAL}*"):
        _remove(leftover)
    steps = [p for p in _steps(folder) if p.name <= written.name]
    newer = [p for p in _steps(folder) if p.name > written.name]  # of a run that this one does not continue
    scored = [(score, p) for p in steps if (score := _score(p)) is not None]
    kept = {*steps[-keep:], *([max(scored)[1]] if scored else [])}
    for path in [*newer, *(p for p in steps if p not in kept)]:
        _remove(path)


def _remove(path: Path) -> None:
    """A folder is first renamed, so that a kill half-way leaves no checkpoint with files missing."""
    if not path.exists():
        return
    if not path.name.startswith(_PARTIAL):
        gone = path.with_name(f"{_PARTIAL}removed-{path.name}")
        _remove(gone)
        path = path.rename(gone)
    shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint and holds every byte against the manifest.

    Raises:
        CheckpointError: not a checkpoint, or a file is missing, damaged or foreign.
    """
    manifest = _manifest(path)
    contents = {}
    for name, expected in manifest.files.items():
        content = _content(path / name, expected)
        if _sha256(content) != expected.sha256:
            raise CheckpointError(f"{path / name}: is damaged or foreign: its sha256 is not the manifest's")
        contents[name] = content
    try:
        tokenizer = contents["tokenizer.json"].decode() if "tokenizer.json" in contents else None
        config = json.loads(contents.get("config.json", b""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: config.json or tokenizer.json is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'}: expected an object, got a {type(config).__name__}")
    return Checkpoint(path, manifest.step, manifest.score, manifest.progress, config, tokenizer, contents)


def _content(path: Path, expected: _File) -> bytes:
    """The bytes of a file that the manifest names; of one with another size only the first are read."""
    try:
        with files.opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(4)
            if content.startswith(_PICKLES):
                raise CheckpointError(f"{path}: is a pickle, which mmkern never loads")
            if size != expected.bytes:
                raise CheckpointError(f"{path}: has {size} bytes, {expected.bytes} were written")
            if path.suffix == ".json" and size > files.JSON:
                raise CheckpointError(f"{path}: has {size} bytes, of which at most {files.JSON} are read")
            return content + file.read(size - len(content))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def _manifest(path: Path) -> _Manifest:
    if path.is_file():
        with path.open("rb") as file:
            pickled = file.read(4).startswith(_PICKLES)
        reason = "is a pickle, which mmkern never loads" if pickled else "is a file"
        raise CheckpointError(f"{path}: {reason}; a checkpoint is a folder")
    try:
        text = files.read(path / MANIFEST, files.SETTINGS)
    except OSError as error:
        raise CheckpointError(f"{path}: is no checkpoint: its {MANIFEST} cannot be read ({error.strerror})") from None
    if text.startswith(_PICKLES):
        raise CheckpointError(f"{path / MANIFEST}: is a pickle, which mmkern never loads")
    try:
        manifest = json.loads(text)
        rest = {name: value for name, value in manifest.items() if name != "sha256"}
        whole = _json(manifest) == text and _sha256(_json(rest)) == manifest["sha256"]
    except (ValueError, AttributeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path / MANIFEST}: is damaged or foreign: it does not hold its own sha256")
    if (found := manifest.get("format")) != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: has the format {found!r}; this mmkern reads {FORMAT!r}")
    try:
        return checked(_Manifest, manifest, str(path / MANIFEST))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def newest(folder: Path) -> Path:
    """The checkpoint written last.

    Raises:
        CheckpointError: there is none.
    """
    if not (found := _steps(folder)):
        raise CheckpointError(f"{folder}: has no checkpoint")
    return found[-1]


def best(folder: Path) -> Path:
    """The checkpoint with the highest score, or the newest where none has a score.

    Raises:
        CheckpointError: there is none, or the manifest of one is damaged.
    """
    scored = [(score, p) for p in _steps(folder) if (score := _manifest(p).score) is not None]
    return max(scored)[1] if scored else newest(folder)


def last_good(folder: Path) -> tuple[Checkpoint, list[CheckpointError]]:
    """The newest checkpoint that is whole, and why each newer one was passed over.

    Raises:
        CheckpointError: there is none.
    """
    refused: list[CheckpointError] = []
    for path in reversed(_steps(folder)):
        try:
            return load(path), refused
        except CheckpointError as error:
            refused.append(error)
    raise refused[0] if refused else CheckpointError(f"{folder}: has no checkpoint")


class Writer:
    """Writes checkpoints in a thread of its own while training goes on; one at a time, in order."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, snapshot: Snapshot) -> None:
        """Starts to write; waits first for the one before.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            save(self.folder, snapshot, self.keep)
        except BaseException as error:  # handed to the next call of the loop's thread
            self._error = error

    def wait(self) -> None:
        """Returns once all is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def _score(path: Path) -> float | None:
    try:
        return _manifest(path).score
    except CheckpointError:
        return None


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
