"""What the runner refuses and what it reports: each of these must be an error, by name, and the right program none."""

from __future__ import annotations

import shutil
import struct

import pytest
import torch
from ptx_runner import EmulationError, RunCounts, check, run

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="the runner needs g++")
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel(.param .u64 .ptr .global .align 4 out, .param .u32 n)
.maxntid 128
{
 .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .f32 %f<9>; .reg .b64 %rd<9>;
 ld.param.b64 %rd1, [out];
 mov.u32 %r1, %tid.x;
 mul.wide.u32 %rd2, %r1, 4;
 add.s64 %rd3, %rd1, %rd2;
 shl.b32 %r2, %r1, 2;
 mov.u32 %r3, dynamic;
 add.s32 %r4, %r3, %r2;
"""
# each thread writes 10 * its number, and reads what its neighbour in the other warp wrote
SHARED = """
 mul.lo.s32 %r5, %r1, 10;
 st.shared.b32 [%r4], %r5;
 {barrier}
 xor.b32 %r6, %r4, {mask};
 ld.shared.b32 %r7, [%r6];
 st.global.b32 [%rd3], %r7;
"""
COPY = """
 mov.u64 %rd4, %rd3;
 cp.async.ca.shared.global [%r4], [%rd4], 4;
 cp.async.commit_group;
 {wait}
 ld.shared.b32 %r7, [%r4];
 add.s32 %r7, %r7, 1;
 st.global.b32 [%rd3], %r7;
"""


def launch(
    body: str, n: int = 64, threads: int = 64, order: int = 0, blocks: int = 1, ties: bool = False
) -> tuple[torch.Tensor, RunCounts]:  # fmt: skip
    out = torch.arange(n, dtype=torch.int32)
    parameters = [struct.pack("Q", out.data_ptr()), struct.pack("i", n)]
    counts = run(HEAD + body + " ret;\n}\n", "kernel", (blocks,), (threads,), parameters, [out], dynamic_shared=512,
                 order=order, ties=ties)  # fmt: skip
    return out, counts


@pytest.mark.parametrize("order", [0, 1, 2])
def test_right_programs_run(order: int) -> None:
    out, _ = launch(SHARED.format(barrier="bar.sync 0;", mask=128), order=order)
    assert out.tolist() == [(i ^ 32) * 10 for i in range(64)]
    out, _ = launch(COPY.format(wait="cp.async.wait_group 0;"), order=order)
    assert out.tolist() == [i + 1 for i in range(64)]
    out, _ = launch("{ .reg .pred p; setp.lt.u32 p, %r1, 5; @!p bra done; st.global.b32 [%rd3], 7; done: }\n")
    assert out[:6].tolist() == [7] * 5 + [5]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SHARED.format(barrier="", mask=128), "by thread .* with no barrier between"),
        (SHARED.format(barrier="bar.warp.sync -1;", mask=128), "with no barrier between"),
        (COPY.format(wait=""), "waited for its asynchronous copy"),
        (COPY.format(wait="cp.async.wait_group 1;"), "waited for its asynchronous copy"),
        ("cp.async.ca.shared.global [%r4], [%rd3], 4; cp.async.commit_group;", "copies under way"),
        ("st.global.b32 [%rd3+8], %r1;", "out of bounds"),
        ("st.global.b32 [%rd3+2], %r1;", "misaligned"),
        ("st.shared.b32 [%r4+400], %r1;", "out of bounds"),
        ("st.global.b32 [%rd1], %r1;", "st.global of global memory that block 0 thread 0 wrote"),
        ("@%p1 st.global.b32 [%rd3], %r1;", "a predicate that nothing has set"),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 bra $past; bar.sync 0; $past:", "deadlock: 63 threads wait in barrier"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $past; shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1; $past:", "deadlock"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bra $a; bar.warp.sync -1; ret; $a: shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;",
         "threads diverge"),
        ("$again: bra $again;", "does not end"),
        ("mbarrier.arrive.shared::cta.b64 _, [%r3];", "is not initialised"),
        ("wgmma.wait_group.sync.aligned 0;", "deadlock"),
    ],
)  # fmt: skip
def test_wrong_programs_are_told(body: str, message: str) -> None:
    with pytest.raises(EmulationError, match=message):
        launch(body)


@pytest.mark.parametrize(
    "body",
    [
        "add.sat.f32 %f1, %f2, %f3;",
        "add.rz.f32 %f1, %f2, %f3;",
        "mad.lo.cc.u32 %r5, %r1, %r2, %r3;",
        "cvt.rn.satfinite.bf16.f32 %h1, %f1;",
        "cvt.f16.f32 %h1, %f1;",
        "max.xorsign.abs.f32 %f1, %f2, %f3;",
        "ld.global.relaxed.gpu.b32 %r5, [%rd3];",
        "ld.volatile.shared.b32 %r5, [%r4];",
        "atom.global.add.u32 %r5, [%rd3], %r1;",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1,%r2,%r3,%r4}, {%r1,%r2}, {%r1}, {%r1,%r2,%r3,%r4};",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b8x16 {%r1,%r2,%r3,%r4}, [%r4];",
        "ld.global.v2.b32 %r5, [%rd3];",
        "mov.u32 %r5, %clock;",
        "bra $nowhere;",
        "call.uni (%r1), f, (%r2);",
    ],
)  # fmt: skip
def test_what_has_no_exact_meaning_is_refused(body: str) -> None:
    with pytest.raises(EmulationError, match="ptx: "):
        check(HEAD + body + " ret;\n}\n")


def test_two_blocks_may_not_write_one_place() -> None:
    with pytest.raises(EmulationError, match="that block 0 thread 0 wrote"):
        launch("mov.u32 %r5, %ctaid.x; st.global.b32 [%rd3], %r5;", blocks=2)


def test_bank_conflicts_are_counted() -> None:
    """Words 32 apart lie in one bank: 16 lanes of each half meet there."""
    _, counts = launch("and.b32 %r5, %r1, 3; shl.b32 %r5, %r5, 7; add.s32 %r5, %r3, %r5; ld.shared.b32 %r6, [%r5];")
    assert counts.shared_conflicts == 2 * 3
    _, counts = launch("ld.shared.b32 %r6, [%r4];")
    assert counts.shared_conflicts == 0


def test_lanes_of_one_instruction_may_tie_only_where_that_is_said() -> None:
    """A sum that each lane rounds its own way, stored to one place: which copy stays is not specified."""
    body = "and.b32 %r5, %r1, 32; add.s32 %r5, %r5, %r3; st.shared.b32 [%r5], %r1;"
    with pytest.raises(EmulationError, match="by thread 0, with no barrier between"):
        launch(body)
    _, counts = launch(body, ties=True)
    assert counts.tied == 2 * 31
    with pytest.raises(EmulationError, match="by thread 31, with no barrier between"):  # of two warps
        launch("st.shared.b32 [%r3], %r1;", ties=True)
