"""What a time must stand up to before it is believed: cached, lazy, aliased, impossible results, a busy machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkern.benchmarks.records import Outputs, Pair, Result
from mmkern.benchmarks.statistics import median

WIDE = 1.25  # highest over lowest end of an interval from which on it says too little
IDLE = 0.85  # processor time over elapsed time below which something else ran
SHORTEST_COUNTED = 0.04  # seconds of one side; processor time comes in steps of up to 10 ms
SLICE = 4e-3  # a scheduler's slice at 250 Hz, the usual setting
ABOVE_CEILING = 1.5  # times the machine's best that no kernel is believed to reach
PICKED = 4096  # elements of an input that are looked at
OFTEN_CHANGED = 1 << 24  # bytes up to which an input changes every round: more would cost more than the calls
MIN_ROUNDS = 5


class Refused(Exception):
    """Why a measurement is not believed."""


def _picked(x: Tensor) -> Tensor:
    """A copy of seeded elements of x."""
    draw = torch.Generator().manual_seed(x.numel())
    index = torch.randint(x.numel(), (min(PICKED, x.numel()),), generator=draw)
    return x.detach()[torch.unravel_index(index, x.shape)]


def inputs_vary(inputs: Sequence[Tensor]) -> None:
    """Raises Refused for zeros and constants: they multiply faster, draw less power, and hide a wrong index."""
    for x in inputs:
        if x.numel() >= 2 and x.is_floating_point():
            seen = _picked(x).double()
            if (seen == 0).double().mean().item() > 0.5 or seen.min() == seen.max():
                raise Refused(f"an input of shape {tuple(x.shape)} is zeros or constant")


class Untouched:
    """Raises Refused if inputs are written; what it saw of them is seen again by `check`."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = inputs
        self.before = [_picked(x) for x in inputs]

    def check(self) -> None:
        for x, before in zip(self.inputs, self.before, strict=True):
            if not torch.equal(_picked(x).nan_to_num(7.0), before.nan_to_num(7.0)):
                raise Refused(f"the call writes into its input of shape {tuple(x.shape)}")


def fresh(first: Outputs, second: Outputs, inputs: Sequence[Tensor], reuses: bool = False) -> None:
    """Raises Refused unless the outputs of two calls are plain tensors in memory of their own."""
    read = {x.untyped_storage().data_ptr() for x in inputs if x.numel()}
    for a, b in zip(first, second, strict=True):
        for t in (a, b):
            if type(t) is not Tensor or t.layout != torch.strided or t.is_meta:
                raise Refused(f"the output is a {type(t).__name__} that is not computed yet or not a plain tensor")
            if t.numel() and t.untyped_storage().data_ptr() in read:
                raise Refused("the output lies in the memory of an input")
        if not reuses and a.numel() and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():
            raise Refused("two calls gave the same memory: the first result is lost")


class Changes:
    """Changes inputs in place between rounds, so that no state of a run comes back in its last round.

    The sign of the first half of each row of the first input turns at the first round and stays, a quarter of one input
    turns every round, and another quarter of all of them turns at the last. The tensors' version counters do not count
    it, so that a cache that watches them is caught too.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.inputs = [x for x in inputs if x.numel() >= 2 and x.is_floating_point()]
        self.rounds = 0

    def __call__(self, last: bool = False) -> None:
        if self.inputs:
            if self.rounds == 0:
                self._turn(self.inputs[0], 0.0, 0.5)
            x = self.inputs[self.rounds % len(self.inputs)]
            if x.nbytes <= OFTEN_CHANGED:
                self._turn(x, 0.75, 1.0)
            if last:
                for i, x in enumerate(self.inputs):
                    self._turn(x, 0.5, 0.7 - 0.1 * (i % 2))  # not the same of a query and of a key: it would cancel
        self.rounds += 1

    @staticmethod
    def _turn(x: Tensor, begin: float, end: float) -> None:
        size = x.size(-1)
        first, beyond = int(begin * size), max(int(end * size), int(begin * size) + 1)
        x.detach().data[..., first:beyond].neg_()


def too_fast(result: Result, limit: float | None) -> None:
    """Raises Refused for a rate that the machine does not have."""
    if limit and result.rate and result.rate > ABOVE_CEILING * limit:
        unit = "GFLOP/s" if result.bound in ("fma", "bf16_dot") else "GB/s"
        raise Refused(f"{result.rate:.0f} {unit} where this machine reaches {limit:.0f}: not everything was computed")


def doubts(pair: Pair, one_thread: Pair | None = None, device: str = "cpu") -> list[str]:
    """Why the ratio of a pair says too little to count, in words; empty if it counts."""
    found = []
    rounds = len(pair.ours)
    if rounds < MIN_ROUNDS:
        found.append(f"measured {'once' if rounds == 1 else f'{rounds} times'}")
    elif pair.high > WIDE * pair.low:
        found.append(f"unstable: {pair.low:.2f} to {pair.high:.2f}")
    if device != "cpu":
        return found
    for side, (name, times, busy) in enumerate(
        (("mmkern", pair.ours, pair.busy[0]), ("torch", pair.theirs, pair.busy[1]))
    ):
        seconds = median(times)
        alone = median(one_thread.theirs if side else one_thread.ours) if one_thread else None
        if alone is not None and alone < seconds / 2:
            slices = round(seconds / SLICE)
            whole = slices >= 1 and abs(seconds - slices * SLICE) < 0.1 * SLICE
            why = "a multiple of the scheduler's slice" if whole else "its threads wait for one another"
            found.append(f"{name}: {seconds * 1e3:.3g} ms, on one thread {alone * 1e3:.3g} ms: {why}")
        elif 0 < busy < IDLE:
            found.append(f"preempted: {name} ran {busy:.0%} of its time")
    return found
