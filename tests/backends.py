"""The backends that the tests of an op run over: each instruction set of the CPU, Triton, and CUDA C++.

A test takes `backend` as a parameter, `@pytest.mark.parametrize("backend", backends("softmax"))`, and computes within
`with backend:`. Without a GPU, Triton's kernels are interpreted (with --ptx, run as compiled) and those of CUDA C++ are
emulated, on CPU tensors; both take some hundred times as long as a kernel of the CPU. tests/conftest.py bounds that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest import mock

import emulated
import pytest
import torch
from op_calls import CALLS, OpCall
from operator_calls import OPS
from torch import Tensor

import mmkern
from mmkern.ops.dispatch import CUDA
from mmkern.reference.philox import keep_mask
from mmkern.testing import accuracy, isas, poisoned


def _with_cuda() -> set[str]:
    found: dict[str, set[str]] = {}

    def both_ways(call: OpCall) -> None:
        outs = call.run(call.copies(requires_grad=True))
        sum(out.sum() for out in outs if out.requires_grad).backward()

    for call in CALLS:
        names = {choice.op for choice in mmkern.explain(both_ways, call)}
        found[call.fn.__name__] = found.get(call.fn.__name__, set()) | names
    return {name for name, names in found.items() if all("cuda" in OPS[op].kernels.of for op in names)}


# Public ops of which CUDA C++ has every kernel, forward and backward. What it has none of is refused: test_backends.py.
WITH_CUDA = _with_cuda()
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

    __repr__ = __str__

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
        mock.patch.object(CUDA, "device", "cpu"),
        mock.patch.object(CUDA, "missing", return_value=None),
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


def factors(shape: tuple[int, ...], dropout_p: float) -> Tensor | float:
    """What dropout multiplies elements of a row op by after manual_seed(7)."""
    if not dropout_p:
        return 1.0
    torch.manual_seed(7)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    keep = keep_mask(seed, dropout_p, (1,) * max(0, 3 - len(shape)) + shape, torch.device("cpu")).view(shape)
    return keep.double() / (1 - dropout_p) if dropout_p < 1 else keep.double()


def outcome(call: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs, on the CPU; dropout drops the same each time."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.manual_seed(7)
    out = call(*leaves)
    return [t.detach().cpu() for t in (out, *torch.autograd.grad(out, leaves, grad.to(out.dtype)))]


def hold(
    backend: Backend,
    once: Callable[[Callable[[], Any]], Any],
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    cancels: bool = False,
) -> Tensor:
    """Output and gradients of `ours` on a backend, by the rule; the output, for what else a test asks of it.

    theirs: torch's formula: exact in float64, the yardstick in the inputs' dtype.
    cancels: gradients may be exactly 0 (of what shifts a whole row), or a small rest of larger terms; there the norm of
        the error has nothing to be held against but torch's own.
    """

    def expected() -> tuple[list[Tensor], list[Tensor]]:
        exact = outcome(theirs, [t.double() for t in inputs], grad.double())
        with mmkern.backend("reference"):
            return exact, outcome(lambda *a: theirs(*a).to(grad.dtype), inputs, grad)

    exact, baseline = once(expected)
    with backend:
        found = outcome(ours, [backend.to(t) for t in inputs], backend.to(grad))
    for i, (mine, wanted, base) in enumerate(zip(found, exact, baseline, strict=True)):
        result = accuracy(mine, wanted, base, "gradient" if i else "forward", grad.dtype)
        limit = result.limit
        if cancels and i:
            of_torch = accuracy(base, wanted, None, "gradient", grad.dtype).relative_l2
            limit = math.inf if not (wanted.abs() >= 1e-12).any() else max(limit, 1.1 * of_torch)
        assert mine.dtype == base.dtype
        what = f"{'gradient' if i else 'output'} {i}: {result}"
        assert result.same_nonfinite, what
        assert result.max_error <= result.bound, what
        assert result.relative_l2 <= limit, what
    return found[0]
