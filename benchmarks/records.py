"""What the benchmarks pass on: a case, its problem with inputs made, and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmkern.benchmarks.statistics import median

SEED = 1234  # of torch's generator when a checked call is made
LEVELS = ("quick", "default", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARITHMETIC = ("fma", "bf16_dot")  # bounds in GFLOP/s; the others are in GB/s

Call = Callable[[], Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Baseline:
    """Another way to compute the same thing.

    context: entered around a whole timed stretch. prepare: called once before the first timed call: compiles.
    """

    name: str
    call: Call
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    prepare: Call = lambda: None


@dataclass(frozen=True)
class Problem:
    """One case with its inputs made: callables without arguments that return a tensor or a tuple of tensors.

    ours: the mmkern call under test.
    baselines: the first one is also the yardstick of accuracy, unless there is a `yardstick`.
    exact: torch's formula in float64 on the same rounded inputs, read when called: they change between rounds. Not
        mmkern's own reference: a mistake in the public function, which leads to the kernel and to that reference alike,
        would not show. What ours draws at random is drawn again after torch.manual_seed(SEED).
    compared: picks the part of the outputs that `exact` gives: a seeded sample where the whole is large.
    kind: "forward", or "gradient" where the outputs are gradients: which rule of mmkern.testing holds.
        Peak memory is measured for gradients.
    yardstick: torch's way to the same numbers as `exact` in the dtype of the case, never timed, where the baselines
        draw random numbers of their own and so compute something else.
    inputs: tensors that are changed in place between rounds, so that a result kept from before is a wrong one.
    reuses: the call writes where it was told to, the same place every time.
    """

    ours: Call
    baselines: Sequence[Baseline]
    exact: Call
    compared: Callable[[Outputs], Outputs] = lambda outputs: outputs
    kind: str = "forward"
    yardstick: Call | None = None
    inputs: Sequence[Tensor] = ()
    reuses: bool = False


@dataclass(frozen=True)
class Case:
    """What is measured, with the work it cannot avoid.

    family, op: "attention", "attention-causal"; `op` is the name used in options and tables.
    shape, dims: "BERT-base 512" and "2x12x512x64".
    build: makes the inputs for a dtype and a device; it can be pickled, for the process that measures.
    flops: multiplications and additions that the result needs (causal: only the visible half).
    bytes: compulsory traffic: each input read once, each output written once.
    bound: the ceiling it is held against: "fma", "bf16_dot", "copy" or "read".
    level: "quick", "default" or "full": the smallest kind of run that includes it; "gpu": any run on a GPU.
    """

    family: str
    op: str
    shape: str
    dims: str
    dtype: torch.dtype
    build: Callable[[torch.dtype, str], Problem]
    flops: float
    bytes: float
    bound: str
    level: str = "default"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype_name}".replace(" ", "_")


@dataclass(frozen=True)
class Pair:
    """Seconds per call of both sides, one entry per round, and how many times faster ours is.

    busy: processor time over elapsed time of each side: 2.0 where two threads ran all the while, below 1 where the
    machine ran something else.
    """

    ours: list[float]
    theirs: list[float]
    speedup: float
    low: float
    high: float
    busy: tuple[float, float] = (0.0, 0.0)


@dataclass
class Result:
    """One case measured.

    status: "ok"; "wrong" (too far from float64), "refused" (a time that cannot be believed) or "error", without a
        time; "over budget": one call takes longer than the case may, so that there is no time or a single one.
    notes: why an "ok" case gets no verdict, in words; empty if it gets one.
    """

    family: str
    op: str
    shape: str
    dims: str
    dtype: str
    flops: float
    bytes: float
    bound: str
    status: str = "ok"
    error: str = ""
    notes: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)  # the backend of each op call, as mmkern.explain tells it
    max_error: float | None = None
    torch_error: float | None = None
    relative_l2: float | None = None
    against: str = ""  # the fastest baseline that is right, which `pair` is timed against
    screened: dict[str, float | str] = field(default_factory=dict)  # baseline -> seconds, or why it has none
    pair: Pair | None = None
    one_thread: Pair | None = None  # the same on one thread, where threads cost more than they bring
    cold: tuple[float, float] | None = None  # seconds of a call of each side after the caches were overwritten
    ceiling: float | None = None  # GFLOP/s or GB/s of `bound`, measured in this run
    peak_bytes: int | None = None  # most tensor memory that one call holds at once; for gradients only
    torch_peak_bytes: int | None = None  # the same for `against`
    seconds_spent: float = 0.0  # of the whole case, its inputs and its check included

    @classmethod
    def of(cls, case: Case) -> Result:
        return cls(
            case.family, case.op, case.shape, case.dims, case.dtype_name, case.flops, case.bytes, case.bound
        )  # fmt: skip

    @property
    def id(self) -> str:
        return f"{self.op}-{self.shape}-{self.dtype}".replace(" ", "_")

    @property
    def judged(self) -> bool:
        """Whether its ratio may count in a verdict."""
        return self.status == "ok" and self.pair is not None and not self.notes

    @property
    def seconds(self) -> float | None:
        return median(self.pair.ours) if self.pair else None

    @property
    def torch_seconds(self) -> float | None:
        return median(self.pair.theirs) if self.pair else None

    @property
    def work(self) -> float:
        return self.flops if self.bound in ARITHMETIC else self.bytes

    @property
    def rate(self) -> float | None:
        """GFLOP/s where arithmetic is the limit, else GB/s."""
        return self.work / self.seconds / 1e9 if self.seconds else None

    @property
    def of_ceiling(self) -> float | None:
        return self.rate / self.ceiling if self.rate and self.ceiling else None
