"""What a run writes down while it goes: metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmkern.training import files

METRICS = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run; what follows a line that a kill cut short, or that is none, is left out."""
    found: list[dict[str, Any]] = []
    if not (folder / METRICS).exists():
        return found
    with files.opened(folder / METRICS) as file:
        for line in file:
            try:
                record = json.loads(line)
                if not isinstance(record["step"], int) or ("loss" not in record and record["split"] == "train"):
                    return found
            except (ValueError, TypeError, KeyError, RecursionError):
                return found
            found.append(record)
    return found


class Records:
    """Appends to metrics.jsonl and to TensorBoard's event files; what a run recorded after `step` is dropped."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [record for record in read(folder) if record["step"] <= step and step]
        files.write(folder / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
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
