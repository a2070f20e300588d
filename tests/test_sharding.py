"""DTensors: each part computes what the op gives of it alone, forward and backward, and nothing is gathered unasked."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from op_calls import CALLS, OpCall
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import mmkern
from mmkern.testing import randn


@pytest.fixture
def mesh():
    """The first of two processes, without the other: what had to be fetched from it would be wrong."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def part(t: torch.Tensor, dim: int | None) -> torch.Tensor:
    return t if dim is None else t.chunk(2, dim)[0]


def check(call: OpCall, mesh, dims: dict[str, int | None], **options) -> None:
    """Against the call of the first half alone; `dims` tells what is split along which dim."""
    alone = {n: part(t, dims[n]).clone().requires_grad_(n in call.leaves) for n, t in call.tensors.items()}
    spread = {}
    for n, t in call.tensors.items():
        placement = Replicate() if dims[n] is None else Shard(dims[n])
        spread[n] = distribute_tensor(t, mesh, [placement]).requires_grad_(n in call.leaves)
    found, expected = call.run(spread, **options), call.run(alone, **options)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f.to_local(), e)
        assert not f.placements[0].is_replicate()
    upstream = [randn(*e.shape, seed=3) for e in expected]
    grads = torch.autograd.grad([f.to_local() for f in found], [spread[n] for n in call.leaves], upstream)
    right = torch.autograd.grad(expected, [alone[n] for n in call.leaves], upstream)
    for n, g, e in zip(call.leaves, grads, right, strict=True):
        assert isinstance(g, DTensor)
        assert g.placements[0] == (Partial() if dims[n] is None else Shard(dims[n])), n
        torch.testing.assert_close(g.to_local(), e)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_split_batch(call, mesh):
    if call.name in ("cross_entropy", "cross_entropy-soft", "linear_cross_entropy-mean"):
        options = {"reduction": "sum"}
    else:
        options = {}
    numbers = {"dim": -1} if "dim" in call.numbers else {}
    even = {n: call.tensors[n][:2] if call.is_batched(n) else t for n, t in call.tensors.items()}
    call = OpCall(call.name, call.fn, even, {**call.numbers, **numbers}, {**call.options, **options}, call.constant)
    check(call, mesh, {n: 0 if call.is_batched(n) else None for n in call.tensors})


@pytest.mark.parametrize("call", [c for c in CALLS if c.name in ("attention", "attention-all", "rotary")], ids=str)
def test_split_heads(call, mesh):
    split = {"query": 1, "key": 1, "value": 1, "temperature": 0, "alibi_slopes": 0, "sinks": 0, "q": 1}
    check(call, mesh, {n: split.get(n) for n in call.tensors})


def test_split_rows_of_attention(mesh):
    tensors = {"query": randn(2, 2, 6, 4, seed=1), "key": randn(2, 2, 5, 4, seed=2), "value": randn(2, 2, 5, 4, seed=3)}
    call = OpCall("rows", mmkern.scaled_dot_product_attention, {**tensors, "attn_mask": randn(6, 5, seed=4)})
    check(call, mesh, {"query": 2, "key": None, "value": None, "attn_mask": 0})


def test_what_would_have_to_be_gathered_is_refused_by_name(mesh):
    x, target = randn(4, 6), torch.tensor([1, 2, 3, 0])

    def spread(t, dim):
        return distribute_tensor(t, mesh, [Shard(dim)])

    for call, words in (
        (lambda: mmkern.softmax(spread(x, 1), 1), "input: a DTensor split over dim 1"),
        (lambda: mmkern.cross_entropy(spread(x, 0), spread(target, 0)), "input: a DTensor split over dim 0"),
        (lambda: mmkern.masked_softmax(spread(x, 0), dropout_p=0.5), "dropout_p: not with a DTensor"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=words):
            call()
    q = spread(randn(2, 4, 6, 8), 2)
    with pytest.raises(RuntimeError, match=r"(query|key|value): a DTensor split over dim 2"):
        mmkern.scaled_dot_product_attention(q, q, q)


def two_processes(rank: int, store: str) -> None:
    """One of two: softmax and attention of its half of the batch, forward and backward, against the whole."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def loss(x, q, k, v):
        weights = mmkern.softmax(x * 2, 1)
        return weights.square().sum() + mmkern.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()

    whole = [randn(4, 6, seed=1), *(randn(4, 2, 5, 8, seed=i) for i in (2, 3, 4))]
    expected = torch.autograd.grad(loss(*(leaves := [t.clone().requires_grad_() for t in whole])), leaves)
    for run in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss):  # compiled before any eager call
        spread = [distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in whole]
        out = run(*spread)
        torch.testing.assert_close(out.full_tensor(), loss(*whole))
        for found, right in zip(torch.autograd.grad(out, spread), expected, strict=True):
            torch.testing.assert_close(found.to_local(), right.chunk(2)[rank])
            torch.testing.assert_close(found.full_tensor(), right)
    dist.destroy_process_group()


def test_two_real_processes_compiled_and_eager(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "store")]
    started = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err


if __name__ == "__main__":
    two_processes(int(sys.argv[2]), sys.argv[1])
    os._exit(0)  # torch keeps a DTensor's group, whose threads may abort the interpreter's end
