"""The training loop: steps, evaluations and checkpoints, in one process or under torchrun.

A run is a folder: config.json, metrics.jsonl, tensorboard/, checkpoints/. Batches and learning rates are functions of
the seed and the step, so a checkpoint (weights, optimizer, random state, plateau counts) is all it takes to go on with
the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import reprlib
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmkern
from mmkern.model import Batch, MultimodalModel
from mmkern.training import checkpoints, evaluation, interrupts, schedules
from mmkern.training.checkpoints import CheckpointError, Snapshot, Writer
from mmkern.training.config import ConfigError, Count, RunConfig, TrainingConfig, checked
from mmkern.training.problem import Problem, Steps, loader
from mmkern.training.records import Records

CHECKPOINTS = "checkpoints"
LOSSES = ("loss", "text", "class", "image", "distill_text", "distill_class")
# Of a run's configuration, what may change before it goes on: where things are (their content is hashed), and on what.
MOVABLE = {
    "run.data.source", "run.data.word_vectors", "run.data.workers", "run.training.device", "run.training.teacher",
    "run.model.image_weights", "model.image_weights", "model.image_backbone.transformers_version",
}  # fmt: skip
log = logging.getLogger("mmkern.training")


class TrainingError(Exception):
    """Training cannot start or go on; one line that says why."""


def distill(student: Tensor, teacher: Tensor, asked: Tensor, temperature: float) -> Tensor:
    """The student's divergence from the teacher, softened: T^2 KL(softmax(teacher / T) || softmax(student / T)).

    Args:
        student, teacher: (..., C) logits. asked: (...) bool, the rows to take the mean over.
        temperature: T; the factor T^2 keeps gradients of one size over temperatures (Hinton et al. 2015).

    Returns:
        A scalar; 0 where nothing is asked.
    """
    p = mmkern.log_softmax(teacher[asked].float() / temperature, dim=-1)
    q = mmkern.log_softmax(student[asked].float() / temperature, dim=-1)
    return temperature**2 * (p.exp() * (p - q)).sum() / asked.sum().clamp(min=1)


class Objective(nn.Module):
    """The loss of one process's share of a batch. DDP wraps this one, so that its forward is the loss."""

    def __init__(self, model: MultimodalModel, config: TrainingConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(
        self, batch: Batch, shares: dict[str, float], taught: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, each times its share, and each by itself; taught: the teacher's logits."""
        outputs = self.model(batch)
        losses = self.model.loss(batch, outputs)
        if "class" in taught and batch.labels is not None:
            asked = batch.labels != -100
            losses["distill_class"] = distill(outputs["class_logits"], taught["class"], asked, self.config.temperature)
        if "text" in taught and batch.targets is not None:
            logits, asked = self.model.logits(outputs["hidden"]), batch.targets != -100
            losses["distill_text"] = distill(logits, taught["text"], asked, self.config.temperature)
        weight = self.config.weights.get
        parts = {name: loss * shares[name.split("_")[-1]] for name, loss in losses.items()}
        weighted = [weight(name.split("_")[0], 1.0) * part for name, part in parts.items()]  # type: ignore[call-overload]
        return torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()}


def teach(teacher: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    """The teacher's logits for a batch, without gradients."""
    with torch.no_grad():
        outputs = teacher(batch)
        found = {}
        if "class_logits" in outputs:
            found["class"] = outputs["class_logits"]
        if "hidden" in outputs:
            found["text"] = teacher.logits(outputs["hidden"])
        return found


def make_optimizer(model: nn.Module, c: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names; vectors (biases, norms) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": c.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if c.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=c.learning_rate, momentum=c.momentum, fused=True)
    kind = torch.optim.Adam if c.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=c.learning_rate, betas=c.betas, fused=True)


def pick_device(name: str) -> torch.device:
    """The device that `training.device` names: "auto" is CUDA where there is one, that of this process under torchrun.

    Raises:
        TrainingError: there is no such device.
    """
    if name == "auto":
        name = f"cuda:{dist.get_node_local_rank(fallback_rank=0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        torch.ones(1, device=device).item()  # "meta" has none to give
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"training.device: {name}: {str(error).splitlines()[0]}") from None
    return device


class _Waiting(BaseModel):
    best: float | None
    waited: Count


class Progress(BaseModel):
    """What a checkpoint knows of the run besides its step."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    processes: Count
    samples: Count
    rate: Annotated[float, Field(gt=0)]
    stopped: bool
    plateau: _Waiting
    patience: _Waiting


def difference(was: Any, now: Any, name: str = "") -> str | None:
    """The first value that differs, by its name: "run.data.seed was 1, is 2"; None: none but of MOVABLE."""
    if name in MOVABLE or was == now:
        return None
    if isinstance(was, dict) and isinstance(now, dict):
        pairs = [(f"{name}.{key}".lstrip("."), was.get(key), now.get(key)) for key in sorted({*was, *now})]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = [(f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(was, now, strict=True))]
    else:
        return f"{name} was {reprlib.repr(was)}, is {reprlib.repr(now)}"
    return next((found for n, a, b in pairs if (found := difference(a, b, n))), None)


class Trainer:
    """One run.

    Args:
        config: of the run. problem: what is learned. folder: where the run is written.
        model: to be trained, on its device; the same weights in every process.
        teacher: its answers are learned too; None: no teacher.
        progress: called after each step with the step and its record.
    """

    def __init__(
        self,
        config: RunConfig,
        problem: Problem,
        model: MultimodalModel,
        folder: Path,
        teacher: MultimodalModel | None = None,
        progress: Callable[[int, dict[str, float]], None] = lambda step, record: None,
    ) -> None:
        self.config, self.problem, self.model, self.folder = config, problem, model, folder
        self.c = config.training
        self.progress = progress
        self.device = next(model.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.teacher = None if teacher is None else teacher.to(self.device).eval().requires_grad_(False)
        self.objective: nn.Module = Objective(model, self.c)
        if self.world > 1:
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, self.c)
        self.step, self.rate, self.stopped = 0, 1.0, False
        self.plateau = schedules.Plateau(self.c.patience, self._decay)
        self.patience = schedules.Plateau(max(0, self.c.stop_after - 1), self._stop)
        torch.manual_seed(self.c.seed * 1000 + self.rank)  # of dropout

    def _decay(self) -> None:
        if self.c.schedule == "plateau":
            self.rate *= self.c.decay
            log.info("step %d: no better score; learning rate %.2g", self.step, self.rate * self.c.learning_rate)

    def _stop(self) -> None:
        if self.c.stop_after:
            self.stopped = True
            log.info("step %d: no better score in %d evaluations; stopping", self.step, self.c.stop_after)

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: it is of another configuration, number of processes or other data, or not what was written.
        """
        path = checkpoint.path
        try:
            progress = checked(Progress, checkpoint.progress, f"{path / checkpoints.MANIFEST}: progress")
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if progress.processes != self.world:
            raise CheckpointError(f"{path}: is of {progress.processes} processes, these are {self.world}")
        if progress.samples != len(self.problem.train):
            raise CheckpointError(
                f"{path}: was trained on {progress.samples} samples, the data now have {len(self.problem.train)}"
            )
        if changed := difference(checkpoint.config, self.described):
            raise CheckpointError(f"{path}: was trained on something else: {changed}")
        load_weights(self.model, checkpoint)
        try:
            checkpoints.restore_optimizer(self.optimizer, checkpoint.tensors("optimizer"))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        random = checkpoint.tensors("random")
        try:
            torch.set_rng_state(random[f"{self.rank}.cpu"])
            if self.device.type == "cuda" and f"{self.rank}.cuda" in random:
                torch.cuda.set_rng_state(random[f"{self.rank}.cuda"], self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path / 'random.safetensors'}: holds no state of torch's generator ({error})"
            ) from None
        self.plateau.restore(progress.plateau.model_dump())
        self.patience.restore(progress.patience.model_dump())
        self.step, self.rate, self.stopped = checkpoint.step, progress.rate, progress.stopped

    @cached_property
    def described(self) -> dict[str, Any]:
        """The config.json of this run's checkpoints: JSON of a `config.Saved`."""
        data = dict(self.problem.fingerprint)
        if self.teacher is not None:
            weights = safetensors.torch.save(checkpoints.copied(self.teacher.state_dict()))
            data["teacher"] = hashlib.sha256(weights).hexdigest()[:16]
        config = {
            "run": self.config.model_dump(mode="json"),
            "model": dataclasses.asdict(self.model.config),
            "classes": self.problem.classes,
            "class_prompt": self.problem.class_prompt,
            "data": data,
        }
        found: dict[str, Any] = json.loads(json.dumps(config))
        return found

    def run(self) -> None:
        """Trains to the end; whatever happens, the last checkpoint is whole.

        Raises:
            TrainingError: the loss is no longer finite. OSError: the disk is full.
            KeyboardInterrupt: Ctrl-C, after the step that it came in; a single process has written a checkpoint of it.
        """
        with interrupts.held() as interrupted:
            self._run(interrupted)

    def _run(self, interrupted: Callable[[], bool]) -> None:
        if self.rank == 0:
            _ = self.described  # the data as they are before the first step
        records = Records(self.folder, self.step) if self.rank == 0 else None
        writer = Writer(self.folder / CHECKPOINTS)
        steps = Steps(self.problem, self.c.batch_size, self.c.seed, self.rank, self.world)
        batches = loader(steps, self.step, self.c.steps, self.config.data.workers)
        self.model.train()
        try:
            for batch in batches if not self.stopped else ():
                record = self.train_step(batch.to(self.device))
                if records is not None:
                    records.add(self.step, "train", record)
                self.progress(self.step, record)
                last = self.step == self.c.steps
                score = None
                if last or self.step % self.c.evaluate_every == 0:
                    score = self._evaluate(records)
                told = interrupted()
                due = last or self.stopped or self.step % self.c.checkpoint_every == 0 or score is not None
                if due or (told and self.world == 1):  # others may be at another step
                    self._checkpoint(writer, score)
                if self.stopped or told:
                    break
        finally:
            writer.wait()
            if records is not None:
                records.close()

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step on this process's share of a batch; returns the record of the whole batch."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        counts = evaluation.asked(batch)
        whole = self._summed(counts)
        shares = {name: counts[name] * self.world / max(1.0, whole[name]) for name in counts}
        with self._autocast():
            taught = {} if self.teacher is None else teach(self.teacher, batch)
            total, parts = self.objective(batch, shares, taught)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.c.clip or math.inf)
        found = {"loss": total.detach()} | parts
        mine = {name: float(found[name]) if name in found else 0.0 for name in LOSSES}
        sums = self._summed(mine)
        record = {name: sums[name] / self.world for name in LOSSES if name in found}
        if not math.isfinite(record["loss"]) or not math.isfinite(float(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {record['loss']}, its gradient {float(norm)}; "
                "try a lower training.learning_rate, or training.clip"
            )
        self.optimizer.step()
        self.step += 1
        record |= {"gradient": float(norm), "learning_rate": self.optimizer.param_groups[0]["lr"]}
        return record | {"seconds": time.perf_counter() - start}

    def learning_rate(self) -> float:
        """Of the step about to be taken."""
        c = self.c
        scale = schedules.factor(
            self.step,
            schedule=c.schedule,
            total=c.steps,
            warmup=c.warmup,
            every=c.decay_every,
            gamma=c.decay,
            floor=c.floor,
        )
        return c.learning_rate * self.rate * scale

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.c.precision == "bf16" else nullcontext()

    def _summed(self, values: dict[str, float] | dict[str, int]) -> dict[str, float]:
        """Each value summed over the processes, which all have the same names."""
        if self.world == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return dict(zip(values, tensor.tolist(), strict=True))

    def _gathered(self, value: Any) -> list[Any]:
        """The value of each process."""
        found = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def _evaluate(self, records: Records | None) -> float:
        """Scores the model on the validation split, each process a share of it."""
        samples = range(min(len(self.problem.validation), self.c.evaluation_samples))
        mine = [self.problem.validation[i] for i in samples[self.rank :: self.world]]
        with self._autocast():
            predictions, sums = evaluation.predict(self.model, self.problem, mine)
        predictions = [p for part in self._gathered(predictions) for p in part]
        losses = evaluation.means(self._gathered(sums))
        found = evaluation.metrics(predictions, self.problem.classes)
        score = evaluation.score(found)
        self.plateau.observe(score)
        self.patience.observe(score)
        if records is not None:
            flat = {f"{g}/{n}": v for g, values in found.items() for n, v in values.items() if isinstance(v, float)}
            records.add(self.step, "validation", {"score": score, **losses, **flat})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in flat.items())
            log.info("step %d: score %.3f (%s)", self.step, score, shown)
        return score

    def _checkpoint(self, writer: Writer, score: float | None) -> None:
        random = {f"{self.rank}.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random[f"{self.rank}.cuda"] = torch.cuda.get_rng_state(self.device)
        random = {name: state for part in self._gathered(random) for name, state in part.items()}
        if self.rank:
            return
        progress = {
            "processes": self.world,
            "samples": len(self.problem.train),
            "rate": self.rate,
            "stopped": self.stopped,
            "plateau": self.plateau.state(),
            "patience": self.patience.state(),
        }
        tensors = {
            "model": checkpoints.copied(self.model.state_dict()),
            "optimizer": checkpoints.flattened(self.optimizer),
            "random": random,
        }
        tokenizer = self.problem.tokenizer.to_str()
        writer.submit(Snapshot(self.step, tensors, self.described, tokenizer, progress, score))


def load_weights(model: nn.Module, checkpoint: checkpoints.Checkpoint) -> None:
    """Puts a checkpoint's weights into a model.

    Raises:
        CheckpointError: it is of another model, or has a NaN; the first tensor that does not fit is named.
    """
    tensors, expected = checkpoint.tensors("model"), model.state_dict()
    for name in sorted(tensors.keys() | expected.keys()):
        kinds = [
            (tuple(t.shape), t.dtype) if (t := found.get(name)) is not None else None for found in (tensors, expected)
        ]
        if kinds[0] != kinds[1]:
            has, wants = ("nothing" if kind is None else f"{kind[0]}" for kind in kinds)
            if has == wants:
                has, wants = (f"{kind[1]}" for kind in kinds if kind is not None)
            raise CheckpointError(f"{checkpoint.path}: has {has} for {name}, the model {wants}")
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{checkpoint.path}: has a value of {name} that is not finite")
    model.load_state_dict(tensors)
