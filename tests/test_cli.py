"""The command line as a user meets it."""

import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import mmkern
from mmkern import cli
from mmkern.benchmarks import machine, model, report, suite

run = CliRunner().invoke


@pytest.fixture
def small(monkeypatch):
    """Two small cases of each dtype, briefly timed."""
    every = suite.select

    def select(ops, dtypes, level, device):
        return [case for case in every(ops or ["softmax"], dtypes, level, device) if case.flops < 1e6]

    monkeypatch.setattr(cli.suite, "select", select)
    monkeypatch.setattr(cli, "BUDGET", dict.fromkeys(cli.BUDGET, 0.01))
    monkeypatch.setattr(machine, "CEILING_SECONDS", 0.01)


def test_bench_prints_tables_and_writes_both_reports(small, tmp_path):
    result = run(cli.app, ["bench", "--quick", "--no-model", "--output", str(tmp_path / "[/out]")])
    assert result.exit_code == 0, result.output
    found = report.Report.from_json((tmp_path / "[/out]" / "report.json").read_text())
    assert {r.op for r in found.results} == {"softmax", "log_softmax"}
    assert all(r.status == "ok" and len(r.pair.ours) >= 5 for r in found.results)
    assert found.options["level"] == "quick"
    assert found.machine["torch"] == torch.__version__
    markdown = (tmp_path / "[/out]" / "report.md").read_text()
    for text in (result.output, markdown):
        assert "geometric mean" in text
        assert "8x32" in text
        assert report.speedup(found.results[0].pair) in text
    assert "[/out]/report.md" in result.output


def test_bench_and_verify_fail_when_a_case_is_wrong(small, tmp_path, monkeypatch):
    right = mmkern.softmax
    monkeypatch.setattr(mmkern, "softmax", lambda x, dim: right(x, dim) * 1.01)
    result = run(cli.app, ["verify", "--quick", "--dtype", "f32"])
    assert result.exit_code == 1
    assert "wrong" in result.output
    assert "max error" in result.output
    result = run(cli.app, ["bench", "--quick", "--no-model", "--dtype", "f32", "--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "WRONG" in result.output
    found = report.Report.from_json((tmp_path / "report.json").read_text())
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
    assert "rotary float64, embed_tokens float64" in result.output
    assert "rotary bfloat16" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--ops", "sofmax"], "no such name: 'sofmax'; choose from"),
        (["bench", "--dtype", "int8"], "no such name: 'int8'; choose from float32, bfloat16, float16"),
        (["bench", "--quick", "--full"], "exclude each other"),
        (["bench", "--device", "tpu"], "expected cpu or cuda, got 'tpu'"),
        (["bench", "--quick", "--ops", "attention-lengths"], "try --full"),
        (["bench", "--output", __file__], "is a file"),
        (["bench", "--colour"], "No such option: --colour"),
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
    result = run(cli.app, ["bench", "--quick", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "no-such-package" in result.output
    assert "no-such-package" in (tmp_path / "report.md").read_text()
