"""The loop: it learns, its options do what they say, and a run that was killed goes on with the same bits."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_cases import COLOURS, KILLABLE_STEPS, averaged, built, configuration, killable, problem, trainer

import mmkern
from mmkern.training import checkpoints, evaluation, loop, records
from mmkern.training.checkpoints import CheckpointError
from mmkern.training.problem import Steps, loader


def losses(folder):
    return [r["loss"] for r in records.read(folder) if r["split"] == "train"]


def test_it_learns_colours_it_has_not_seen(tmp_path):
    config = configuration(steps=80, evaluate_every=40)
    run = trainer(tmp_path, config)
    run.run()
    predictions, _ = evaluation.predict(run.model, run.problem, run.problem.test)
    found = evaluation.metrics(predictions, list(COLOURS))
    assert found["class"]["accuracy"] == 1.0
    assert found["name"]["token_f1"] == 1.0
    assert evaluation.score(found) == 1.0
    curve = losses(tmp_path)
    assert len(curve) == 80
    assert curve[-1] < 0.2 * curve[0]
    scores = [r["score"] for r in records.read(tmp_path) if r["split"] == "validation"]
    assert scores[-1] == checkpoints.load(checkpoints.best(tmp_path / "checkpoints")).score == 1.0


def test_an_interrupt_waits_for_the_end_of_its_step(tmp_path):
    """Anywhere else it may leave a lock taken, and the run's end waits for ever; the next one raises where it comes."""
    before, seen = signal.signal(signal.SIGINT, signal.default_int_handler), []

    def interrupt(step, record):
        for _ in range(seen.count(3) + 1 if step in (3, 7) else 0):
            signal.raise_signal(signal.SIGINT)
        seen.append(step)

    try:
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path, configuration(checkpoint_every=5), progress=interrupt).run()
        assert seen == [1, 2, 3]
        assert len(losses(tmp_path)) == 3
        again = trainer(tmp_path, configuration(checkpoint_every=5), progress=interrupt)
        again.restore(checkpoints.last_good(tmp_path / "checkpoints")[0])
        with pytest.raises(KeyboardInterrupt):
            again.run()
        assert seen == [1, 2, 3, 4, 5, 6]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "learning_rate": 0.1},
        {"optimizer": "adam"},
        {"schedule": "linear"},
        {"precision": "bf16"},
    ],
)
def test_optimizers_schedules_and_bf16_learn(tmp_path, options):
    trainer(tmp_path, configuration(steps=40, evaluate_every=40, **options)).run()
    curve = losses(tmp_path)
    assert sum(curve[-4:]) < 0.5 * sum(curve[:4])


def test_one_step_is_torchs(tmp_path):
    """Weights, clipping and learning rate of a step, against the same written out with torch alone."""
    config = configuration({"dropout": 0.0}, optimizer="sgd", weights={"text": 0.3, "class": 2.0}, clip=0.5)
    run = trainer(tmp_path, config)
    batch = Steps(run.problem, 8, 0)[0]
    model = built(config)
    total = sum({"text": 0.3, "class": 2.0}[name] * loss for name, loss in model.loss(batch).items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 / 5**2, momentum=0.9)  # first of five steps of warm-up
    total.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    decay = [p.detach() * 0.01 if p.dim() > 1 else torch.zeros_like(p) for p in model.parameters()]
    for p, d in zip(model.parameters(), decay, strict=True):
        if p.grad is not None:
            p.grad += d
    optimizer.step()
    record = run.train_step(batch)
    assert record["loss"] == pytest.approx(total.item(), rel=1e-6)
    assert record["gradient"] == pytest.approx(norm.item(), rel=1e-6)
    assert record["gradient"] > 0.5
    for ours, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batches_are_a_function_of_seed_and_step_and_every_sample_comes_once_an_epoch():
    whole = problem(count=20)
    whole.collate = lambda chosen, draws: [(id(s), g.initial_seed()) for s, g in zip(chosen, draws, strict=True)]
    steps = Steps(whole, 8, seed=3)
    batches = [steps[i] for i in range(5)]
    assert batches == [Steps(whole, 8, seed=3)[i] for i in range(5)]
    seen = [drawn for batch in batches for drawn in batch]
    order = [[sample for sample, _ in epoch] for epoch in (seen[:20], seen[20:])]
    for epoch in order:
        assert sorted(epoch) == sorted(id(s) for s in whole.train)
    assert order[0] != order[1]
    assert len({seed for _, seed in seen}) == 40  # of augmentation: each sample in each epoch its own
    assert Steps(whole, 8, seed=4)[0] != batches[0]
    shares = [Steps(whole, 8, 3, rank, 2)[1] for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(batches[1])


def test_loading_ahead_gives_the_same_batches_and_draws_no_random_number():
    steps = Steps(problem(), 8, seed=0)
    before = torch.get_rng_state()
    found = list(loader(steps, 2, 6, workers=2))
    assert torch.equal(torch.get_rng_state(), before)
    for i, batch in enumerate(found, start=2):
        assert torch.equal(batch.images, steps[i].images)
        assert torch.equal(batch.targets, steps[i].targets)
    assert len(found) == 4


def test_distillation_is_the_softened_divergence():
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    asked = torch.tensor([True, True, False, True, False])
    ours = loop.distill(student, teacher, asked, 3.0)
    theirs = 9 * F.kl_div(
        F.log_softmax(student[asked] / 3, -1),
        F.log_softmax(teacher[asked] / 3, -1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, theirs)))
    assert loop.distill(student, teacher, torch.zeros(5, dtype=torch.bool), 3.0) == 0


