"""Rivals: which there are, which can run here, and that those which can are given the same problem."""

import pytest
import torch
from benchmark_cases import softmax_case
from typer.testing import CliRunner

from mmkern import cli
from mmkern.benchmarks import measure, rivals, suite
from mmkern.benchmarks.records import Baseline

NAMES = "MiniLM 128", "CLIP text 77"
SMALL = {c.op: c for c in suite.select(["attention", "attention-causal"], ["float32"]) if c.shape in NAMES}
INSTALLED = [name for name in ("onnxruntime", "openvino") if not rivals.RIVALS[name].missing()]


def test_an_absent_rival_is_told_and_cannot_be_asked_for(monkeypatch):
    monkeypatch.setattr(rivals.util, "find_spec", lambda name: None)
    state = rivals.states(["onnxruntime"])
    assert state["onnxruntime"].startswith("not installed (onnxruntime, onnx): pip install 'mmkern[rivals]'")
    assert state["torch.compile"].startswith(f"torch {torch.__version__}")
    assert state["torch.compile"].endswith("; not asked: --rivals torch.compile")
    assert rivals.chosen(["all"], "cpu") == ["torch.compile", "flexattention"]
    result = CliRunner().invoke(cli.app, ["bench", "--rivals", "openvino"])
    assert result.exit_code == 2
    assert "openvino: not installed" in result.output


def test_without_avx512_zentorch_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(rivals.util, "find_spec", lambda name: object())
    monkeypatch.setattr(rivals._C, "isas", lambda: ["baseline", "avx2"])
    assert rivals.states()["zentorch"] == "without AVX-512 it calls torch's own kernel"
    monkeypatch.setattr(rivals._C, "isas", lambda: ["baseline", "avx2", "avx512"])
    assert rivals.RIVALS["zentorch"].missing() == ""


def test_rivals_are_asked_only_for_what_they_can_do():
    names = list(rivals.RIVALS)
    for case in suite.select(level="quick"):
        problem = case.build(case.dtype, "cpu") if case.op in ("softmax-out", "attention-backward") else None
        if problem:
            assert rivals.baselines(names, case, problem, "cpu") == [], case.id
    (case,) = suite.select(["attention-mask"], ["float32"], "quick")
    able = [b.name for b in rivals.baselines(names, case, case.build(case.dtype, "cpu"), "cpu")]
    assert able == ["torch.compile", "zentorch"]


def test_the_fastest_rival_that_is_right_is_what_counts():
    built = []
    x = torch.randn(64, 256)

    def build():
        built.append(True)
        return lambda: torch.softmax(x, 1)

    rival = rivals._WhenCalled(build)

    def many_times():
        for _ in range(40):
            out = torch.softmax(x, 1)
        return out

    slow = Baseline("eager", many_times)
    case = softmax_case(baselines=[slow], x=x)
    more = [Baseline("rival", rival, prepare=rival), Baseline("cheat", x.clone)]
    result = measure.measure(case, budget=0.0, rivals=lambda case, problem: more)
    assert result.status == "ok", result.error
    assert result.against == "rival"
    assert set(result.screened) == {"eager", "rival", "cheat"}
    assert result.screened["cheat"].startswith("wrong")
    assert built == [True]


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("op", SMALL)
def test_what_is_installed_computes_the_same_and_reads_the_inputs_anew(op, name):
    case = SMALL[op]
    problem = case.build(case.dtype, "cpu")
    (rival,) = rivals.baselines([name], case, problem, "cpu")
    for _ in range(2):
        found = problem.compared((rival.call(),))
        assert measure.right(problem, found, measure.as_outputs(problem.exact())) == ""
        problem.inputs[0].neg_()
