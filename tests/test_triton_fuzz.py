"""Wrong calls of the Triton launchers themselves: an error that names an argument, or the formula's result."""

import re

import pytest
import torch
from operator_calls import CALLS, OPS, differences, drawn, has_memory
from torch import Tensor

import mmkern

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's case")
EACH = 12  # calls of an operator


def outcome(name: str, args: list) -> str:
    """ "ok", "refused", or what is wrong."""
    readable = all(has_memory(a) for a in args)
    kept = [a.clone() if isinstance(a, Tensor) and readable else a for a in args]
    op = OPS[name]
    launch = op.kernels.launcher("triton")
    try:
        found = launch(*args)
        if name == "attention_bwd":  # the formula reads neither output: give both the right ones
            args[2:4] = kept[2:4] = OPS["attention_fwd"].kernels.launcher("triton")(*args[4:-1])
            found = launch(*args)
        if name == "masked_softmax_bwd" and args[1] is not None:  # a mask or scale may be another than the output's
            args[1] = kept[1] = OPS["masked_softmax_fwd"].kernels.launcher("triton")(args[1], *args[3:9])
            found = launch(*args)
    except ValueError as error:
        named = re.match(r"[\w, ]+(?=: )", str(error))
        known = {argument.name for argument in op._dispatch._schema.arguments}
        return "refused" if named and set(named[0].split(", ")) & known else f"names no argument: {error}"
    except Exception as error:  # anything else: the launcher should have seen it
        return f"{type(error).__name__}: {error}"
    if not readable:
        return "it read memory that there is not"
    into = 2 if name.endswith("out") else 0
    wrong = differences(name, kept, *((args[into], into) if found is None else (found,)))
    # No index is read before a launch: a row that does not exist is NaN, or hidden.
    no_row = wrong.startswith("the reference raises IndexError") or "out of bounds" in wrong
    return "ok" if not wrong or no_row else wrong


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_of_a_launcher_is_refused_by_name_or_right(name):
    place, seen = list(CALLS).index(name), []
    with mmkern.backend("triton", strict=True):
        for i in range(EACH):
            _, args, places = drawn(7_000_000 * len(CALLS) + i * len(CALLS) + place)
            if any(isinstance(a, Tensor) and a.is_meta for a in args):
                continue  # what launches are compiled with ahead of time
            found = outcome(name, args)
            assert found in ("ok", "refused"), (found, args, places)
            seen.append(found)
    assert set(seen) == {"ok", "refused"}