def test_a_student_learns_from_its_teacher_alone(tmp_path):
    teacher = trainer(tmp_path / "teacher", configuration(steps=80, evaluate_every=80))
    teacher.run()
    config = configuration(steps=80, evaluate_every=80, weights={"text": 0.0, "class": 0.0})
    student = trainer(tmp_path / "student", config, teacher=teacher.model)
    before = {name: t.clone() for name, t in teacher.model.state_dict().items()}
    student.run()
    predictions, _ = evaluation.predict(student.model, student.problem, student.problem.test)
    assert evaluation.score(evaluation.metrics(predictions, list(COLOURS))) == 1.0
    assert all(torch.equal(t, before[name]) for name, t in teacher.model.state_dict().items())
    record = records.read(tmp_path / "student")[0]
    assert record["loss"] == pytest.approx(record["distill_text"] + record["distill_class"], rel=1e-5)


def test_a_plateau_lowers_the_rate_and_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "score", lambda found: 0.5)
    config = configuration(steps=60, schedule="plateau", patience=1, decay=0.1, stop_after=5, warmup=0)
    run = trainer(tmp_path, config)
    run.run()
    rates = [r["learning_rate"] for r in records.read(tmp_path) if r["split"] == "train"]
    # scores at 5 (the best), 10, 15 (decay), 20, 25 (decay), 30 (fifth without a rise: stop)
    assert rates == pytest.approx([0.01] * 15 + [0.001] * 10 + [0.0001] * 5)
    assert checkpoints.load(checkpoints.newest(tmp_path / "checkpoints")).progress["stopped"]
    again = trainer(tmp_path, config)
    again.restore(checkpoints.last_good(tmp_path / "checkpoints")[0])
    again.run()
    assert len(losses(tmp_path)) == 30


def test_threads_are_the_runs_and_steps_that_wait_are_told_once(tmp_path, monkeypatch, caplog):
    """Steps of 1 s, in which their thread computes for `share`, as where another process has the other one's core."""
    before, share, seen = torch.get_num_threads(), 0.8, []
    monkeypatch.setattr(loop, "WATCHED", 1)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: float(run.step))
    monkeypatch.setattr(loop.time, "thread_time", lambda: share * run.step)
    for threads, share in ((2, 0.8), (1, 0.3), (2, 0.3)):
        config = configuration(steps=2, threads=threads)
        folder = tmp_path / f"{threads}-{share}"
        run = trainer(folder, config, progress=lambda step, record: seen.append(torch.get_num_threads()))
        run.run()
        assert seen == [threads] * 2
        assert torch.get_num_threads() == before
        seen.clear()
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text[:60] for text in told] == ["step 1: computing takes 30% of a step's 1.00 s, the rest is w"[:60]]
    assert "[training] threads = 1 may be faster" in told[0]


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path):
    with pytest.raises(loop.TrainingError, match=r"step \d+: the loss is .* try a lower training.learning_rate"):
        trainer(tmp_path, configuration(optimizer="sgd", learning_rate=1e30, warmup=0)).run()


def test_reference_ops_give_the_same_curve(tmp_path):
    config = configuration(steps=30, evaluate_every=30)
    trainer(tmp_path / "ours", config).run()
    with mmkern.backend("reference"):
        trainer(tmp_path / "reference", config).run()
    torch.testing.assert_close(losses(tmp_path / "ours"), losses(tmp_path / "reference"), atol=1e-4, rtol=0)


