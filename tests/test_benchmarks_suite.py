"""The cases: which a run takes, how their work is counted, that each is right, and the text that the model reads."""

import math
import subprocess
import sys

import pytest
import torch

from mmkern.benchmarks import guards, measure, model, suite
from mmkern.benchmarks.inputs import ELEMENTS, Rows, normal


def test_selection_by_op_family_dtype_and_level():
    every = suite.select(level="full")
    assert len({case.id for case in every}) == len(every)
    assert {case.op for case in suite.select(["position"])} == {
        name + part for name in ("rotary", "add_positional_encoding", "embed_tokens") for part in ("", "-training")
    }
    assert {case.op for case in suite.select(["log_softmax"], ["bfloat16"])} == {"log_softmax"}
    quick, default = ({case.id for case in suite.select(level=level)} for level in ("quick", "default"))
    assert quick < default < {case.id for case in every}
    assert {case.op for case in suite.select(level="quick")} == {case.op for case in every} - {
        "attention-lengths",
        "linear_cross_entropy",
    }
    for wrong in ({"ops": ["nope"]}, {"dtypes": ["int8"]}, {"level": "later"}):
        with pytest.raises(ValueError, match="choose from"):
            suite.select(**wrong)


def test_a_gpu_gets_cases_that_fill_it():
    cpu, gpu = suite.select(), suite.select(device="cuda")
    known = {case.id for case in cpu}
    more = [case for case in gpu if case.id not in known]
    assert {case.level for case in more} == {"gpu"}
    assert not {case.level for case in cpu} & {"gpu", "full"}
    assert {"attention", "attention-causal", "attention-decode", "attention-backward"} <= {case.op for case in more}
    assert min(case.flops for case in more if case.op == "attention") > 1e11


def test_work_is_counted_by_what_is_visible():
    found = {case.op: case for case in suite.select(["attention"], ["float32"], "quick")}
    causal = found["attention-causal"]
    assert causal.dims == "1x32/8x512x128"
    assert causal.flops == 4 * 32 * 128 * 512 * 513 / 2
    window = found["attention-window"]
    assert window.flops == 4 * 8 * 64 * sum(min(i + 1, 128) for i in range(1024))
    decode = found["attention-decode"]
    assert decode.bytes == 4 * 2 * 8 * 12 * 64 * (1 + 1024)


# one small case of each op: the whole suite is `mmkern verify`
SMALL = {case.op: case for case in sorted(suite.select(level="quick"), key=lambda case: -case.flops)}


@pytest.mark.parametrize("op", SMALL)
def test_every_op_has_a_case_that_is_right(op):
    result = measure.measure(SMALL[op], timed=False)
    assert result.status == "ok", result.error
    assert result.ran
    assert all(": cpu (" in line for line in result.ran), result.ran


@pytest.mark.parametrize("op", SMALL)
def test_every_baseline_computes_what_ours_does(op):
    case = SMALL[op]
    problem = case.build(torch.float32, "cpu")
    exact = measure.as_outputs(problem.exact())
    found = {}
    if problem.yardstick:  # a baseline that draws its own random numbers computes something else
        found["yardstick"] = measure.as_outputs(problem.yardstick())
    else:
        for baseline in problem.baselines:
            with baseline.context():
                found[baseline.name] = problem.compared(measure.as_outputs(baseline.call()))
    for name, outputs in found.items():
        for a, e in zip(outputs, exact, strict=True):
            assert a.numel() >= min(512, e.numel()) > 0
            assert torch.allclose(a.double(), e, rtol=1e-4, atol=1e-4), (case.id, name)


@pytest.mark.parametrize("op", SMALL)
def test_every_case_changes_what_its_output_depends_on(op):
    problem = SMALL[op].build(torch.float32, "cpu")
    assert problem.inputs
    change, seen = guards.Changes(problem.inputs), [measure.as_outputs(problem.exact())]
    for last in (False, True):
        change(last)
        now = measure.as_outputs(problem.exact())
        for earlier in seen:
            assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(earlier, now, strict=True))
        seen.append(now)


def test_rows_are_a_seeded_sample_with_the_first_and_the_last():
    x = torch.arange(3000 * 2000.0).view(3000, 2000)
    rows = Rows(x.shape)
    picked = rows(x)
    assert picked.shape == (ELEMENTS // 2000, 2000)
    assert picked[0, 0] == 0
    assert picked[-1, -1] == x[-1, -1]
    assert torch.equal(picked, Rows(x.shape)(x))
    assert not torch.equal(picked, Rows(x.shape, seed=1)(x))
    columns = Rows((4, 3, 5), 1)
    y = torch.randn(4, 3, 5)
    assert torch.equal(columns(y), y.movedim(1, -1).reshape(-1, 3))
    assert torch.equal(Rows((4, 3))(torch.arange(3)), torch.arange(3).expand(4, 3))


def test_long_inputs_have_no_two_equal_rows():
    x = normal(1200, 1000, seed=3)
    assert len(x.unique(dim=0)) == 1200
    assert x.std() == pytest.approx(1, abs=0.01)
    y = normal(2, 3, 700, 300, layout="transposed")
    assert y.shape == (2, 3, 700, 300)
    assert y.transpose(1, 2).is_contiguous()


def test_the_model_reads_real_text_of_mixed_lengths():
    sentences, passages = model.sentences(), model.passages()
    assert len(sentences) == len(set(sentences)) == 256
    lengths = sorted(map(len, sentences))
    assert lengths[0] >= 20
    assert lengths[-1] > 3 * lengths[len(lengths) // 4]
    assert len(passages) == 16
    assert len({len(p) for p in passages}) == 16
    assert math.isclose(sum(p.count("e") for p in passages) / sum(map(len, passages)), 0.1, abs_tol=0.04), "English"


def test_benchmarks_need_torch_alone():
    code = (
        "import sys; import mmkern.benchmarks.suite, mmkern.benchmarks.report, mmkern.benchmarks.model;"
        "assert not {'typer', 'rich', 'transformers', 'pytest'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
