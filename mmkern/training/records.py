"""What a run writes down while it goes: metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line that a kill cut short is left out."""
    found = []
    try:
        lines = (folder / METRICS).read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Records:
    """Appends to metrics.jsonl and to TensorBoard's event files.

    Args:
        folder: of the run.
        step: that of the checkpoint the run goes on from; what was recorded after it is dropped. 0: all of it.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read(folder) if record["step"] <= step and step]
        partial = folder / f".{METRICS}-{os.getpid()}"
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, folder / METRICS)
        self._file = (folder / METRICS).open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def add(self, step: int, split: str, values: dict[str, float]) -> None:
        """One record: {"step", "split", name: value, ...}; split: "train", "validation" or "test"."""
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Writes what is left."""
        self._file.close()
        self._board.close()
