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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mmkern.training import files
from mmkern.training.config import ConfigError, checked

FORMAT = "mmkern checkpoint 1"
MANIFEST = "manifest.json"
_PARTIAL = ".partial-"
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickle; torch.save's zip


class CheckpointError(files.Refused):
    """A checkpoint is not there, or is not what was written; the line names the file."""


class Strict(BaseModel):
    """What a checkpoint's manifest holds: nothing else, and of no other type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _File(Strict):
    bytes: int = Field(ge=0, le=files.TENSORS)
    sha256: str


class _Manifest(Strict):
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
        """The tensors of `name`.safetensors; CheckpointError where there is no such file, or it is none."""
        file = f"{name}.safetensors"
        if file not in self.contents:
            raise CheckpointError(f"{self.path}: has no {file}")
        try:
            return safetensors.torch.load(self.contents[file])
        except Exception as error:  # SafetensorError, and what torch says of kinds and sizes it does not know
            raise CheckpointError(f"{self.path / file}: not a safetensors file ({error})") from None

    def restore_weights(self, model: nn.Module) -> None:
        """Puts the weights into a model; CheckpointError where they are of another one, or not all are finite."""
        tensors = self.tensors("model")
        _compare(tensors, model.state_dict(), f"{self.path}")
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{self.path}: has a value of {name} that is not finite")
        model.load_state_dict(tensors)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Puts `flattened` tensors back; CheckpointError where they are of other parameters or another optimizer."""
        tensors = self.tensors("optimizer")
        names = ("momentum_buffer",) if isinstance(optimizer, torch.optim.SGD) else ("step", "exp_avg", "exp_avg_sq")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen = {name.partition(".")[0] for name in tensors}  # a parameter without a gradient has no state
        known = {i: p for i, p in enumerate(parameters) if str(i) in seen}
        expected = {f"{i}.{n}": torch.empty(()) if n == "step" else p for i, p in known.items() for n in names}
        _compare(tensors, expected, f"{self.path}: optimizer")
        state = {i: {name: tensors[f"{i}.{name}"] for name in names} for i in known}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Raises CheckpointError of the first tensor that is missing, or has another shape or dtype."""
    for name in sorted({*found, *expected}):
        kinds = [(tuple(ts[name].shape), ts[name].dtype) if name in ts else None for ts in (found, expected)]
        if kinds[0] != kinds[1]:
            has, wants = ("nothing" if k is None else f"{k[0]} {k[1]}".replace("torch.", "") for k in kinds)
            raise CheckpointError(f"{where}: has {has} for {name}, expected {wants}")


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory that share no storage, as safetensors wants them."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def flattened(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as "index.key" tensors; learning rates and the like are the configuration's."""
    state = optimizer.state_dict()["state"]
    return copied({f"{i}.{key}": torch.as_tensor(v) for i, values in state.items() for key, v in values.items()})


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
    manifest = {"format": FORMAT, "step": snapshot.step, "score": snapshot.score, "progress": snapshot.progress}
    manifest["files"] = {name: {"bytes": len(b), "sha256": _sha256(b)} for name, b in contents.items()}
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
        os.replace(target, folder / f"{_PARTIAL}replaced-{target.name}-{os.getpid()}")
    os.replace(partial, target)
    _sync(folder)
    for leftover in folder.glob(f"{_PARTIAL}*"):
        _remove(leftover)
    steps = [p for p in _steps(folder) if p.name <= target.name]  # a newer one is of a run that this one does not go on
    scored = [(score, p) for p in steps if (score := _score(p)) is not None]
    kept = {*steps[-keep:], *([max(scored)[1]] if scored else [])}
    for path in (p for p in _steps(folder) if p not in kept):
        _remove(path)
    return target


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
    manifest, contents = _manifest(path), {}
    for name, expected in manifest.files.items():
        contents[name] = _content(path / name, expected.bytes)
        if _sha256(contents[name]) != expected.sha256:
            raise CheckpointError(f"{path / name}: is damaged or foreign: its sha256 is not the manifest's")
    try:
        tokenizer = contents["tokenizer.json"].decode() if "tokenizer.json" in contents else None
        config = json.loads(contents.get("config.json", b""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: config.json or tokenizer.json is no JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / 'config.json'}: expected an object, got a {type(config).__name__}")
    return Checkpoint(path, manifest.step, manifest.score, manifest.progress, config, tokenizer, contents)


def _content(path: Path, size: int | None = None) -> bytes:
    """The bytes of a file; of a pickle, one of another size, or one that is too large, only the first are read."""
    most = files.SETTINGS if path.name == MANIFEST else files.JSON if path.suffix == ".json" else files.TENSORS
    try:
        with files.opened(path) as file:
            found, head = os.fstat(file.fileno()).st_size, file.read(4)
            if head.startswith(_PICKLES):
                raise CheckpointError(f"{path}: is a pickle, which mmkern never loads")
            if size not in (None, found):
                raise CheckpointError(f"{path}: has {found} bytes, {size} were written")
            if found > most:
                raise CheckpointError(f"{path}: has {found} bytes, of which at most {most} are read")
            return head + file.read(found - len(head))
    except OSError as error:
        whole = f"{path.parent}: is no checkpoint: its {MANIFEST}" if path.name == MANIFEST else f"{path}:"
        raise CheckpointError(f"{whole} cannot be read ({error.strerror})") from None


def _manifest(path: Path) -> _Manifest:
    if path.is_file():
        with path.open("rb") as file:
            reason = "is a pickle, which mmkern never loads" if file.read(4).startswith(_PICKLES) else "is a file"
        raise CheckpointError(f"{path}: {reason}; a checkpoint is a folder")
    text = _content(path / MANIFEST)
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
    """The checkpoint written last; CheckpointError where there is none."""
    if not (found := _steps(folder)):
        raise CheckpointError(f"{folder}: has no checkpoint")
    return found[-1]


def best(folder: Path) -> Path:
    """The checkpoint with the highest score, or the newest where none has a score; CheckpointError as `_manifest`."""
    scored = [(score, p) for p in _steps(folder) if (score := _manifest(p).score) is not None]
    return max(scored)[1] if scored else newest(folder)


def last_good(folder: Path) -> tuple[Checkpoint, list[CheckpointError]]:
    """The newest checkpoint that is whole, and why each newer one was passed over; CheckpointError: there is none."""
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
        self._pool, self._pending = ThreadPoolExecutor(1, "checkpoint"), Future[Path]()
        self._pending.set_result(folder)

    def submit(self, snapshot: Snapshot) -> None:
        """Starts to write; waits first for the one before, whose OSError it raises."""
        self.wait()
        self._pending = self._pool.submit(save, self.folder, snapshot, self.keep)

    def wait(self) -> None:
        """Returns once all is on disk; raises OSError, once, where it could not be written."""
        pending, self._pending = self._pending, Future()
        self._pending.set_result(self.folder)
        pending.result()


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
