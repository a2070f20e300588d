"""The backends that the tests of an op run over: each instruction set of the CPU, Triton, and CUDA C++.

A test takes `backend` as a parameter, `@pytest.mark.parametrize("backend", backends("softmax"))`, and computes within
`with backend:`. Without a GPU, Triton's kernels are interpreted (with --ptx, run as compiled) and those of CUDA C++ are
emulated, on CPU tensors; both take some hundred times as long as a kernel of the CPU. tests/conftest.py bounds that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import emulated
import pytest
import torch
from torch import Tensor

import mmkern
from mmkern.ops import dispatch
from mmkern.testing import isas, poisoned

# Public ops that CUDA C++ has every kernel of, forward and backward; of the others test_backends.py asserts the refusal.
WITH_CUDA = {"softmax", "log_softmax"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_GPU = torch.cuda.is_available()


class Backend:
    """One column of an op's table. `with backend:` forces it, or raises; outputs are poisoned with NaN first.

    name: as `mmkern.backend` and `explain` have it. isa: instruction set of "cpu".
    """

    def __init__(self, name: str, isa: str | None = None) -> None:
        self.name, self.isa = name, isa
        self.on_gpu = HAS_GPU and name in ("triton", "cuda")
        self.device = "cuda" if self.on_gpu else "cpu"
        self.slow = name in ("triton", "cuda") and not HAS_GPU
        self._open: list[ExitStack] = []

    def __str__(self) -> str:
        return f"{self.name}-{self.isa}" if self.isa else self.name

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.forced())
            stack.enter_context(poisoned())
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)

    @contextmanager
    def forced(self, strict: bool = True) -> Iterator[None]:
        """This backend, without poison; unless `strict`, the reference runs what it refuses."""
        with ExitStack() as stack:
            if self.on_gpu:
                stack.enter_context(mock.patch("torch.randint", _drawn_on_cpu))
            if self.name == "cuda" and not self.on_gpu:
                stack.enter_context(_cuda_on_cpu())
            stack.enter_context(mmkern.backend(self.name, isa=self.isa, strict=strict))
            yield

    def to(self, x: Any) -> Any:
        """A tensor on this backend's device, with its strides, which `Tensor.to` keeps only of dense ones."""
        if not isinstance(x, Tensor) or x.device.type == self.device:
            return x
        if not x.numel():
            return x.to(self.device)
        extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        storage = x.as_strided((extent,), (1,), x.storage_offset()).to(self.device)
        return storage.as_strided(x.shape, x.stride())

    def refuses(self, words: str, call: Any) -> None:
        """Assert that `call` is refused in `words`, and that `explain` prints the same."""
        with self.forced(), pytest.raises(RuntimeError, match=f"backend '{self.name}' refused: .*{words}") as raised:
            call()
        with self.forced(strict=False):
            printed = "\n".join(map(str, mmkern.explain(call)))
        assert str(raised.value).split("refused: ")[1] in printed


def _drawn_on_cpu(*args: Any, device: Any = None, draw: Any = torch.randint, **kwargs: Any) -> Tensor:
    """Seeds of dropout from the CPU's generator, as for the reference beside it."""
    return draw(*args, **kwargs).to(device or "cpu")


@contextmanager
def _cuda_on_cpu() -> Iterator[None]:
    """The library's own dispatch to torch.ops.mmkern_cuda, of CPU tensors, whose kernels are emulated."""
    with (
        emulated.emulated("g++"),
        mock.patch.dict(dispatch._DEVICE, cuda="cpu"),
        mock.patch.object(dispatch, "_without_cuda", return_value=None),
    ):
        yield


def backends(op: str, only: Sequence[str] = ("cpu", "triton", "cuda")) -> list[Any]:
    """Those of `only` that have a kernel for a public op and can run here, as parameters of a test."""
    found = [Backend("cpu", isa) for isa in isas()]
    if find_spec("triton"):
        found.append(Backend("triton"))
    if op in WITH_CUDA and emulated.levels():
        found.append(Backend("cuda"))
    return [pytest.param(backend, id=str(backend)) for backend in found if backend.name in only]
