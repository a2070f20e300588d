"""Imported first: torch is there and new enough, or the import ends in one sentence instead of deep in an op."""

import re

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("mmkern needs torch >= 2.11, and torch is not installed here: pip install torch") from None

_found = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
if _found and (int(_found[1]), int(_found[2])) < (2, 11):
    raise ImportError(f"mmkern needs torch >= 2.11, and this is {torch.__version__}: pip install -U torch")
