"""Two reports side by side, shapes of a user's own, and which backend takes what."""

import random
from dataclasses import replace

import pytest
import torch
from benchmark_cases import a_report, a_result
from typer.testing import CliRunner

from mmkern import cli
from mmkern.benchmarks import comparing, explaining, measure, shapes, trace
from mmkern.benchmarks.trace import Report

CASES, ROUNDS = 120, 15
run = CliRunner().invoke


def a_run(seed, slowed=None, by=1.1, drift=1.0):
    """Cases with 3% of noise a round; the machine `drift` times slower as a whole, one kernel `by` times."""
    draw = random.Random(seed)
    results = []
    for i in range(CASES):
        both = [drift * draw.uniform(1.0, 1.3) for _ in range(ROUNDS)]  # the machine's mood: the same for both sides
        ours = [1e-3 * m * draw.lognormvariate(0, 0.03) * (by if i == slowed else 1.0) for m in both]
        theirs = [2e-3 * m * draw.lognormvariate(0, 0.03) for m in both]
        result = a_result("softmax", f"s{i}", "float32", 2.0)
        results.append(replace(result, pair=measure.compare(ours, theirs, (2.0, 2.0))))
    noise = [{"calls": {}, "floor": 0.02, "busy": 2.0, "threads": 2}]
    machine = {"processor": "one", "cores": 2, "threads": 2, "load": 0.1}
    return Report(f"{seed}", {}, machine, [r.id for r in results], results, noise=noise, complete=True)


def test_a_run_against_itself_flags_nothing_in_five_runs():
    for seed in range(5):
        assert not [c for c in comparing.compare_reports(a_run(seed), a_run(seed + 100, drift=1.4)) if c.significant]


@pytest.mark.parametrize("by", [1.1, 0.9])
def test_a_kernel_slowed_by_a_tenth_is_flagged_alone(by):
    changes = comparing.compare_reports(a_run(1), a_run(2, slowed=7, by=by, drift=0.8))
    assert [c.shape for c in changes if c.significant] == ["s7"]
    assert [c.shape for c in changes if c.slower] == (["s7"] if by > 1 else [])
    (row,) = comparing.changes_table(changes).rows
    assert row[-1] == ("slower" if by > 1 else "faster")


def test_only_what_both_judged_is_compared():
    old, new = a_run(1), a_run(2, slowed=7)
    new.results[7].notes = ["unstable: 1 to 3"]
    assert not [c for c in comparing.compare_reports(old, new) if c.significant]
    new.results = new.results[7:8]
    with pytest.raises(ValueError, match="no case in common that both give a verdict on"):
        comparing.compare_reports(old, new)
    new = a_run(2, slowed=7)
    new.results[7].against = "another"
    assert comparing.compare_reports(old, new)[7].times == pytest.approx(1.1, abs=0.15), "by its own times"


