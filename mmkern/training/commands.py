"""The commands `mmkern train | evaluate | generate | classify | export`; heavy imports wait until one of them runs."""

from __future__ import annotations

import importlib.util
import json
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmkern.console import plain, progress
from mmkern.training.console import logged, one_line, table

if TYPE_CHECKING:
    from mmkern.training.config import RunConfig
    from mmkern.training.evaluation import Prediction
    from mmkern.training.problem import Problem

CONFIG = "config.json"
PICTURES = 48  # on the page, of each task
TEST = "test.json"
ONNX = "classify.onnx"
LOGGED, TESTED = 100, 512  # steps and samples after which there is a line where there is no terminal

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `mmkern train` wrote.")]
Prune = Annotated[float, typer.Option(help="Set this share of the weights to zero, the smallest ones.")]
Int8 = Annotated[bool, typer.Option("--int8", help="Weights in int8.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto: CUDA where there is one.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (train, evaluate, generate, classify, export):
        app.command()(command)


def train(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="TOML file [the defaults].")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/default"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last good checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of training.steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of training.seed.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="On reference ops: the same, slower.")] = False,
) -> None:
    """Train a model of pictures and text; without CONFIG on 3,700 emoji, in minutes on two CPU cores."""
    with one_line():
        import mmkern
        from mmkern.training import files
        from mmkern.training.config import parse, read
        from mmkern.training.loop import processes

        files.text(str(output), "--output")
        changes = {name: value for name, value in (("steps", steps), ("seed", seed)) if value is not None}
        chosen = (read(config) if config else parse({})).model_dump()
        chosen["training"] |= changes
        given = parse(chosen, "--steps, --seed")
        if output.exists() and not output.is_dir():
            raise typer.BadParameter(f"--output {output} is a file, not a folder")
        joined = processes(given.training.device)
        first = joined.is_main_process
        try:
            with files.alone(output) if first else nullcontext():
                run = _checked(output, given, bool(config or changes), resume, first)
                with logged(quiet=not first), mmkern.backend("reference") if reference else nullcontext():
                    _train(run, output, resume, first)
        except KeyboardInterrupt:
            folder = shlex.quote(str(output))
            typer.echo(f"mmkern: stopped; mmkern train --output {folder} --resume goes on", err=True)
            raise typer.Exit(130) from None
        finally:
            joined.destroy_process_group()


def _checked(output: Path, given: RunConfig, chosen: bool, resume: bool, first: bool) -> RunConfig:
    """The configuration of a new run, or that of the run in the folder, which must be the chosen one, if any."""
    from mmkern.training.config import ConfigError, load, parse

    started = output / CONFIG
    if not resume:
        if first and started.exists():
            raise typer.BadParameter(f"--output {output} holds a run; go on with --resume, or choose another folder")
        return given
    if not started.exists():
        raise typer.BadParameter(f"--resume: {output} holds no run (no {CONFIG})")
    kept = parse(load(started, json.loads), str(started))
    if chosen and kept != given:
        raise ConfigError(f"--resume: the run's own configuration, {started}, differs; leave the others out")
    return kept


def _train(config: RunConfig, output: Path, resume: bool, first: bool) -> None:
    import torch

    from mmkern.model import MultimodalModel
    from mmkern.training import checkpoints, files
    from mmkern.training.loop import CHECKPOINTS, Trainer, log, pick_device
    from mmkern.training.runs import open_run, prepare

    start, c = time.perf_counter(), config.training
    device = pick_device(c.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    teacher = open_run(c.teacher, device) if c.teacher else None
    found = None
    if resume and list((output / CHECKPOINTS).glob("step-*")):
        found, refused = checkpoints.last_good(output / CHECKPOINTS)
        for reason in refused:
            log.warning("passed over: %s", reason)
    problem, model_config = prepare(config, teacher)
    torch.manual_seed(c.seed)
    try:
        model = MultimodalModel(model_config, problem.word_vectors).to(device)
    except ValueError as error:
        raise typer.BadParameter(f"model: {error}") from None
    trainer = Trainer(config, problem, model, output, None if teacher is None else teacher.model)
    if found is not None:
        trainer.restore(found)
    if first and not resume:
        files.write(output / CONFIG, json.dumps(config.model_dump(mode="json"), indent=1))
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    log.info("%d samples, %d classes, %.2f M parameters", len(problem.train), len(problem.classes), parameters)
    if found is not None:
        log.info("going on after step %d", found.step)
    began, done = time.perf_counter(), trainer.step
    with progress(c.steps, "training", every=LOGGED, done=done) if first else nullcontext(_silent) as step:

        def after(at: int, record: dict[str, float]) -> None:
            left = (time.perf_counter() - began) / (at - done) * (c.steps - at)
            loss, rate = f"loss {record['loss']:.3f}", f"learning rate {record['learning_rate']:.2g}"
            step(1, loss, f"{loss}, {rate}, {timedelta(seconds=round(left))} left")

        trainer.progress = after
        trainer.run()
    if first:
        _finish(output, problem, time.perf_counter() - start)


def _silent(*_: object) -> None:
    """The progress of all processes but the first."""


def _finish(output: Path, problem: Problem, seconds: float) -> None:
    """Scores the best checkpoint and the baselines on the test split; writes test.json, curves.svg and the page."""
    from mmkern.training import evaluation, files, run_page
    from mmkern.training.runs import open_run

    run = open_run(output)
    with progress(len(problem.test), "testing", every=TESTED) as step:
        predictions, _ = evaluation.predict(run.model, problem, problem.test, step)
    found = evaluation.metrics(predictions, problem.classes)
    facts = {
        "step of the best checkpoint": run.checkpoint.step,
        "seconds": round(seconds, 1),
        "training samples": len(problem.train),
        "test samples": len(problem.test),
    }
    answers = {
        "most frequent": evaluation.most_frequent(problem),
        "nearest picture": evaluation.nearest_picture(problem),
    }
    compared = {name: evaluation.metrics(answer, problem.classes) for name, answer in answers.items()}
    files.write(output / TEST, json.dumps(facts | {"test": found, "baselines": compared}, indent=1))
    rows = evaluation.rows(found, compared)
    page = run_page.write(output, {k: str(v) for k, v in facts.items()}, rows, _shown(predictions), problem.classes)
    console = plain()
    console.print(table(f"test data, best checkpoint (step {run.checkpoint.step})", rows))
    console.print(f"{seconds:.0f} s; written: {output} (look at {page})", soft_wrap=True)


def _shown(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Some of each task, evenly over the test data."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.sample.group, []).append(prediction)
    return [p for group in groups.values() for p in group[:: max(1, len(group) // PICTURES)][:PICTURES]]


def _compressed(model: Any, prune: float, int8: bool) -> Any:
    from mmkern.training import compress

    try:
        model = compress.pruned(model, prune) if prune else model
        return compress.quantized(model) if int8 else model
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def evaluate(
    run: RunFolder,
    data: Annotated[Path | None, typer.Option(help="Another folder of samples [the run's own].")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    samples: Annotated[int, typer.Option(min=0, help="Only so many; 0: all.")] = 0,
    prune: Prune = 0.0,
    int8: Int8 = False,
    device: Device = "auto",
) -> None:
    """Score a run's best checkpoint on held-out data; with --prune or --int8 also the smaller model, and both sizes."""
    if split not in ("train", "validation", "test"):
        raise typer.BadParameter(f"--split: expected train, validation or test, got {split!r}")
    with one_line():
        from mmkern.training import compress, evaluation
        from mmkern.training.files import TrainingError
        from mmkern.training.loop import pick_device
        from mmkern.training.runs import open_run, prepare

        opened = open_run(run, pick_device("cpu" if int8 else device))
        config = opened.config
        if data is not None:
            config = config.model_copy(update={"data": config.data.model_copy(update={"source": str(data)})})
        problem, _ = prepare(config, opened)
        chosen = getattr(problem, split)[: samples or None]
        if not chosen:
            raise TrainingError(f"--split: the {split} split of {config.data.source} is empty")
        models = {"as trained": opened.model}
        if prune or int8:
            name = " + ".join([f"{prune:.0%} pruned"] * bool(prune) + ["int8"] * int8)
            models[name] = _compressed(opened.model, prune, int8)
        for name, model in models.items():
            start = time.perf_counter()
            with progress(len(chosen), name, every=TESTED) as step:
                predictions, _ = evaluation.predict(model, problem, chosen, step)
            seconds = time.perf_counter() - start
            console = plain()
            found = evaluation.rows(evaluation.metrics(predictions, problem.classes), {})
            console.print(table(f"{split} data, step {opened.checkpoint.step}, {name}", found))
            console.print(f"{compress.size(model)}; {seconds:.1f} s")


def generate(
    run: RunFolder,
    image: Annotated[Path | None, typer.Option(help="Picture to speak about.")] = None,
    prompt: Annotated[str, typer.Option(help="What is asked.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 32,
    strategy: Annotated[str, typer.Option(help="greedy, sample or beam.")] = "greedy",
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest tokens of this probability.")] = None,
    beams: Annotated[int, typer.Option(min=1, max=256, help="Candidates of beam search, each a copy of all.")] = 4,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Of sampling.")] = None,
    prune: Prune = 0.0,
    int8: Int8 = False,
) -> None:
    """Let a run's model write about a picture, a prompt, or both."""
    if image is None and not prompt:
        raise typer.BadParameter("give --image, --prompt, or both")
    with one_line():
        from mmkern.model import generate as write
        from mmkern.training import files, pictures
        from mmkern.training.data import Sample, collate
        from mmkern.training.runs import open_run

        files.text(prompt, "--prompt")
        opened = open_run(run)
        if image is not None and not opened.model.config.image_size:
            raise typer.BadParameter(f"--image: the model of {run} takes no pictures")
        model = _compressed(opened.model, prune, int8)
        sample = Sample(None if image is None else pictures.read(image), prompt, None, None, "")
        batch = collate([sample], tokenizer=opened.tokenizer, config=model.config)
        options = {"strategy": strategy, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        limit = min(max_tokens, model.config.max_tokens)
        try:
            ids = write(model, batch, max_tokens=limit, beams=beams, seed=seed, **options)[0]  # type: ignore[arg-type]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    typer.echo(opened.tokenizer.decode(ids).strip())


def classify(
    run: RunFolder,
    paths: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Pictures.")],
    prompt: Annotated[str | None, typer.Option(help="What is asked [what the run was trained to be asked].")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to show of each picture.")] = 3,
) -> None:
    """Tell the class of pictures."""
    with one_line():
        import torch

        from mmkern.training import files, pictures
        from mmkern.training.data import Sample, collate
        from mmkern.training.runs import open_run

        opened = open_run(run)
        if not opened.model.config.image_size:
            raise typer.BadParameter(f"{run}: the model takes no pictures")
        if not opened.classes:
            raise typer.BadParameter(f"{run}: the model was trained without classes; try mmkern generate")
        seen = [pictures.read(path) for path in paths]
        asked = opened.class_prompt if prompt is None else files.text(prompt, "--prompt")
        for path, picture in zip(paths, seen, strict=True):
            sample = Sample(picture, asked, None, None, "")
            batch = collate([sample], tokenizer=opened.tokenizer, config=opened.model.config)
            with torch.inference_mode():
                share, place = opened.model(batch)["class_logits"][0].softmax(-1).sort(descending=True)
            best = zip(share[:top].tolist(), place[:top].tolist(), strict=True)
            typer.echo(f"{path}: " + ", ".join(f"{opened.classes[i]} {p:.1%}" for p, i in best))


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(help="New folder, for transformers.")],
    onnx: Annotated[bool, typer.Option("--onnx", help="Write classify.onnx there as well.")] = False,
) -> None:
    """Write a run's model for transformers: AutoModel opens it once mmkern.model.pretrained is imported."""
    with one_line():
        if onnx:
            for name in ("onnx", "onnxscript"):
                if importlib.util.find_spec(name) is None:
                    raise typer.BadParameter(f"--onnx needs {name}, which is not installed: pip install 'mmkern[onnx]'")
        from mmkern.model import pretrained
        from mmkern.model.onnx import export_classification
        from mmkern.training.runs import open_run

        opened = open_run(run)
        if onnx and not opened.classes:
            raise typer.BadParameter(f"--onnx: the model of {run} was trained without classes")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise typer.BadParameter(f"{folder}: is not an empty folder")
        pretrained.save(opened.model, opened.tokenizer, opened.classes, opened.class_prompt, folder)
        if onnx:
            export_classification(opened.model, folder / ONNX)
    typer.echo(f"written: {folder}")
