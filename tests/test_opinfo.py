"""PyTorch's own samples of the ops that ours stand in for (OpInfo), through ours and through torch's."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_map

import mmkern
from mmkern.testing import accuracy, randn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INFOS = {(info.name, info.variant_test_name): info for info in op_db}


@dataclass(frozen=True)
class Pair:
    """One OpInfo and our function; `call` adapts a sample's arguments where the two signatures differ."""

    info: OpInfo
    ours: Callable[..., Tensor]
    call: Callable[..., Tensor]
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return f"{self.info.name.split('.')[-1]}{self.info.variant_test_name and '-' + self.info.variant_test_name}"


def pair(name: str, ours: Callable[..., Tensor], variant: str = "", call: Callable[..., Tensor] | None = None) -> Pair:
    info = INFOS[name, variant]
    dtypes = [dtype for dtype in info.dtypes if not dtype.is_complex]
    return Pair(info, ours, call or ours, tuple(sorted(dtypes, key=lambda dtype: (dtype not in FLOATS, str(dtype)))))


def masked_softmax(x: Tensor, dim: int, *, mask: Tensor | None) -> Tensor:
    return mmkern.masked_softmax(x, mask, dim=dim)


def embed_tokens(weight: Tensor, tokens: Tensor) -> Tensor:
    return mmkern.embed_tokens(tokens, weight)


PAIRS = [
    pair("nn.functional.scaled_dot_product_attention", mmkern.scaled_dot_product_attention),
    pair("softmax", mmkern.softmax),
    pair("softmax", mmkern.softmax, "with_dtype"),
    pair("log_softmax", mmkern.log_softmax),
    pair("log_softmax", mmkern.log_softmax, "with_dtype"),
    pair("masked.softmax", mmkern.masked_softmax, call=masked_softmax),
    pair("nn.functional.embedding", mmkern.embed_tokens, call=embed_tokens),
]
PAIRS.append(pair("nn.functional.cross_entropy", mmkern.cross_entropy))


def samples(p: Pair, dtype: torch.dtype) -> Iterator[Any]:
    """Samples without dropout, which `test_dropout_of_attention` looks at, in ranks that ours takes."""
    torch.manual_seed(0)
    every = p.info.sample_inputs("cpu", dtype, requires_grad=dtype in FLOATS)
    found = [sample for sample in every if not sample.kwargs.get("dropout_p")]
    assert len(found) >= 3
    for sample in found:
        if p.call is embed_tokens:  # one token alone is no sequence (..., length)
            sample.args = (torch.atleast_1d(sample.args[0]),)
        if p.ours in (mmkern.scaled_dot_product_attention, mmkern.masked_softmax):
            # Scores of a model's size: OpInfo's, some 27 in deviation, make weights of 0 and 1, whose gradients are
            # differences of terms a thousand times as large. Few of masked_softmax's five scores are visible: of torch
            # 2.11's random numbers one sample has weights of 1 and 1e-5, and bfloat16 holds the first as exactly 1.
            sample.input = (sample.input / 8).detach().requires_grad_(sample.input.requires_grad)
        yield sample


def run(fn: Callable[..., Tensor], sample: Any, wide: bool = False) -> list[Tensor]:
    """The result, and the gradients for what the sample wants them for; in float64 where `wide`."""
    leaves: list[Tensor] = []

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        copy = copy.double() if wide and copy.is_floating_point() else copy
        if value.requires_grad:
            leaves.append(copy.requires_grad_())
        return copy

    given, args, kwargs = tree_map(fresh, (sample.input, sample.args, sample.kwargs))
    out = fn(given, *args, **kwargs)
    if not leaves:
        return [out]
    grad = randn(*out.shape, dtype=sample.input.dtype, seed=1).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


EVERY = [pytest.param(p, dtype, id=f"{p}-{str(dtype).removeprefix('torch.')}") for p in PAIRS for dtype in p.dtypes]


@pytest.mark.parametrize(("p", "dtype"), EVERY)
def test_samples_give_what_torch_gives(p, dtype):
    """Values by the rule, and gradients: each tensor on the scale of its largest element, all samples together, because
    the largest of a handful of torch's errors is no measure."""
    scaled: dict[tuple[str, torch.dtype], list[list[Tensor]]] = {}
    for sample in samples(p, dtype):
        actual, baseline = run(p.call, sample), run(p.info.op, sample)
        exact = run(p.info.op, sample, wide=True)
        if p.call is masked_softmax:  # where nothing is visible, ours gives 0 and torch's NaN
            baseline, exact = ([t.nan_to_num(0.0) for t in ts] for ts in (baseline, exact))
        assert [(t.dtype, t.shape) for t in actual] == [(t.dtype, t.shape) for t in baseline], sample
        for i, tensors in enumerate(zip(actual, exact, baseline, strict=True)):
            largest = tensors[1].abs().max().item() if tensors[1].numel() else 0.0
            kind = "gradient" if i else "forward", actual[i].dtype
            scaled.setdefault(kind, []).append([t.double().flatten() / (largest or 1.0) for t in tensors])
    for kind, found in scaled.items():
        result = accuracy(*(torch.cat(column) for column in zip(*found, strict=True)), *kind)
        # in float64 torch's own result is not more exact than ours
        right = result.relative_l2 <= result.limit if kind[1] == torch.float64 else result.ok
        assert result.same_nonfinite, f"{kind}: {result}"
        assert right, f"{kind}: {result}"


