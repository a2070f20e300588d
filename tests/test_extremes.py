"""Scores, masks and logits at the ends of a dtype's range: what the formula gives in float32, the kernels give.

There, one float32 is far from the next: at 1e9, 64. So the yardstick is the reference with every score rounded as
float32 arithmetic rounds it, and float64 for all that follows: sums, weights and gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

import mmkern
from mmkern import scaled_dot_product_attention as attention
from mmkern.reference import attention as reference_module  # noqa: F401
from mmkern.testing import assert_accurate, isas, poisoned, randn
