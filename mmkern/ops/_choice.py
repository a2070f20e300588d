"""What the caller puts in force for ops that run meanwhile, and what he is told of them: `backend` and `explain`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from mmkern.ops import _backends
from mmkern.ops._backends import BACKENDS, TRITON
from mmkern.ops._compiled import _C


@dataclass(frozen=True)
class Choice:
    """One op call: the backend that ran it, and why each other one did not.

    op: name of the op in `torch.ops.mmkern`.
    backend: one of "cpu", "cuda", "triton", "reference".
    detail: instruction set for "cpu", else "".
    refused: backend -> reason.
    """

    op: str
    backend: str
    detail: str
    refused: dict[str, str]

    def __str__(self) -> str:
        ran = f"{self.backend} ({self.detail})" if self.detail else self.backend
        reasons = "".join(f"\n    not {name}: {why}" for name, why in self.refused.items())
        return f"{self.op}: {ran}{reasons}"


class _State:
    """Process-wide, like torch's own backend flags; forced by `backend`, filled by `explain`.

    What holds is said by the blocks that are open, the last first. Blocks of two threads may close in any order, so
    none of them restores what it found.
    """

    def __init__(self) -> None:
        self._open: list[dict[str, Any]] = []
        self._lock = Lock()
        self._isa: str | None = None  # outside of all blocks that choose one
        self.forked = False  # this is a forked child, whose torch has not been told to leave its threads
        self._apply()

    def fork(self, pending: bool) -> None:
        """In a forked child, first with True; a thread of the parent may have held the lock."""
        self._lock = Lock()
        self.forked = pending
        self._apply()

    def enter(self, **fields: Any) -> dict[str, Any]:
        """Set fields until `leave` gets what this returns."""
        with self._lock:
            if "isa" in fields and not any("isa" in other for other in self._open):
                self._isa = _C.isa() if _C else None
            self._open.append(fields)
            self._apply()
        return fields

    def leave(self, fields: dict[str, Any]) -> None:
        with self._lock:
            self._open = [other for other in self._open if other is not fields]
            self._apply()
            if "isa" in fields and _C:
                _C.set_isa(self._last("isa", self._isa))

    def _apply(self) -> None:
        self.forced: str | None = self._last("forced")
        self.strict: bool = self._last("strict", False)
        # "triton" is forced and Triton runs its kernels in its interpreter, on any device
        self.interpreting: bool = self._last("interpreting", False)
        self.choices: list[Choice] | None = self._last("choices")
        self.in_use = bool(self._open) or self.forked  # one look per call instead of three

    def _last(self, name: str, default: Any = None) -> Any:
        return next((fields[name] for fields in reversed(self._open) if name in fields), default)


_state = _State()
os.register_at_fork(after_in_child=lambda: _state.fork(True))


def leave_threads() -> None:
    """In a forked child, one thread from the first call on: torch's thread team stayed behind with the parent.

    Its matmul would wait for the team forever, and so would the casts, copies and sums of more than 32,768 elements
    that autograd makes around an op in backward. So the setting is not taken back.
    """
    if _state.forked:
        torch.set_num_threads(1)
        _state.fork(False)


@contextmanager
def backend(name: str, *, strict: bool = False, isa: str | None = None) -> Iterator[None]:
    """Force ops onto one backend within a `with` block.

    Process-wide, like torch's own backend flags: calls of other threads are forced too while the block runs.
    "triton" takes tensors on the CPU, too, where Triton interprets its kernels (TRITON_INTERPRET=1): slowly.

    Args:
        name: "cpu", "cuda", "triton" or "reference".
        strict: raise RuntimeError, saying why, where that backend cannot run a call; otherwise the reference runs.
        isa: with "cpu", the instruction set to use: one of `mmkern._C.isas()`.

    Raises:
        ValueError: name is no backend, or isa is none that this processor runs.

    Example:
        >>> import mmkern, torch
        >>> with mmkern.backend("reference"):
        ...     mmkern.softmax(torch.zeros(2), dim=0)
        tensor([0.5000, 0.5000])
    """
    if name not in BACKENDS:
        raise ValueError(f"name: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if isa is not None and (name != "cpu" or _C is None):
        raise ValueError(f"isa: only for the built 'cpu' backend, got isa={isa!r} with name={name!r}")
    interpreting = name == "triton" and TRITON.missing() is None and _backends.interprets()
    fields = {"forced": name, "strict": strict, "interpreting": interpreting}
    block = _state.enter(**fields, **({} if isa is None else {"isa": isa}))
    try:
        if _C and isa is not None:
            _C.set_isa(isa)
        yield
    finally:
        _state.leave(block)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Run `fn(*args, **kwargs)` and tell, for each mmkern op it called, which backend ran and why no other did.

    `fn` may be an op, a module or any function. Returns one `Choice` per op call, in order; print them. Process-wide:
    calls that other threads make meanwhile are told, too, since autograd may run backward in a thread of its own.

    Example:
        >>> import mmkern, torch
        >>> print(mmkern.explain(mmkern.softmax, torch.zeros(2, dtype=torch.float64), dim=0)[0].backend)
        reference
    """
    choices: list[Choice] = []
    block = _state.enter(choices=choices)
    try:
        fn(*args, **kwargs)
    finally:
        _state.leave(block)
    if _state.choices is not None:  # inside another explain, which is told of these calls too
        _state.choices.extend(choices)
    return choices
