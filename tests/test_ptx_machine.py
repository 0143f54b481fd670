"""The GPU in numpy of ``ptx/`` itself: single instructions against numbers worked out otherwise, and small kernels that
do what they must not."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from ptx import Fault, Grid, Traffic, parse, run
from ptx.program import kernels

HEAD = """
.version 8.8
.target sm_90a
.extern .shared .align 512 .b8 memory[];
.visible .entry test(.param .u64 test_param_0, .param .u64 test_param_1)
{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<40>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    ld.param.u64 %rd1, [test_param_0];
    ld.param.u64 %rd2, [test_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd3, %r1, 4;
    mov.u32 %r3, memory;
    shl.b32 %r4, %r1, 2;
    add.s32 %r4, %r4, %r3;
"""


def execute(
    body: str, given: np.ndarray, made: np.ndarray, seed: int = 0, traffic: Traffic | None = None, **launch: Any
) -> None:
    """A kernel of two tensors: %rd1 and %rd2 are their addresses, %r1 and %r2 thread and block, %r3 shared memory and
    %r4 a word there for each thread."""
    grid = Grid(**({"blocks": (1, 1, 1), "threads": 32, "shared": 4096} | launch))
    memories = {
        name: (data.ctypes.data, data.reshape(-1).view(np.uint8)) for name, data in (("given", given), ("made", made))
    }
    parameters = struct.pack("<QQ", given.ctypes.data, made.ctypes.data)
    run(parse(HEAD + body + "\nret;\n}\n", "test"), grid, parameters, memories, seed, traffic)


def single(instruction: str, *operands: int) -> int:
    """The result ``%r20`` of an instruction on ``%r10``, ``%r11``, ``%r12``."""
    given = np.array([*operands, 0, 0, 0][:3], np.uint32)
    made = np.zeros(32, np.uint32)
    loads = "".join(f"ld.global.u32 %r{10 + i}, [%rd1+{4 * i}];" for i in range(3))
    execute(f"{loads} {instruction} add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r20;", given, made)
    assert (made == made[0]).all()
    return int(made[0])


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


NAN = bits(float("nan"))


@pytest.mark.parametrize(
    ("instruction", "operands", "result"),
    [
        ("add.s32 %r20, %r10, %r11;", (0xFFFFFFFF, 3), 2),
        ("mad.lo.s32 %r20, %r10, -3, %r11;", (7, 1), 0xFFFFFFFF - 19),
        ("div.s32 %r20, %r10, %r11;", (-7 & 0xFFFFFFFF, 2), -3 & 0xFFFFFFFF),
        ("max.s32 %r20, %r10, -9;", (-12 & 0xFFFFFFFF,), -9 & 0xFFFFFFFF),
        ("shl.b32 %r20, %r10, %r11;", (1, 32), 0),
        ("shr.u32 %r20, %r10, %r11;", (0x80000000, 40), 0),
        ("shr.s32 %r20, %r10, %r11;", (0x80000000, 40), 0xFFFFFFFF),
        ("bfe.u32 %r20, %r10, %r11, %r12;", (0x12345678, 8, 12), 0x456),
        ("bfe.s32 %r20, %r10, %r11, %r12;", (0x12345F78, 8, 4), 0xFFFFFFFF),
        ("bfe.s32 %r20, %r10, %r11, %r12;", (0x92345678, 28, 8), 0xFFFFFFF9),
        ("prmt.b32 %r20, %r10, %r11, 0x7610;", (0x33221100, 0x77665544), 0x77661100),
        ("prmt.b32 %r20, %r10, %r11, 0x9;", (0x8000, 0), 0xFF),
        ("min.f32 %r20, %r10, %r11;", (NAN, bits(2)), bits(2)),
        ("max.f32 %r20, %r10, %r11, %r12;", (bits(-1), NAN, bits(3)), bits(3)),
        ("mov.b64 %rd4, {%r10, %r11}; sub.f32x2 %rd4, %rd4, %rd4; mov.b64 {%r20, %r21}, %rd4;", (bits(3), NAN), 0),
        ("mov.pred %p1, -1; mov.pred %p2, 1; xor.pred %p3, %p1, %p2; selp.b32 %r20, 5, 6, %p3;", (), 6),
        ("cvt.u16.u32 %rs1, %r10; add.rn.f32.bf16 %r20, %rs1, %r11;", (0x3F80, bits(0.25)), bits(1.25)),
        ("copysign.f32 %r20, %r10, %r11;", (bits(-3), bits(5)), bits(-5)),
        ("fma.rn.f32 %r20, %r10, %r11, %r12;", (bits(1 + 2**-12), bits(1 - 2**-12), bits(-1)), bits(-(2.0**-24))),
        ("div.full.f32 %r20, %r10, %r11;", (bits(1), bits(4)), bits(0.25)),
        ("div.approx.f32 %r20, %r10, %r11;", (bits(1), bits(2.0**127)), bits(0)),
        ("cvt.rzi.s32.f32 %r20, %r10;", (bits(-2.75),), -2 & 0xFFFFFFFF),
        ("cvt.rn.bf16x2.f32 %r20, %r10, %r11;", (bits(1 + 3 * 2**-8), bits(1 + 2**-8)), 0x3F823F80),
        ("cvt.rn.f16x2.f32 %r20, %r10, %r11;", (bits(65520), bits(-0.5)), 0x7C00B800),
        ("cvt.rna.tf32.f32 %r20, %r10;", (bits(1 + 2**-11),), bits(1 + 2**-10)),
        ("setp.neu.f32 %p1, %r10, %r11; selp.b32 %r20, 5, 6, %p1;", (NAN, NAN), 5),
        ("setp.ne.f32 %p1, %r10, %r11; selp.b32 %r20, 5, 6, %p1;", (NAN, NAN), 6),
        ("setp.ltu.f32 %p1, %r10, %r11; selp.b32 %r20, 5, 6, %p1;", (NAN, bits(1)), 5),
        ("mov.b32 {%rs1, %rs2}, %r10; mov.b32 %r20, {%rs2, %rs1};", (0x12345678,), 0x56781234),
        ("cvt.u16.u32 %rs1, %r10; cvt.s32.s16 %r20, %rs1;", (0x1FFFE,), 0xFFFFFFFE),
        ("setp.gt.s32 %p1, %r10, 0; @!%p1 bra after; mov.b32 %r11, 9; after: mov.b32 %r20, %r11;", (1, 4), 9),
        ("setp.gt.s32 %p1, %r10, 0; @!%p1 bra after; mov.b32 %r11, 9; after: mov.b32 %r20, %r11;", (0, 4), 4),
    ],
)
def test_instructions(instruction: str, operands: tuple[int, ...], result: int) -> None:
    assert single(instruction, *operands) == result


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_product_of_matrices(kind: str, seed: int) -> None:
    """ldmatrix and mma: rows of A and columns of B from shared memory, sums where the ISA says they are."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    given = torch.cat([a.flatten(), b.t().flatten()]).view(torch.int16).numpy().view(np.uint32).copy()
    made = np.zeros((16, 8), np.float32)
    # 192 words go into shared memory, where rows of A and columns of B have 32 bytes. Lane i names row i % 16 of A, its
    # left half or its right one, and column i % 8 of B, its upper half or its lower one.
    copies = "".join(f"ld.global.u32 %r10, [%rd4+{128 * i}]; st.shared.u32 [%r4+{128 * i}], %r10;" for i in range(6))
    execute(
        f"""
        add.s64 %rd4, %rd1, %rd3; {copies} bar.sync 0;
        and.b32 %r10, %r1, 15; shl.b32 %r10, %r10, 5; add.s32 %r10, %r10, %r3;
        and.b32 %r11, %r1, 16; add.s32 %r10, %r10, %r11;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r10];
        and.b32 %r12, %r1, 7; shl.b32 %r12, %r12, 5; add.s32 %r12, %r12, %r3;
        and.b32 %r13, %r1, 8; shl.b32 %r13, %r13, 1; add.s32 %r12, %r12, %r13;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r24, %r25}}, [%r12+512];
        mov.f32 %f1, 0f3F800000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
        mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f1, %f2, %f3, %f4}}, {{%r20, %r21, %r22, %r23}},
            {{%r24, %r25}}, {{%f1, %f2, %f3, %f4}};
        mul.wide.u32 %rd5, %r1, 8; add.s64 %rd5, %rd5, %rd2;
        st.global.v2.f32 [%rd5], {{%f1, %f2}}; st.global.v2.f32 [%rd5+256], {{%f3, %f4}};
        """,
        given,
        made,
    )
    np.testing.assert_allclose(made, (a.double() @ b.double() + 1).numpy(), rtol=1e-6, atol=1e-6)


OTHER_WORD = "xor.b32 %r5, %r4, 128; st.shared.u32 [%r4], %r1; {} ld.shared.u32 %r10, [%r5];"
SIGNAL = """
    setp.ne.s32 %p1, %r1, 0; setp.eq.s32 %p2, %r2, 0;
    add.s64 %rd4, %rd2, %rd3;
    @!%p2 bra reader;
    st.global.u32 [%rd4+128], %r1; {stored} bar.sync 0;
    @%p1 bra out; {signal} bra out;
    reader: @%p1 bra told;
    again: {poll} setp.eq.s32 %p3, %r10, 0; @%p3 bra again;
    told: {seen} bar.sync 0; ld.global.u32 %r11, [%rd4+128];
    out:
"""
RELEASE, ACQUIRE = "st.release.gpu.global.u32 [%rd2], 1;", "ld.acquire.gpu.global.u32 %r10, [%rd2];"
RELAXED = "ld.relaxed.gpu.global.u32 %r10, [%rd2];"


def signalled(signal: str = RELEASE, poll: str = ACQUIRE, seen: str = "", seed: int = 0, together: bool = True) -> None:
    """Block 0 stores and raises a signal, block 1 waits for it and loads."""
    made = np.zeros(64, np.uint32)
    body = SIGNAL.format(stored="", signal=signal, poll=poll, seen=seen)
    execute(body, np.zeros(1, np.uint32), made, seed, blocks=(2, 1, 1), cooperative=together)


@pytest.mark.parametrize("number", range(4))
def test_signals_between_blocks(number: int) -> None:
    signalled(seed=number)
    signalled(poll=RELAXED, seen="fence.acq_rel.gpu;", seed=number)
    with pytest.raises(Fault, match="made: read at 128 while another warp may be writing"):
        signalled(signal="st.relaxed.gpu.global.u32 [%rd2], 1;", seed=number)
    with pytest.raises(Fault, match="made: read at 128"):
        signalled(poll=RELAXED, seed=number)
    with pytest.raises(Fault, match="no thread can go on"):
        signalled(signal="", seed=number)


def test_blocks_that_are_not_launched_together_do_not_wait_for_each_other() -> None:
    """In one of the orders in which they may run."""
    found = []
    for seed in range(8):
        try:
            signalled(seed=seed, together=False)
        except Fault as fault:
            found.append(str(fault))
    assert 0 < len(found) < 8
    assert all("no thread can go on" in text for text in found)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (OTHER_WORD.format(""), "shared memory of block 0: read at"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 st.shared.u32 [%r3], 1; @!%p1 st.shared.u32 [%r3], 2;", "two warps at once"),
        ("st.shared.u32 [%r3], %r1;", "written by two threads of one instruction"),
        ("ld.shared.u32 %r10, [%r3]; setp.lt.s32 %p1, %r1, 32; @%p1 st.shared.u32 [%r3], %r1;", "may be reading"),
        ("ld.global.u32 %r10, [%rd1+4096];", "given: offsets 4096 to 4100 of 256 bytes|in no tensor|made: offsets"),
        ("ld.shared.u32 %r10, [%r4+4096];", "shared memory of block 0: offsets"),
        ("ld.global.u32 %r10, [%rd1+2];", "not aligned"),
        ("st.global.u32 [%rd2], 7; ld.global.nc.u32 %r10, [%rd2];", "loaded as constant, and written"),
        ("setp.lt.s32 %p1, %r1, 40; @%p1 bra out; bar.sync 0; out: bar.sync 0;", "no thread can go on"),
        ("setp.lt.s32 %p1, %r1, 40; @%p1 bra out; shfl.sync.idx.b32 %r10, %r1, 0, 31, -1; out:", "no thread can go on"),
        ("cp.async.ca.shared.global [%r4], [%rd1], 4; cp.async.commit_group;", "while copies are under way"),
        ("div.s32 %r10, %r1, 0;", "division by zero"),
        (
            "mbarrier.init.shared::cta.b64 [%r3], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 24;"
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3+16], [%rd1], 24, [%r3];",
            "not multiples of 16",
        ),
    ],
)
def test_a_fault_is_found(body: str, found: str) -> None:
    with pytest.raises(Fault, match=found):
        execute(body, np.zeros(64, np.uint32), np.zeros(64, np.uint32), threads=64)


