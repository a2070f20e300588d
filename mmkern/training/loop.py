"""The training loop: steps, evaluations and checkpoints, in one process or under torchrun.

A run is a folder: config.json, metrics.jsonl, tensorboard/, checkpoints/. Batches and learning rates are functions of
the seed and the step, so a checkpoint (weights, optimizer, random state, plateau counts) is all it takes to go on with
the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
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
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmkern
from mmkern.model import Batch, MultimodalModel
from mmkern.training import checkpoints, evaluation, interrupts, schedules
from mmkern.training.checkpoints import CheckpointError, Snapshot, Strict, Writer
from mmkern.training.config import ConfigError, Count, RunConfig, TrainingConfig, checked
from mmkern.training.files import TrainingError
from mmkern.training.problem import Problem, Steps, loader
from mmkern.training.records import Records

CHECKPOINTS = "checkpoints"
WATCHED = 100  # steps over which a slow machine is noticed
BUSY = 0.7  # share of a step in which its thread computes; less is told
# Of a run's configuration, what may change before it goes on: where things are (their content is hashed), and on what.
MOVABLE = {
    "run.data.source", "run.data.word_vectors", "run.data.workers", "run.training.device", "run.training.threads",
    "run.training.teacher", "run.model.image_weights", "model.image_weights",
    "model.image_backbone.transformers_version",
}  # fmt: skip
log = logging.getLogger("mmkern.training")


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss by its name in the records; `of` counts its targets in `evaluation.asked`."""

    name: str
    of: str
    weight: str  # the key of training.weights


LOSSES = [Loss(name, name, name) for name in ("text", "class", "image")]
LOSSES += [Loss(f"distill_{name}", name, "distill") for name in ("text", "class")]


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
        """The weighted sum of the losses, each times its share, and each by itself; taught: of `teach`."""
        outputs = self.model(batch)
        losses = self.model.loss(batch, outputs)
        temperature = self.config.temperature
        if "class" in taught and batch.labels is not None:
            asked = batch.labels != -100
            losses["distill_class"] = distill(outputs["class_logits"], taught["class"], asked, temperature)
        if "text" in taught and batch.targets is not None:
            logits, asked = self.model.logits(outputs["hidden"]), batch.targets != -100
            losses["distill_text"] = distill(logits, taught["text"], asked, temperature)
        weights: dict[Any, float] = self.config.weights
        known = {loss.name: loss for loss in LOSSES}
        parts = {name: loss * shares[known[name].of] for name, loss in losses.items()}
        total = torch.stack([weights.get(known[name].weight, 1.0) * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}


def teach(teacher: MultimodalModel, batch: Batch) -> dict[str, Tensor]:
    """The teacher's logits for a batch, without gradients, by the name of what they answer."""
    with torch.no_grad():
        outputs = teacher(batch)
        found = {"class": outputs["class_logits"]} if "class_logits" in outputs else {}
        return found | ({"text": teacher.logits(outputs["hidden"])} if "hidden" in outputs else {})


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


def processes(device: str = "auto") -> PartialState:
    """This process among those that torchrun started, or alone; the first call joins them.

    accelerate takes each for a process of its own, and says nothing, where there is no GPU and it is not told so.
    Functions of torch.distributed.nn have the process group of their import as a default, and optimizers import it: one
    imported later keeps the group's threads beyond destroy_process_group, which may then abort the interpreter's end.
    """
    if torch.distributed.is_available():
        importlib.import_module("torch.distributed.nn")
    return PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def pick_device(name: str) -> torch.device:
    """The device that `training.device` names: "auto" is CUDA where there is one, that of this process under torchrun.

    Raises:
        TrainingError: there is no such device.
    """
    if name == "auto":
        name = f"cuda:{processes().local_process_index}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
        torch.ones(1, device=device).item()  # "meta" has none to give
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"training.device: {name}: {str(error).splitlines()[0]}") from None
    return device


class _Waiting(Strict):
    best: float | None
    waited: Count


