"""Attention's features, alone and combined: every backend against a second formula, written per batch and head."""

from __future__ import annotations

import re

import pytest
import torch
from attention_cases import ALONE, DTYPES, Case, cases, formula, tensors
from hypothesis import given, settings

import mmkern
from mmkern.testing import assert_accurate, isas, poisoned


def check(case: Case, which: tuple[str, ...] = ()) -> None:
    """Every instruction set (or `which`) against the formula in float64; and the reference, exactly."""
    wide = case.cast(torch.float64)
    exact, exact_lse = formula(wide.q, wide.k, wide.v, wide.options)
    ours = mmkern.scaled_dot_product_attention(wide.q, wide.k, wide.v, **wide.options, return_lse=True)
    for got, want in zip(ours, (exact, exact_lse), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    usual = case.cast(torch.float32)
    baseline, baseline_lse = formula(usual.q, usual.k, usual.v, usual.options)
    for isa in which or (*isas(), None):
        backend = mmkern.backend("cpu", isa=isa, strict=True) if isa else mmkern.backend("reference")
        with backend, poisoned():
            out, lse = mmkern.scaled_dot_product_attention(case.q, case.k, case.v, **case.options, return_lse=True)
        assert out.dtype == case.q.dtype
        assert lse.dtype == torch.float32
        assert_accurate(out, exact, baseline.to(case.q.dtype))
        assert_accurate(lse, exact_lse, baseline_lse, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_alone(name: str, dtype: torch.dtype) -> None:
    check(Case(*tensors(dtype), {"enable_gqa": True, **ALONE[name]}))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(cases())
def test_combined(drawn: tuple[Case, str]) -> None:
    case, isa = drawn
    check(case, (isa,))


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 2, 7, 6)
LONG = torch.ones(5, 7, dtype=torch.int64)
ERRORS = {
    "query: expected a Tensor, got list": (TypeError, {"query": [1]}),
    "key: expected at least 2 dims": (ValueError, {"key": torch.zeros(7)}),
    "key: dtype torch.float64 where query has torch.float32": (TypeError, {"key": K.double()}),
    "query: expected float32, .* got torch.int64": (TypeError, {"query": Q.long(), "key": K.long(), "value": V.long()}),
    "key: its last dim must be query's .*(2, 2, 7, 9)": (ValueError, {"key": torch.zeros(2, 2, 7, 9)}),
    "value: its length must be key's; .*(2, 2, 6, 6)": (ValueError, {"value": torch.zeros(2, 2, 6, 6)}),
    "value: on device meta where query is on cpu": (ValueError, {"value": V.to("meta")}),
    "key: leading dims do not broadcast": (ValueError, {"key": torch.zeros(3, 2, 7, 8)}),
    "key: 2 heads where query has 4; with enable_gqa=True": (ValueError, {"enable_gqa": False}),
    "key: its 3 heads must divide query's 4": (
        ValueError,
        {"key": torch.zeros(2, 3, 7, 8), "value": torch.zeros(2, 3, 7, 6)},
    ),
    "attn_mask: expected a Tensor of bool, float32 .* got torch.int64": (
        TypeError,
        {"attn_mask": LONG},
    ),
    "attn_mask: shape (5, 6) does not broadcast to .*(2, 4, 5, 7)": (ValueError, {"attn_mask": torch.ones(5, 6)}),
    "attn_mask: shape (1, 2, 4, 5, 7) does not": (ValueError, {"attn_mask": torch.ones(1, 2, 4, 5, 7)}),
    "attn_mask: on device meta": (ValueError, {"attn_mask": torch.ones(5, 7, device="meta")}),
    "dropout_p: expected a number in [0, 1], got 1.5": (ValueError, {"dropout_p": 1.5}),
    "dropout_p: expected a number, got str": (TypeError, {"dropout_p": "0.1"}),
    "scale: expected a finite number, got nan": (ValueError, {"scale": float("nan")}),
    "similarity: expected one of dot, cosine, .* got 'cos'": (ValueError, {"similarity": "cos"}),
    "temperature: shape (3,) where query has 4 heads": (ValueError, {"temperature": torch.ones(3)}),
    "temperature: expected a floating-point Tensor, got torch.int64": (
        TypeError,
        {"temperature": LONG[0]},
    ),
    "window: expected a pair": (ValueError, {"window": 5}),
    "window: expected sides >= 0": (ValueError, {"window": (-1, 0)}),
    "window: expected integers or None": (TypeError, {"window": (1.5, 0)}),
    "softcap: expected a number > 0, got 0": (ValueError, {"softcap": 0}),
    "alibi_slopes: shape (2, 3) where query has 4 heads": (ValueError, {"alibi_slopes": torch.ones(2, 3)}),
    "key_lengths: expected values in [0, 7], got 3..8": (ValueError, {"key_lengths": torch.tensor([3, 8])}),
    "key_lengths: expected a Tensor of int32 or int64, got torch.float32": (TypeError, {"key_lengths": torch.ones(2)}),
    "key_lengths: shape (3,) does not broadcast to query's batch": (ValueError, {"key_lengths": torch.ones(3).long()}),
    "sinks: shape (2,) where query has 4 heads": (ValueError, {"sinks": torch.ones(2)}),
    "causal_alignment: expected one of upper_left, lower_right, got 'left'": (ValueError, {"causal_alignment": "left"}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_name_the_argument(message: str) -> None:
    error, wrong = ERRORS[message]
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(error, match=pattern):
        mmkern.scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, "enable_gqa": True} | wrong)