def test_a_barrier_orders_the_accesses_of_warps() -> None:
    made = np.zeros(64, np.uint32)
    body = OTHER_WORD.format("bar.sync 0;") + "add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r10;"
    execute(body, np.zeros(1, np.uint32), made, threads=64)
    np.testing.assert_array_equal(made, np.arange(64) ^ 32)


COPY = """
    setp.ne.s32 %p1, %r1, 0; setp.ne.s32 %p3, %r1, 32;
    @%p1 bra ready; mbarrier.init.shared::cta.b64 [%r3], 1; ready: bar.sync 0;
    @%p1 bra wait;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3+16], [%rd1], 256, [%r3];
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0; {again}
    ld.shared.u32 %r10, [%r4+16]; add.s64 %rd4, %rd2, %rd3; st.global.u32 [%rd4], %r10;
"""


def test_the_copy_engine() -> None:
    given, made = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    execute(COPY.format(bytes=256, again="@!%p2 bra wait;"), given, made, threads=64)
    np.testing.assert_array_equal(made, given)
    with pytest.raises(Fault, match="no thread can go on"):
        execute(COPY.format(bytes=272, again="@!%p2 bra wait;"), given, made, threads=64)
    with pytest.raises(Fault, match="copies are under way"):
        execute(COPY.format(bytes=256, again=""), given, made, threads=64)


