"""What is not believed, each guard with a cheat that it catches. Every cheat is right when it is first called."""

import time

import pytest
import torch
from benchmark_cases import softmax_case
from torch import Tensor

from mmkern.benchmarks import guards, machine, measure
from mmkern.benchmarks.records import Baseline, Pair


class Cached:
    """Computes once and hands out copies."""

    def __init__(self, key=lambda x: 0):
        self.key, self.known = key, {}

    def __call__(self, x):
        key = self.key(x)
        if key not in self.known:
            self.known[key] = torch.softmax(x, 1)
        return self.known[key].clone()


class Later:
    """Right for some calls, then `then`."""

    def __init__(self, then, calls=6):
        self.then, self.calls = then, calls

    def __call__(self, x):
        self.calls -= 1
        return torch.softmax(x, 1) if self.calls >= 0 else self.then(x)


class OneBuffer:
    """Writes every result into the same memory."""

    def __call__(self, x):
        self.out = getattr(self, "out", torch.empty_like(x))
        return torch.softmax(x, 1, out=self.out)


class Lazy(Tensor):
    """A tensor that could compute itself when it is looked at."""


CHEATS = {
    "a cached result": (Cached, "wrong", "in the last timed call"),
    "one cached by address and version": (
        lambda: Cached(lambda x: (x.data_ptr(), x._version)),
        "wrong",
        "in the last timed call",
    ),
    "nothing computed when the clock stops": (lambda: Later(torch.empty_like), "wrong", "in the last timed call"),
    "zeros after the check": (lambda: Later(torch.zeros_like), "wrong", "in the last timed call"),
    "a lazy output": (
        lambda: lambda x: torch.softmax(x, 1).as_subclass(Lazy),
        "refused",
        "a Lazy that is not computed",
    ),
    "the same memory every time": (OneBuffer, "refused", "the first result is lost"),
    "an input written": (lambda: lambda x: torch.softmax(x.add_(1.0), 1), "refused", "writes into its input"),
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_is_refused_and_has_no_time(cheat):
    make, status, why = CHEATS[cheat]
    x = torch.randn(64, 256)
    baseline = Baseline("eager", lambda: torch.softmax(x, 1))
    result = measure.measure(softmax_case(make(), [baseline], x), budget=0.02)
    assert (result.status, result.pair, result.cold) == (status, None, None), result.error
    assert why in result.error


def test_an_output_in_the_memory_of_an_input_is_refused():
    x = torch.randn(4, 4)
    guards.fresh((x.clone(),), (x.clone(),), [x])
    with pytest.raises(guards.Refused, match="in the memory of an input"):
        guards.fresh((x.clone(),), (x[1:],), [x])


def test_an_honest_call_passes_the_same_guards():
    result = measure.measure(softmax_case(lambda x: torch.softmax(x, 1)), budget=0.02)
    assert result.status == "ok", result.error
    assert len(result.pair.ours) >= guards.MIN_ROUNDS


@pytest.mark.parametrize("x", [torch.zeros(64, 256), torch.full((64, 256), 2.0), torch.eye(64, 256)])
def test_zeros_and_constants_are_no_inputs(x):
    result = measure.measure(softmax_case(x=x), budget=0.0)
    assert (result.status, result.pair) == ("refused", None)
    assert "zeros or constant" in result.error


def test_a_time_below_the_ceiling_is_refused():
    ceilings = machine.Ceilings(seconds=0.02)
    case = softmax_case(flops=1e15, bound="fma")
    result = measure.measure(case, budget=0.0, ceilings=ceilings)
    assert (result.status, result.pair) == ("refused", None)
    assert "not everything was computed" in result.error


def test_a_wrong_rival_is_no_yardstick_of_speed():
    x = torch.randn(64, 256)
    rivals = [Baseline("eager", lambda: (time.sleep(1e-3), torch.softmax(x, 1))[1]), Baseline("fast", x.clone)]
    result = measure.measure(softmax_case(baselines=rivals, x=x), budget=0.0)
    assert result.against == "eager"
    assert result.screened["fast"].startswith("wrong: relative L2")
    late = [Baseline("eager", rivals[0].call), Baseline("fast", lambda: cheat(x))]
    cheat = Later(torch.zeros_like, calls=12)
    result = measure.measure(softmax_case(baselines=late, x=x), budget=0.0)
    assert (result.status, result.pair) == ("error", None)
    assert "fast was wrong in its last timed call" in result.error


def test_warm_and_cold_are_told_apart(monkeypatch):
    """Between two cold calls the caches are overwritten; the warm ones are repeated on the same data."""
    events = []
    monkeypatch.setattr(measure, "flush", lambda: events.append("flush"))
    measure.cold(lambda: events.append("ours"), Baseline("", lambda: events.append("theirs")))
    assert events == ["flush", "ours", "flush", "theirs"] * measure.COLD_ROUNDS
    result = measure.measure(softmax_case(), budget=0.02)
    assert len(result.cold) == 2
    assert min(result.cold) > 0
    assert measure.measure(softmax_case(bound="fma"), budget=0.0).cold is None


def test_tiny_cases_are_timed_on_one_thread_as_well(monkeypatch):
    seen = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(4, 32)
        call = Baseline("eager", lambda: (seen.append(torch.get_num_threads()), torch.softmax(x, 1))[1])
        result = measure.measure(softmax_case(baselines=[call], x=x), budget=0.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert result.status == "ok", result.error
    assert set(seen) == {1, 2}
    assert result.one_thread.speedup > 0


def a_pair(ours, theirs, spread=0.01, busy=(2.0, 2.0), rounds=5):
    ratio = theirs / ours
    return Pair([ours] * rounds, [theirs] * rounds, ratio, ratio * (1 - spread), ratio * (1 + spread), busy)


@pytest.mark.parametrize(
    ("pair", "one_thread", "why"),
    [
        (a_pair(1e-3, 2e-3), None, None),
        (a_pair(8e-3, 16e-3), a_pair(15e-3, 30e-3), None),
        (a_pair(1e-3, 2e-3, rounds=1), None, "measured once"),
        (a_pair(1e-3, 2e-3, rounds=3), None, "measured 3 times"),
        (a_pair(1e-3, 2e-3, spread=0.2), None, "unstable: 1.60 to 2.40"),
        (a_pair(1e-3, 2e-3, busy=(0.5, 2.0)), None, "preempted: mmkern ran 50%"),
        (a_pair(1e-3, 2e-3, busy=(2.0, 0.8)), None, "preempted: torch ran 80%"),
        (a_pair(1e-3, 2e-3, busy=(0.0, 0.0)), None, None),
        (a_pair(7e-6, 8.1e-3), a_pair(7e-6, 9e-6), "torch: 8.1 ms, on one thread 0.009 ms: a multiple of the sched"),
        (a_pair(7e-6, 9e-5), a_pair(7e-6, 9e-6), "torch: 0.09 ms, on one thread 0.009 ms: its threads wait"),
    ],
)
def test_what_gives_no_verdict(pair, one_thread, why):
    found = guards.doubts(pair, one_thread)
    assert found[0].startswith(why) if why else not found, found
    assert [note for note in guards.doubts(pair, one_thread, "cuda") if note.startswith(("preempted", "torch"))] == []


def test_processor_time_tells_a_stretch_that_did_not_run():
    def sleepy():
        time.sleep(5e-3)

    pair, _ = measure.time_pair(sleepy, Baseline("", sleepy), budget=0.0, rounds=20)
    assert 0 < max(pair.busy) < guards.IDLE
