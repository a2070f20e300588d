"""Ctrl-C at a place where nothing is left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Holds the first Ctrl-C of the block back; yields what tells whether there was one. The block's end raises it.

    Python raises KeyboardInterrupt between any two steps of the interpreter. Where TensorBoard's queue has just taken
    its lock, the lock stays taken, and whoever closes the queue waits for ever. A second Ctrl-C raises where it
    comes: whoever presses twice does not want to wait for a long step.
    """
    told, default = False, signal.default_int_handler

    def tell(*_: Any) -> None:
        nonlocal told
        told = True
        signal.signal(signal.SIGINT, default)

    # Elsewhere than in the main thread nothing is raised; another handler belongs to somebody who needs it.
    main = threading.current_thread() is threading.main_thread()
    if ours := main and signal.getsignal(signal.SIGINT) is default:
        signal.signal(signal.SIGINT, tell)
    try:
        yield lambda: told
    finally:
        if ours:
            signal.signal(signal.SIGINT, default)
    if told:
        raise KeyboardInterrupt