@pytest.mark.parametrize(
    ("shift", "access", "taken", "fewest"),
    [
        (2, "ld.shared.u32 %r10, [%r5];", 1, 1),
        (3, "ld.shared.u32 %r10, [%r5];", 2, 1),
        (7, "st.shared.u32 [%r5], %r1;", 32, 1),
        (0, "ld.shared.u8 %rs1, [%r5];", 1, 1),
        (4, "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r5];", 4, 4),
        (7, "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r5];", 32, 4),
        (4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];", 4, 4),
        (5, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];", 8, 4),
    ],
)
def test_bank_conflicts(shift: int, access: str, taken: int, fewest: int) -> None:
    """Of a warp whose threads go a power of two of bytes from one to the next."""
    traffic = Traffic()
    body = f"shl.b32 %r5, %r1, {shift}; add.s32 %r5, %r5, %r3; {access}"
    execute(body, np.zeros(1, np.uint32), np.zeros(1, np.uint32), traffic=traffic)
    assert (traffic.total().taken, traffic.total().fewest) == (taken, fewest)
    assert len(traffic.conflicts()) == (taken > fewest)


def test_an_unknown_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match="not known here: sin"):
        execute("sin.approx.f32 %f1, %f1;", np.zeros(1, np.uint32), np.zeros(1, np.uint32))


def test_a_kernel_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no kernel other, but test"):
        parse(HEAD + "ret; }", "other")
    assert kernels(HEAD) == ["test"]