def test_reports_of_different_machines_are_refused_with_the_reason(tmp_path):
    old, new = a_run(1), a_run(2)
    new.machine["processor"] = "another"
    for name, one in (("old", old), ("new", new)):
        trace.save(tmp_path / name / trace.NAME, one)
    result = run(cli.app, ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert result.exit_code == 2
    assert "different machines cannot be compared: processor one and another" in result.output


def test_the_command_fails_on_a_slowdown_if_asked(tmp_path):
    for name, one in (("old", a_run(1)), ("new", a_run(2, slowed=7)), ("same", a_run(3))):
        trace.save(tmp_path / name / trace.NAME, one)
    old = str(tmp_path / "old")
    for name, flags, status in (("new", [], 0), ("new", ["--fail"], 1), ("same", ["--fail"], 0)):
        result = run(cli.app, ["compare", old, str(tmp_path / name), *flags])
        assert result.exit_code == status, result.output
        assert f"{CASES} cases compared: {int(name == 'new')} slower" in result.output


MINE = """
[[shape]]
op = "attention-causal"
name = "my decoder"
batch = 2
heads = [6, 3]
q_len = 33
k_len = 33
head_dim = 24
dtype = ["float32", "bfloat16"]

[[shape]]
op = "attention-backward"
name = "my trained"
batch = 1
heads = 2
q_len = 19
k_len = 19
head_dim = 16

[[shape]]
op = "softmax"
name = "my classes"
size = [6, 50]

[[shape]]
op = "rotary"
size = [2, 4, 2, 9, 16]
dtype = ["float16"]

[[shape]]
op = "cross_entropy"
name = "mine"
size = [5, 41]

[[shape]]
op = "add_positional_encoding"
name = "mine"
size = [2, 9, 16]
"""


def test_shapes_of_a_users_own_are_right_and_have_their_size(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE)
    cases = shapes.read_shapes(path)
    assert [c.dims for c in cases[:2]] == ["2x6/3x33x24"] * 2
    assert cases[0].flops == 4 * 2 * 6 * 24 * 33 * 34 / 2
    assert {c.op for c in cases} == {
        "attention-causal", "attention-backward", "softmax", "rotary", "cross_entropy", "add_positional_encoding"
    }  # fmt: skip
    for case in cases:
        result = measure.measure(case, timed=False)
        assert result.status == "ok", (case.id, result.error)
    result = run(cli.app, ["verify", "--shapes", str(path), "--dtype", "f32"])
    assert result.exit_code == 0, result.output
    assert "my decoder" in result.output
    assert "max error" in result.output
    assert "all 5 cases are right" in result.output


ATTENTION = 'op = "attention"\nbatch = 1\nheads = [4, 2]\nq_len = 8\nk_len = 8\n'


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no [[shape]] in it"),
        ("shape = []", "no [[shape]] in it"),
        ("[[shape]]\nop = 3", "shape 1: no such op: 3; choose from"),
        ('[[shape]]\nop = "softmax"', "shape 1: size: expected some positive integers, got None"),
        ('[[shape]]\nop = "softmax"\nsize = [3, -1]', "size: expected some positive integers, got [3, -1]"),
        ('[[shape]]\nop = "rotary"\nsize = [3, 1]', "size: expected 5 positive integers, got [3, 1]"),
        ('[[shape]]\nop = "softmax"\nsize = [3]\nsizes = 1', "no such key: sizes"),
        ('[[shape]]\nop = "softmax"\nsize = [3]\ndtype = ["int8"]', "dtype: expected a list of float32"),
        (f"[[shape]]\n{ATTENTION}", "head_dim: expected a positive integer, got None"),
        (f"[[shape]]\n{ATTENTION}head_dim = 8.5", "head_dim: expected a positive integer, got 8.5"),
        (f"[[shape]]\n{ATTENTION}head_dim = 8\nwindow = 3", "no such key: window"),
        (f"[[shape]]\n{ATTENTION.replace('[4, 2]', '[4, 3]')}head_dim = 8", "4 query heads are no multiple of 3"),
        ('[[shape]]\nop = "softmax"\nsize = [3]\n' * 2, "two shapes of one op have the same name"),
        ('[[shape]]\nop = "softmax"\nsize = [3000000, 4000000]', "of memory are free"),
    ],
)
def test_bad_shapes_are_told_in_one_line(tmp_path, text, why, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--shapes", str(path), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_calls_are_folded_to_as_few_words_as_tell_them():
    ops, dtypes = ["a", "b", "c"], ["f32", "bf16", "f64"]
    folded = explaining.folded
    assert folded([(o, d) for o in ops for d in dtypes], ops, dtypes) == "all"
    assert folded([(o, "f64") for o in ops], ops, dtypes) == "f64: all ops"
    assert folded([("a", d) for d in dtypes], ops, dtypes) == "all dtypes: a"
    assert folded([("a", "f64"), ("b", "f64"), ("c", "f32")], ops, dtypes) == "f64: a, b; f32: c"


def test_resuming_goes_on_with_what_is_left_and_with_nothing_else(tmp_path):
    path, folder = tmp_path / "mine.toml", str(tmp_path / "out")
    path.write_text(MINE)
    begin = ["bench", "--in-process", "--shapes", str(path), "--ops", "softmax", "--output", folder]
    result = run(cli.app, begin)
    assert result.exit_code == 0, result.output
    file = tmp_path / "out" / trace.NAME
    lines = file.read_text().splitlines(keepends=True)
    kept = next(line for line in lines if '"kind": "measurement"' in line)
    file.write_text("".join(lines[:2]) + kept + '{"half a li')
    result = run(cli.app, [*begin, "--resume"])
    assert result.exit_code == 0, result.output
    found = trace.read(file)
    assert found.complete
    assert [r.dtype for r in found.results] == ["float32", "bfloat16", "float16"]
    assert kept in file.read_text(), "what was measured is not measured again"
    for extra, why in (([], "is complete"), (["--dtype", "f32"], "begun with other options")):
        again = run(cli.app, [*begin, "--resume", *extra])
        assert again.exit_code == 2
        assert why in again.output
    before = trace.read(file)
    assert trace.different_build(before, a_report()) or before.machine["commit"] == a_report().machine["commit"]
    assert torch.get_num_threads() == found.machine["threads"]