class Progress(Strict):
    """What a checkpoint knows of the run besides its step."""

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
        self.c, self.progress = config.training, progress
        self.device = next(model.parameters()).device
        self.rank, self.world = processes().process_index, processes().num_processes
        self.teacher = None if teacher is None else teacher.to(self.device).eval().requires_grad_(False)
        self.objective: nn.Module = Objective(model, self.c)
        if self.world > 1:
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(model, self.c)
        self.step, self.rate, self.stopped = 0, 1.0, False
        self.seconds, self.computed, self.advised = 0.0, 0.0, False  # of the steps since the last look at them
        self.plateau, self.patience = schedules.Plateau(), schedules.Plateau()
        torch.manual_seed(self.c.seed * 1000 + self.rank)  # of dropout

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: it is of another configuration, number of processes or other data, or not what was written.
        """
        path, samples = checkpoint.path, len(self.problem.train)
        try:
            progress = checked(Progress, checkpoint.progress, f"{path / checkpoints.MANIFEST}: progress")
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if progress.processes != self.world:
            raise CheckpointError(f"{path}: is of {progress.processes} processes, these are {self.world}")
        if progress.samples != samples:
            raise CheckpointError(f"{path}: was trained on {progress.samples} samples, the data now have {samples}")
        if changed := difference(checkpoint.config, self.described):
            raise CheckpointError(f"{path}: was trained on something else: {changed}")
        checkpoint.restore_weights(self.model)
        checkpoint.restore_optimizer(self.optimizer)
        random = checkpoint.tensors("random")
        try:
            torch.set_rng_state(random[f"{self.rank}.cpu"])
            if self.device.type == "cuda" and f"{self.rank}.cuda" in random:
                torch.cuda.set_rng_state(random[f"{self.rank}.cuda"], self.device)
        except (KeyError, TypeError, RuntimeError) as error:
            file = path / "random.safetensors"
            raise CheckpointError(f"{file}: holds no state of torch's generator ({error})") from None
        self.plateau = schedules.Plateau(**progress.plateau.model_dump())
        self.patience = schedules.Plateau(**progress.patience.model_dump())
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
        threads = torch.get_num_threads()
        torch.set_num_threads(self.c.threads or threads)
        try:
            with interrupts.held() as interrupted:
                self._run(interrupted)
        finally:
            torch.set_num_threads(threads)

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
                last, score = self.step == self.c.steps, None
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
        start, computing = time.perf_counter(), time.thread_time()
        rate = self.c.learning_rate * self.rate * schedules.factor(self.step, self.c)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        counts = evaluation.asked(batch)
        whole = self._summed(counts)
        shares = {name: counts[name] * self.world / max(1.0, whole[name]) for name in counts}
        with self._autocast():
            taught = {} if self.teacher is None else teach(self.teacher, batch)
            total, parts = self.objective(batch, shares, taught)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.c.clip or math.inf))
        found = {"loss": total.detach()} | parts
        names = ["loss", *(loss.name for loss in LOSSES)]
        sums = self._summed({name: float(found[name]) if name in found else 0.0 for name in names})
        record = {name: sums[name] / self.world for name in names if name in found}
        if not math.isfinite(record["loss"]) or not math.isfinite(norm):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {record['loss']}, its gradient {norm}; "
                "try a lower training.learning_rate, or training.clip"
            )
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - start
        self._watch(seconds, time.thread_time() - computing)
        return record | {"gradient": norm, "learning_rate": rate, "seconds": seconds}

    def _watch(self, seconds: float, computed: float) -> None:
        """Says once where steps wait instead of computing: threads that wait for one another on cores that are taken.

        Threads of a step wait for the slowest of them. Where another process has its core, that one may take ten times
        as long, and this thread, which computes or spins otherwise, sleeps for most of a step.
        """
        self.seconds, self.computed = self.seconds + seconds, self.computed + computed
        if self.step % WATCHED:
            return
        threads, share = torch.get_num_threads(), self.computed / self.seconds
        if threads > 1 and share < BUSY and self.device.type == "cpu" and not self.advised:
            self.advised = True
            text = (
                "step %d: computing takes %.0f%% of a step's %.2f s, the rest is waiting: other processes use the cores"
            )
            text += " that these %d threads want; [training] threads = %d may be faster"
            log.warning(text, self.step, 100 * share, self.seconds / WATCHED, threads, threads // 2)
        self.seconds = self.computed = 0.0

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.c.precision == "bf16" else nullcontext()

    def _summed(self, values: dict[str, float] | dict[str, int]) -> dict[str, float]:
        """Each value summed over the processes, which all have the same names."""
        if self.world == 1:
            return dict(values)
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        return dict(zip(values, reduce(tensor, "sum").tolist(), strict=True))

    def _evaluate(self, records: Records | None) -> float:
        """Scores the model on the validation split, each process a share of it."""
        samples = range(min(len(self.problem.validation), self.c.evaluation_samples))
        mine = [self.problem.validation[i] for i in samples[self.rank :: self.world]]
        with self._autocast():
            predictions, sums = evaluation.predict(self.model, self.problem, mine)
        found = evaluation.metrics(gather_object(predictions), self.problem.classes)
        losses = evaluation.means(gather_object([sums]))
        score = evaluation.score(found)
        if records is not None:
            flat = {f"{g}/{n}": v for g, values in found.items() for n, v in values.items() if isinstance(v, float)}
            records.add(self.step, "validation", {"score": score, **losses, **flat})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in flat.items())
            log.info("step %d: score %.3f (%s)", self.step, score, shown)
        if self.plateau.observe(score, self.c.patience) and self.c.schedule == "plateau":
            self.rate *= self.c.decay
            log.info("step %d: no better score; learning rate %.2g", self.step, self.rate * self.c.learning_rate)
        if self.patience.observe(score, max(0, self.c.stop_after - 1)) and self.c.stop_after:
            self.stopped = True
            log.info("step %d: no better score in %d evaluations; stopping", self.step, self.c.stop_after)
        return score

    def _checkpoint(self, writer: Writer, score: float | None) -> None:
        random = {f"{self.rank}.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random[f"{self.rank}.cuda"] = torch.cuda.get_rng_state(self.device)
        random = {name: state for part in gather_object([random]) for name, state in part.items()}
        if self.rank:
            return
        progress = {
            "processes": self.world,
            "samples": len(self.problem.train),
            "rate": self.rate,
            "stopped": self.stopped,
            "plateau": dataclasses.asdict(self.plateau),
            "patience": dataclasses.asdict(self.patience),
        }
        tensors = {
            "model": checkpoints.copied(self.model.state_dict()),
            "optimizer": checkpoints.flattened(self.optimizer),
            "random": random,
        }
        tokenizer = self.problem.tokenizer.to_str()
        writer.submit(Snapshot(self.step, tensors, self.described, tokenizer, progress, score))
