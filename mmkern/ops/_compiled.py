"""The compiled part of mmkern, or in words why this process goes without it."""

from __future__ import annotations

import warnings
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).parents[1]


def _reason(error: ImportError) -> str:
    """Why `mmkern._C` did not load, and the remedy."""
    found = sorted(p.name for p in _FOLDER.glob("_C.*") if p.suffix in (".so", ".pyd"))
    checkout = (_FOLDER.parent / "setup.py").exists()
    remedy = "install mmkern again"
    if checkout:
        remedy = "run `make build` there; or, to use an installed mmkern, start Python in another folder"
    if any(f"_C{suffix}" in found for suffix in EXTENSION_SUFFIXES):
        return f"the compiled part of mmkern in {_FOLDER} could not be loaded ({error}): {remedy}"
    if found:
        return (
            f"mmkern in {_FOLDER} was compiled for another Python or processor ({', '.join(found)}, where this Python "
            f"takes _C{EXTENSION_SUFFIXES[0]}): {remedy}"
        )
    where = f"{_FOLDER} is a checkout that was not compiled" if checkout else f"{_FOLDER} holds no compiled part"
    return f"{where}: {remedy}"


_C: ModuleType | None
not_built = ""
try:
    from mmkern import _C
except ImportError as error:  # every op still runs, through its reference
    _C = None
    not_built = _reason(error)
    warnings.warn(f"mmkern runs slow reference formulas on the CPU. {not_built}", RuntimeWarning, stacklevel=2)
