"""The gate of instruction counts: what a profile says, and what is flagged."""

import json

import pytest

from mmkern.benchmarks import instructions

# The extension's name first appears where it is called; costs after `calls=` are the callee's; a cost of 0 is left out.
PROFILE = """# callgrind format
desc: Trigger: dump softmax-one-float32
positions: line
events: Ir

ob=(1) /usr/lib/libpython3.11.so
fl=(1) ceval.c
fn=(1) call
10 700
cob=(2) /home/me/mmkern/_C.cpython-311-x86_64-linux-gnu.so
cfn=(2) softmax_rows
calls=1 0
+1 5000

ob=(2)
fn=(2)
20 1200
+3 30
-2

* 4
cob=(3) /usr/lib/libm.so.6
cfn=(3) expf
calls=9 0
* 900
ob=(3)
fn=(3)
1 900
ob=(4) /home/me/mmkern/_Codec.so
fn=(4)
1 77
"""


def test_only_what_the_extension_itself_executes_is_counted():
    assert instructions.own_instructions(PROFILE) == 1200 + 30 + 4


def test_growth_beyond_two_percent_is_flagged():
    before = {"a": 1000, "b": 1000, "c": 1000, "gone": 5}
    assert instructions.grown(before, {"a": 1020, "b": 1021, "c": 900, "new": 7}) == [
        "b: 1000 instructions before, 1021 now: +2.1%"
    ]


def test_every_op_that_has_a_small_case_is_counted():
    ops = {case.op for case in instructions.cases()}
    assert {"softmax", "attention", "attention-causal", "rotary", "cross_entropy", "embed_tokens-training"} <= ops
    ids = [case.id for case in instructions.cases()]
    assert len(set(ids)) == len(ids)


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "instructions.json"
    monkeypatch.setattr(instructions, "TABLE", path)
    monkeypatch.setattr(instructions, "ISA", "baseline")
    return path


def test_the_gate_fails_on_growth_and_is_made_anew_when_asked(table, monkeypatch):
    monkeypatch.setattr(instructions, "count", lambda: {"b": 2000, "a": 1000})
    instructions.main(["--update"])
    assert list(json.loads(table.read_text())["counts"]) == ["a", "b"]
    for counts, status in (({"a": 1000, "b": 2000}, 0), ({"a": 1100, "b": 2000}, 1)):
        monkeypatch.setattr(instructions, "count", lambda counts=counts: counts)
        with pytest.raises(SystemExit) as stopped:
            instructions.main([])
        assert stopped.value.code == status


def test_a_table_of_another_compiler_is_refused(table):
    with pytest.raises(SystemExit, match="is missing; make it with --update"):
        instructions.main([])
    table.write_text(json.dumps({"compiler": "another", "counts": {}}))
    with pytest.raises(SystemExit, match="was made with another"):
        instructions.main([])
    with pytest.raises(SystemExit, match="the only argument is --update"):
        instructions.main(["--often"])
