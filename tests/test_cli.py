"""The command line as a user meets it."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import mmkern
from mmkern import cli
from mmkern.benchmarks import commands, machine, model, noise, suite, tables, trace
from mmkern.benchmarks.run import PLANS, Plan

run = CliRunner().invoke
PATIENT = Plan(0.01, 600.0, 6000.0)  # a machine that is busy with other tests leaves no round out
BENCH = ["bench", "--quick", "--in-process"]  # in this process, where the tests' replacements hold


@pytest.fixture
def small(monkeypatch):
    """Two small cases of each dtype, briefly timed."""
    every = suite.select

    def select(ops, dtypes, level, device):
        return [case for case in every(ops or ["softmax"], dtypes, level, device) if case.flops < 1e6]

    monkeypatch.setattr(suite, "select", select)
    monkeypatch.setattr(commands, "PLANS", dict.fromkeys(PLANS, PATIENT))
    monkeypatch.setattr(noise, "SECONDS", 0.01)
    monkeypatch.setattr(machine.Ceilings.__init__, "__defaults__", (0.01, "cpu"))


def test_bench_prints_tables_and_writes_both_reports(small, tmp_path):
    result = run(cli.app, [*BENCH, "--output", str(tmp_path / "[/out]")])
    assert result.exit_code == 0, result.output
    found = trace.read(tmp_path / "[/out]")
    assert found.complete
    assert {r.op for r in found.results} == {"softmax", "log_softmax"}
    assert all(r.status == "ok" and len(r.pair.ours) >= 5 for r in found.results)
    assert found.options["level"] == "quick"
    assert found.machine["torch"] == torch.__version__
    markdown = (tmp_path / "[/out]" / "report.md").read_text()
    for text in (result.output, markdown):
        assert "geometric mean" in text
        assert "8x32" in text
        assert tables.duration(found.results[0].seconds) in text
    assert "[/out]/report.md" in result.output.replace("\n", "")
    assert "5/5 log_softmax smallest bf16: " in result.stderr, "off a terminal each case is a line"


def test_bench_and_verify_fail_when_a_case_is_wrong(small, tmp_path, monkeypatch):
    right = mmkern.softmax
    monkeypatch.setattr(mmkern, "softmax", lambda x, dim: right(x, dim) * 1.01)
    result = run(cli.app, ["verify", "--quick", "--dtype", "f32"])
    assert result.exit_code == 1
    assert "wrong" in result.output
    assert "max error" in result.output
    result = run(cli.app, [*BENCH, "--dtype", "f32", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "WRONG" in result.output
    found = trace.read(tmp_path)
    assert {r.op: r.status for r in found.results} == {"softmax": "wrong", "log_softmax": "ok"}


def test_verify_counts_right_cases(small):
    result = run(cli.app, ["verify", "--quick"])
    assert result.exit_code == 0, result.output
    assert "all 5 cases are right" in result.output


def test_info_names_the_build():
    result = run(cli.app, ["info"])
    assert result.exit_code == 0, result.output
    for text in (mmkern.__version__, torch.__version__, machine.facts()["isa"], "GFLOP/s", "GB/s"):
        assert text in result.output


def test_explain_tells_what_runs_and_why_not():
    result = run(cli.app, ["explain", "rotary,embed_tokens", "--dtype", "bf16,float64"])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["rotary", "cpu", machine.facts()["isa"], "reference"] in lines
    assert "cpu the kernels take float32, bfloat16 and float16, not torch.float64" in " ".join(result.output.split())
    assert "float64: all ops" in result.output
    assert len(result.output.splitlines()) < 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--ops", "sofmax"], "no such name: 'sofmax'; choose from"),
        (["bench", "--dtype", "int8"], "no such name: 'int8'; choose from float32, bfloat16, float16"),
        (["bench", "--quick", "--full"], "exclude each other"),
        (["bench", "--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
        (["bench", "--quick", "--ops", "attention-lengths"], "no quick case has --ops 'attention-lengths'; try --full"),
        (["bench", "--shape", "GPT-7"], "no default case has --shape 'GPT-7'; try --full"),
        (["bench", "--output", __file__], "is a file"),
        (["bench", "--colour"], "No such option: --colour"),
        (["bench", "--fail"], "--fail needs --compare"),
        (["bench", "--compare", "no/such.jsonl"], "no/such.jsonl: No such file"),
        (["bench", "--compare", __file__], "line 1 is not JSON"),
        (["bench", "--rivals", "tensorflow"], "no such rival: 'tensorflow'; choose from"),
        (["bench", "--resume", "--output", "no/such"], "--resume: no/such/report.jsonl: No such file"),
        (["bench", "--shapes", "no/such.toml"], "no/such.toml: No such file"),
        (["verify", "--shapes", __file__], "Expected '=' after a key"),
        (["compare", "no/such"], "no/such: No such file"),
        (["report", "no/such"], "no/such: No such file"),
        (["verify", "extra"], "extra"),
        (["explain", "nope"], "no such name: 'nope'"),
        (["explain", "softmax", "--dtype", "int8"], "no such dtype: 'int8'"),
        (["brench"], "No such command 'brench'"),
        ([], "Missing command"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("mmkern: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("absent", ["typer", "rich"])
def test_a_missing_extra_is_one_sentence(absent):
    code = f"import sys; sys.modules[{absent!r}] = None; import mmkern.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'mmkern[bench]'" in done.stderr


def test_a_missing_model_is_told_and_not_fatal(small, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "PACKAGE", "no_such_package")
    everything = commands._select
    monkeypatch.setattr(commands, "_select", lambda *given: (everything(*given)[0][:1], "default"))
    result = run(cli.app, ["bench", "--in-process", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "no-such-package" in result.output
    assert "no-such-package" in (tmp_path / "report.md").read_text()