@pytest.mark.parametrize("dtype", FLOATS)
def test_dropout_of_attention(dtype):
    """Each weight is dropped or divided by 1 - p, and the share dropped is p: torch's random numbers are others."""
    p = PAIRS[0]
    torch.manual_seed(0)
    kept = seen = 0
    for sample in p.info.sample_inputs("cpu", dtype):
        if not (dropout_p := sample.kwargs["dropout_p"]):
            continue
        key = sample.args[0]
        identity = torch.eye(key.shape[-2], dtype=dtype).expand(*key.shape[:-1], -1)  # the output is the weights
        whole = mmkern.scaled_dot_product_attention(sample.input, key, identity, **sample.kwargs | {"dropout_p": 0.0})
        for _ in range(8):
            found = mmkern.scaled_dot_product_attention(sample.input, key, identity, **sample.kwargs)
            there = found != 0
            torch.testing.assert_close(found[there], whole[there] / (1 - dropout_p))
            visible = whole > 1e-3  # smaller ones may round to 0
            kept, seen = kept + int((there & visible).sum()), seen + int(visible.sum())
        assert dropout_p == 0.5
    assert seen > 4000
    assert abs(kept - seen / 2) < 5 * (seen / 4) ** 0.5


SDPA, SOFTMAX, CROSS_ENTROPY = F.scaled_dot_product_attention, torch.softmax, F.cross_entropy
Q, X, TOKENS = randn(2, 4, 5, 8), randn(3, 5), torch.tensor([[0, 2], [1, 1]])
# What torch refuses, beside the wrong samples of OpInfo, of which these ops have few: torch's function, and arguments.
WRONG: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "key dtype": (SDPA, (Q, Q.double(), Q), {}),
    "value dtype": (SDPA, (Q, Q, Q.bfloat16()), {}),
    "head dims": (SDPA, (Q, Q[..., :4], Q), {}),
    "batches": (SDPA, (Q, Q.expand(3, 2, 4, 5, 8), Q.expand(2, 2, 4, 5, 8)), {}),
    "heads": (SDPA, (Q, Q[:, :2], Q[:, :2]), {}),
    "heads of a group": (SDPA, (Q, Q[:, :3], Q[:, :3]), {"enable_gqa": True}),
    "one dim": (SDPA, (Q[0, 0, 0], Q[0, 0, 0], Q[0, 0, 0]), {}),
    "integers": (SDPA, (Q.long(), Q.long(), Q.long()), {}),
    "mask shape": (SDPA, (Q, Q, Q, torch.zeros(5, 4)), {}),
    "mask dtype": (SDPA, (Q, Q, Q, torch.zeros(5, 5, dtype=torch.int64)), {}),
    "dropout_p": (SDPA, (Q, Q, Q), {"dropout_p": 1.5}),
    "scale": (SDPA, (Q, Q, Q), {"scale": "1"}),
    "no tensor": (SDPA, (Q, Q, None), {}),
    "dim": (SOFTMAX, (X, 2), {}),
    "negative dim": (SOFTMAX, (X, -3), {}),
    "kind of dim": (SOFTMAX, (X, 1.0), {}),
    "integers without dtype": (SOFTMAX, (X.long(), 1), {}),
    "dtype": (SOFTMAX, (X, 1), {"dtype": "float32"}),
    "out dtype": (SOFTMAX, (X, 1), {"out": torch.empty(3, 5, dtype=torch.int64)}),
    "token": (F.embedding, (TOKENS, X[:2]), {}),
    "negative token": (F.embedding, (TOKENS - 1, X), {}),
    "kind of tokens": (F.embedding, (TOKENS.float(), X), {}),
    "padding_idx": (F.embedding, (TOKENS, X), {"padding_idx": 3}),
    "target": (CROSS_ENTROPY, (X, torch.tensor([0, 5, 1])), {}),
    "batch of targets": (CROSS_ENTROPY, (X, torch.tensor([0, 1])), {}),
    "kind of targets": (CROSS_ENTROPY, (X, torch.zeros(3)), {}),
    "weight": (CROSS_ENTROPY, (X, torch.zeros(3).long()), {"weight": torch.ones(4)}),
    "reduction": (CROSS_ENTROPY, (X, torch.zeros(3).long()), {"reduction": "most"}),
    "label_smoothing": (CROSS_ENTROPY, (X, torch.zeros(3).long()), {"label_smoothing": 1.5}),
}
OURS = {SDPA: mmkern.scaled_dot_product_attention, SOFTMAX: mmkern.softmax, F.embedding: mmkern.embed_tokens}
OURS |= {CROSS_ENTROPY: mmkern.cross_entropy}


def assert_refuses(ours: Callable[..., Any], call: Callable[..., Any], args: Any, kwargs: Any) -> None:
    with pytest.raises((ValueError, TypeError, IndexError)) as raised:
        call(*args, **kwargs)
    names = "|".join(inspect.signature(ours).parameters)
    assert re.search(rf"\b({names})\b", str(raised.value)), f"names no argument: {raised.value}"


@pytest.mark.parametrize("wrong", [name for name, (theirs, *_) in WRONG.items() if theirs in OURS])
def test_what_torch_refuses_ours_refuses_by_name(wrong):
    theirs, args, kwargs = WRONG[wrong]
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError, AssertionError)):
        theirs(*args, **kwargs)
    assert_refuses(OURS[theirs], OURS[theirs], args, kwargs)


def test_wrong_samples_of_opinfo_are_refused():
    wrong = [(p, error.sample_input) for p in PAIRS if p.info.error_inputs_func for error in p.info.error_inputs("cpu")]
    assert wrong
    for p, sample in wrong:
        assert_refuses(p.ours, p.call, (sample.input, *sample.args), sample.kwargs)