def test_a_checkpoint_of_other_weights_data_or_processes_is_refused(tmp_path):
    run = trainer(tmp_path, configuration(steps=1))
    run.run()
    checkpoint = checkpoints.last_good(tmp_path / "checkpoints")[0]
    with pytest.raises(CheckpointError, match=r"has \(4, 16\) float32 for class_head.weight, expected \(4, 32\)"):
        checkpoint.restore_weights(built(configuration({"width": 32})))
    other = trainer(tmp_path)
    other.problem.train = other.problem.train[1:]
    with pytest.raises(CheckpointError, match="was trained on 48 samples, the data now have 47"):
        other.restore(checkpoint)
    other.world = 2
    with pytest.raises(CheckpointError, match="is of 1 processes, these are 2"):
        other.restore(checkpoint)


def test_a_run_killed_at_20_random_moments_has_the_same_bits(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_cases", "torch.utils.tensorboard"])
    whole = context.Process(target=killable, args=(str(tmp_path / "whole"),))
    whole.start()
    whole.join(120)
    expected = losses(tmp_path / "whole")
    assert len(expected) == KILLABLE_STEPS
    folder, draw = tmp_path / "killed", random.Random(5)
    for _ in range(20):
        process = context.Process(target=killable, args=(str(folder),))
        process.start()
        before = len(losses(folder))
        deadline = time.monotonic() + 60
        # wait until it trains, so that the kill hits steps, evaluations and checkpoints, not the imports
        while len(losses(folder)) in (0, before) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        assert process.is_alive(), "training ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    last = context.Process(target=killable, args=(str(folder),))
    last.start()
    last.join(120)
    assert last.exitcode == 0
    assert losses(folder) == expected
    final = [checkpoints.load(checkpoints.newest(tmp_path / name / "checkpoints")) for name in ("whole", "killed")]
    assert final[0].contents == final[1].contents


TWO = """
import os, sys, torch
from training_cases import averaged
from mmkern.training.loop import processes
joined, run = processes("cpu"), averaged(sys.argv[1])
run.run()
if run.rank == 0:
    torch.save([p.grad for p in run.model.parameters()], sys.argv[2])
del run
joined.destroy_process_group()
threads = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in threads), threads  # one left may abort the interpreter's end
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    (tmp_path / "script.py").write_text(TWO)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "two"), str(tmp_path / "gradients.pt")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    run = averaged(tmp_path / "one")
    run.run()
    gradients = torch.load(tmp_path / "gradients.pt")
    compared = 0
    for ours, two in zip(run.model.parameters(), gradients, strict=True):
        assert (ours.grad is None) == (two is None)
        if two is not None:
            torch.testing.assert_close(two, ours.grad, rtol=1e-4, atol=1e-6)
            compared += 1
    assert compared > 20
    one, two = (records.read(tmp_path / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "step", "split"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), (a["step"], name)
    assert checkpoints.load(checkpoints.newest(tmp_path / "two/checkpoints")).progress["processes"] == 2


def test_records_drop_what_a_resumed_run_does_again_and_a_line_cut_short(tmp_path):
    lines = [json.dumps({"step": s, "split": "train", "loss": float(s)}) for s in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "spl')
    assert [r["step"] for r in records.read(tmp_path)] == [1, 2, 3]
    writing = records.Records(tmp_path, step=2)
    writing.add(3, "train", {"loss": 9.0})
    writing.close()
    assert [(r["step"], r["loss"]) for r in records.read(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_predictions_do_not_depend_on_company():
    config = configuration()
    model, whole = built(config), problem()
    together, sums = evaluation.predict(model, whole, whole.test)
    alone = [evaluation.predict(model, whole, [s])[0][0] for s in whole.test]
    assert [(p.text, p.label) for p in together] == [(p.text, p.label) for p in alone]
    assert all((p.text is None) == (p.sample.text is None) for p in together)
    assert model.training
    batch = whole.collate(whole.test, None)
    model.eval()
    assert evaluation.means([sums])["loss_text"] == pytest.approx(model.loss(batch)["text"].item(), rel=1e-5)
    halves = [evaluation.predict(model, whole, part)[1] for part in (whole.test[:5], whole.test[5:])]
    assert evaluation.means(halves) == pytest.approx(evaluation.means([sums]), rel=1e-5)
