"""Benchmarks of gradients: the rule that judges them, random numbers that a check can repeat, and peak memory."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import mmkern
from mmkern.benchmarks import bench_attention_training, checking, measure, suite, tables
from mmkern.benchmarks.bench_attention_training import DROPOUT, _Gradients
from mmkern.benchmarks.memory import peak_bytes
from mmkern.benchmarks.records import Baseline, Case, Problem
from mmkern.benchmarks.trace import Report, read, save
from mmkern.testing import randn

MIB = 1 << 20
SLACK = 4096  # scalars and sizes that an operator allocates on its way
SMALL = bench_attention_training.Shape("attention-dropout", "test", 2, (3, 3), 33, 33, 16, options=DROPOUT)


def case(problem: Problem, op: str = "softmax") -> Case:
    return Case("softmax", op, "test", "64x64", torch.float32, lambda dtype, device: problem, 1e6, 1e6, "copy")


def test_gradients_may_be_three_times_as_far_off_as_torch_and_values_twice():
    exact = randn(64, 64).double()
    baseline = (exact + 1e-6 * randn(64, 64, seed=1).sign()).float()
    ours = (exact + 2.5e-6 * randn(64, 64, seed=2).sign()).float()
    problem = Problem(lambda: ours, [Baseline("torch", lambda: baseline)], lambda: exact, kind="gradient")
    assert measure.check(problem)[0].ok
    assert not measure.check(replace(problem, kind="forward"))[0].ok


def test_a_check_repeats_what_is_drawn_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    problem = bench_attention_training.build(SMALL, torch.float32, "cpu")
    for _ in range(2):
        torch.rand(3)  # whatever was drawn before
        assert measure.check(problem)[0].ok
    torch.set_rng_state(before)
    measure.check(problem)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_check_sees_another_mask(monkeypatch):
    problem = bench_attention_training.build(SMALL, torch.float32, "cpu")
    monkeypatch.setattr(checking, "SEED", checking.SEED + 1)
    assert measure.measure(case(problem), timed=False).status == "wrong"


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_the_formula_that_stands_for_torch_with_dropout_is_torch(p, causal):
    q, k, v = (randn(2, 3, 33, 16, seed=seed) for seed in range(3))
    keep = randn(2, 3, 33, 33, seed=3) > 0 if p else torch.ones(2, 3, 33, 33, dtype=torch.bool)
    found = bench_attention_training._with_dropout(keep, {"dropout_p": p, "is_causal": causal}, q, k, v)
    attend = torch.ops.aten._scaled_dot_product_attention_math
    torch.testing.assert_close(found, attend(q, k, v, None, p, causal, keep)[0])


def test_backward_alone_is_timed_on_one_graph_and_training_makes_a_new_one():
    calls = []

    def forward(x):
        calls.append(True)
        return x.sin()

    x, grad = randn(8), randn(8, seed=1)
    for once, expected in ((True, 1), (False, 3)):
        calls.clear()
        call = _Gradients(forward, [x], grad, once)
        for _ in range(3):
            torch.testing.assert_close(call()[0], grad * x.cos())
        assert len(calls) == expected


def test_work_of_gradients():
    found = {c.op: c for c in suite.select(["attention"], ["bfloat16"], "quick")}
    causal = found["attention-backward-causal"]
    assert causal.flops == 5 * 2 * 32 * 128 * 512 * 513 / 2
    assert causal.bytes == 2 * 4 * (32 + 8) * 512 * 128
    assert found["attention-mask-gradient"].flops == 7 * 2 * 256 * 3 * 32 * 49 * 49


def test_peak_memory_of_known_calls():
    x = torch.ones(MIB // 4)
    into = torch.empty_like(x)
    for call, expected in (
        (lambda: x + 1, 1),
        (lambda: x + 1 + 1 + 1 + 1, 2),  # one read while the next is written
        (lambda: [x + i for i in range(5)], 5),
        (lambda: torch.add(x, 1, out=into), 0),
        (lambda: torch.sum(x + 1), 1),
    ):
        for _ in range(2):  # whatever the allocator kept from before
            assert MIB * expected <= peak_bytes(call) <= MIB * expected + SLACK


def test_what_is_given_back_does_not_hide_what_is_needed_before():
    held = [torch.ones(MIB // 4) for _ in range(4)]

    def call():
        made = held[0] + 1
        held.clear()
        return made

    assert MIB <= peak_bytes(call) <= MIB + SLACK


def test_memory_of_kernels_and_of_saved_tensors_is_seen():
    q, k, v = (randn(1, 4, 512, 64, seed=seed) for seed in range(3))
    out, scores = q.nbytes, 4 * 512 * 512 * 4
    assert out <= peak_bytes(lambda: mmkern.scaled_dot_product_attention(q, k, v)) < 1.1 * out
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert peak_bytes(_Gradients(F.scaled_dot_product_attention, leaves, v.detach())) > 2 * scores


def test_reports_show_peak_memory_where_gradients_are_computed(tmp_path):
    x, grad = randn(64, 64), randn(64, 64, seed=1)
    ours, theirs = partial(mmkern.softmax, dim=1), partial(torch.softmax, dim=1)
    exact = _Gradients(theirs, [x.double()], grad.double())
    training = Problem(
        _Gradients(ours, [x], grad), [Baseline("eager", _Gradients(theirs, [x], grad))], exact, kind="gradient"
    )
    plain = Problem(partial(ours, x), [Baseline("eager", partial(theirs, x))], lambda: theirs(x.double()))
    results = [measure.measure(case(p, op), budget=0.0) for p, op in ((plain, "softmax"), (training, "backward"))]
    assert [r.status for r in results] == ["ok", "ok"], [r.error for r in results]
    assert (results[0].peak_bytes, results[0].torch_peak_bytes) == (None, None)
    assert min(results[1].peak_bytes, results[1].torch_peak_bytes) >= 2 * x.nbytes  # output and gradient

    results[1].peak_bytes, results[1].torch_peak_bytes = 3 * MIB, 1536
    (table,) = tables.family_tables(results)
    column = table.header.index(tables.MEMORY)
    assert [row[column] for row in table.rows] == ["", "3.00 MiB (1.50 KiB)"]
    (table,) = tables.family_tables(results[:1])
    assert tables.MEMORY not in table.header
    assert {len(row) for row in table.fit(80).rows} == {len(table.fit(80).header)}
    whole = Report("now", {}, {"processor": "one"}, results=results)
    save(tmp_path / "report.jsonl", whole)
    assert [(r.peak_bytes, r.torch_peak_bytes) for r in read(tmp_path).results] == [(None, None), (3 * MIB, 1536)]
    assert tables.memory(5 * MIB * 1024) == "5.00 GiB"
