"""Attention's features, alone and combined: every backend against a second formula, written per batch and head."""

from __future__ import annotations

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
