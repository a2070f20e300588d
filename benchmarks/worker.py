"""The process that measures: a call that does not end is stopped with it, and one that crashes takes no case along."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from mmkern.benchmarks import model
from mmkern.benchmarks.machine import Ceilings
from mmkern.benchmarks.measure import measure
from mmkern.benchmarks.noise import noise
from mmkern.benchmarks.records import Case, Result

Tell = Callable[[Any], None]


class Late(Exception):
    """What was asked for took too long; the process is gone."""


class Died(Exception):
    """The process ended on its own."""


class Bench:
    """What a process can be asked for. The ceilings it finds are kept from one request to the next."""

    def __init__(self, device: str, ceilings: dict[str, float], rivals: Sequence[str]) -> None:
        self.device = device
        self.rivals = rivals
        self.ceilings = Ceilings(device=device)
        self.ceilings.measured = dict(ceilings)

    def case(self, tell: Tell, case: Case, budget: float, allowance: float) -> Result:
        from mmkern.benchmarks.rivals import baselines

        # Compiling takes seconds: on a GPU, where it is the usual way, some cases are compiled without being asked.
        names = self.rivals or (["torch.compile"] if self.device != "cpu" and case.level == "quick" else [])

        def more(case: Case, problem: Any) -> Any:
            return baselines(names, case, problem, self.device)

        return measure(case, budget, self.device, self.ceilings, allowance=allowance, tell=tell, rivals=more)

    def check(self, tell: Tell, case: Case) -> Result:
        return measure(case, device=self.device, timed=False)

    def noise(self, tell: Tell) -> dict[str, Any]:
        return noise(self.device)

    def model(self, tell: Tell, budget: float) -> list[dict[str, Any]]:
        return model.measure_model(budget, tell)

    def end(self, tell: Tell) -> tuple[float, dict[str, float]]:
        """By how much the ceilings differ from the beginning, and all of them."""
        return self.ceilings.check_again(), self.ceilings.measured


class Here:
    """Measures in this process: for debuggers and profilers. A call that does not end is not stopped."""

    def __init__(self, device: str = "cpu", rivals: Sequence[str] = ()) -> None:
        self.bench = Bench(device, {}, rivals)

    def ask(self, what: str, *arguments: Any, seconds: float, tell: Tell = lambda said: None) -> Any:
        return getattr(self.bench, what)(tell, *arguments)

    def close(self) -> None:
        pass


class Worker:
    """Measures in a process of its own, started when first asked."""

    def __init__(self, device: str = "cpu", rivals: Sequence[str] = ()) -> None:
        self.device, self.rivals = device, rivals
        self.ceilings: dict[str, float] = {}
        self.process: Any = None
        self.connection: Connection | None = None

    def ask(self, what: str, *arguments: Any, seconds: float, tell: Tell = lambda said: None) -> Any:
        """The answer to one of Bench's questions.

        Raises:
            Late: after `seconds`, not counting the start of the process. What was told before was told.
            Died: the process ended, with its exit status.
            RuntimeError: it answered with an exception.
        """
        connection = self._started()
        connection.send((what, arguments))
        end = time.perf_counter() + seconds
        while True:
            if not connection.poll(max(0.0, end - time.perf_counter())):
                self.close()
                raise Late(f"had not ended after {seconds:.1f} s")
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionResetError):
                self.process.join(5.0)
                status = self.process.exitcode
                self.close()
                name = signal.Signals(-status).name if status and status < 0 else f"status {status}"
                raise Died(f"the process that measured it ended with {name}") from None
            if kind == "told":
                tell(value)
            elif kind == "failed":
                raise RuntimeError(value)
            else:
                answer, self.ceilings = value
                return answer

    def _started(self) -> Connection:
        if self.connection is None:
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            given = (theirs, self.device, self.ceilings, tuple(self.rivals))
            self.process = context.Process(target=serve, args=given, daemon=True, name="mmkern bench")
            self.process.start()
            theirs.close()
            self.connection.recv()  # torch is imported
        return self.connection

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
        self.connection = self.process = None


def serve(connection: Connection, device: str, ceilings: dict[str, float], rivals: Sequence[str]) -> None:
    """Answers until the other end closes. Ctrl-C is for the other end, which still writes what it has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bench = Bench(device, ceilings, rivals)
    connection.send("ready")
    while True:
        try:
            what, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(bench, what)(lambda said: connection.send(("told", said)), *arguments)
        except Exception as error:  # goes to whoever asked
            connection.send(("failed", f"{type(error).__name__}: {error}".splitlines()[0]))
        else:
            connection.send(("done", (answer, bench.ceilings.measured)))
