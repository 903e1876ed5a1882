"""The count of what the CUDA kernels execute: the machine that runs them, and their budgets."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from sass import executed as counting
from sass import machine, operations
from sass.listing import code_of
from sass.machine import GLOBAL_BASE, Launch, Machine

from benchmarks.sass import find_tool


def _run(
    text: str, memory: int | list[int], blocks: int = 1, threads: int = 64
) -> tuple[dict[str, int], list[int]]:
    """Run a listing on one cluster; return how many warps executed each line, and the memory.

    `memory` is what the kernel's argument points to: 32-bit words, or the number of words of 0.
    """
    words = np.array(memory if isinstance(memory, list) else [0] * memory, np.uint32)
    launch = Launch(blocks, threads, 256, blocks, GLOBAL_BASE.to_bytes(8, "little"))
    code = code_of(text)
    counts = Machine(code, launch, words.view(np.uint8)).run()
    lines = [f"{line.opcode} {line.operands}".strip() for line in code.instructions]
    return dict(zip(lines, counts.tolist(), strict=True)), words.tolist()


#: Stores R1 in the word of memory with index R0.
STORE = "LDC.64 R2, c[0x0][0x210]; IMAD.WIDE R2, R0, 0x4, R2; STG.E desc[UR4][R2.64], R1; EXIT"
PARTING = f"""S2R R0, SR_TID.X; BSSY B0, `(.L_end); ISETP.GE.AND P0, PT, R0, 0x28, PT
    @P0 BRA `(.L_other); MOV R1, 0x1; BRA `(.L_end); .L_other:; MOV R1, 0x2; .L_end:; BSYNC B0
    {STORE}"""
LOOP = """S2R R0, SR_TID.X; MOV R1, RZ; BSSY B0, `(.L_out); .L_loop:; VIADD R1, R1, 0x1
    ISETP.LT.AND P0, PT, R1, R0, PT; @P0 BRA `(.L_loop); BSYNC B0; .L_out:; EXIT"""
APART = LOOP.replace("BSYNC B0", "NOP")
SOURCE = list(range(100, 116))
# One thread of each block copies 64 bytes; all wait for them.
COPY = f"""S2R R0, SR_TID.X; ULDC.64 UR6, c[0x0][0x210]; S2UR UR4, SR_CgaCtaId; UMOV UR5, 0x400
    ULEA UR8, UR4, UR5, 0x18; UIADD3 UR10, UR8, 0x40, URZ; UMOV UR11, UR8; UMOV UR12, 0x1ffffe
    UMOV UR14, 0x4; MOV R5, 0x40; ISETP.NE.AND P0, PT, R0, RZ, PT
    @!P0 SYNCS.EXCH.64 URZ, [UR8], UR12; BAR.SYNC.DEFER_BLOCKING 0x0; @P0 BRA `(.L_wait)
    SYNCS.ARRIVE.TRANS64 RZ, [UR8], R5; UBLKCP.S.G [UR10], [UR6], UR14, desc[UR16]; .L_wait:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], RZ; @!P1 BRA `(.L_wait)
    LOP3.LUT R8, R0, 0xf, RZ, 0xc0, !PT; LEA R6, R8, UR10, 0x2; LDS R1, [R6]
    S2R R9, SR_CTAID.X; IMAD R0, R9, 0x40, R0; {STORE.replace("64], R1", "64+0x40], R1")}"""
# Each of four blocks writes 4 words, of which its rank is the first, into every peer's memory, and
# waits for those of its peers.
PUSH = f"""S2R R0, SR_TID.X; S2R R4, SR_CgaCtaId; MOV R3, 0x400; LEA R19, R4, R3, 0x18
    UMOV UR4, 0x1ffffe; MOV R2, 0x40; ISETP.NE.AND P0, PT, R0, RZ, PT
    @!P0 SYNCS.EXCH.64 URZ, [R19+URZ], UR4; UCGABAR_ARV; UCGABAR_WAIT
    @!P0 SYNCS.ARRIVE.TRANS64 RZ, [R19+URZ], R2; ISETP.GE.AND P1, PT, R0, 0x4, PT
    VIADD R3, R19, 0x40; PRMT R13, R0, 0x654, R19; PRMT R3, R0, 0x654, R3; LEA R12, R4, R3, 0x4
    @!P1 STAS.128 [R12.64], R4; .L_wait:; SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R19+URZ], RZ
    @!P2 BRA `(.L_wait); LOP3.LUT R5, R0, 0x3, RZ, 0xc0, !PT; LEA R5, R5, R19, 0x4
    LDS R1, [R5+0x40]; S2R R9, SR_CTAID.X; IMAD R0, R9, 0x20, R0; UCGABAR_ARV; UCGABAR_WAIT
    {STORE}"""
STG, MOV1, MOV2 = "STG.E desc[UR4][R2.64], R1", "MOV R1, 0x1", "MOV R1, 0x2"
TRY = "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR8], RZ"
PUSHING = {"blocks": 4, "threads": 32}


@pytest.mark.parametrize(
    ("text", "grid", "before", "after", "expected"),
    [
        # parts of a warp are counted apart until they meet: at BSYNC, for which each part waits
        (PARTING, {}, 64, [1] * 40 + [2] * 24, {MOV1: 2, MOV2: 1, "BSYNC B0": 3, STG: 2}),
        (PARTING.replace("GE", "LT"), {}, 64, [2] * 40 + [1] * 24, {MOV1: 1, MOV2: 2, STG: 2}),
        (PARTING.replace("BSYNC B0", "NOP"), {}, 64, [1] * 40 + [2] * 24, {STG: 3}),
        # what is predicated is issued, but does nothing
        (PARTING.replace("STG", "@P0 STG"), {}, 64, [0] * 40 + [2] * 24, {STG: 2}),
        # a warp loops as often as its slowest lane; lanes arrive at BSYNC one after another, and
        # leave it together, or do not, from either end
        (LOOP, {}, 0, [], {"VIADD R1, R1, 0x1": 31 + 63, "BSYNC B0": 31 + 32, "EXIT": 2}),
        (APART, {}, 0, [], {"EXIT": 31 + 32}),
        (APART.replace("MOV R1", "IADD3 R0, -R0, 0x3f, RZ; MOV R1"), {}, 0, [], {"EXIT": 31 + 32}),
        # waiting is one try: thread 0 has parted from its warp, which makes three parts in a block
        (COPY, {"blocks": 2}, SOURCE + [0] * 128, SOURCE * 9, {TRY: 6}),
        (PUSH, PUSHING, 128, [0, 1, 2, 3] * 32, {"LDS R1, [R5+0x40]": 4}),
    ],
)
def test_what_a_listing_executes(
    text: str, grid: dict[str, int], before: Any, after: list[int], expected: dict[str, int]
) -> None:
    counts, memory = _run(text, before, **grid)
    assert {line: counts[line] for line in expected} == expected
    assert memory == after


@pytest.mark.parametrize(
    ("barrier", "place", "limit"),
    [
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "SR_TID.X", "0x20"),
        ("UCGABAR_WAIT", "SR_TID.X", "0x20"),
        ("UCGABAR_WAIT", "SR_CgaCtaId", "0x1"),
    ],
)
@pytest.mark.parametrize("then", ["BRA `(.L_wait)", "EXIT"])
def test_a_barrier_waits_for_all_that_have_not_ended(
    barrier: str, place: str, limit: str, then: str
) -> None:
    # Warp or block 0 writes what the others read after the barrier, and waits before that
    text = f"""S2R R0, {place}; LDC.64 R4, c[0x0][0x210]; ISETP.LT.AND P0, PT, R0, {limit}, PT
        @P0 BRA `(.L_late); .L_wait:; {barrier}; LDG.E R1, desc[UR4][R4.64]; S2R R0, SR_TID.X
        {STORE}; .L_late:; WARPSYNC.ALL; MOV R6, 0x7; STG.E desc[UR4][R4.64], R6; {then}"""
    memory = _run(text, 64, blocks=2)[1]
    assert memory[32:] == [7] * 32


TENSOR = "@P0 BRA `(.L_end); TENSOR.CORE R1, R0; .L_end:; EXIT"
NOT_COPIED = COPY.replace("UBLKCP.S.G [UR10], [UR6], UR14, desc[UR16]", "NOP")


@pytest.mark.parametrize(
    ("text", "memory", "grid", "message"),
    [
        (TENSOR, 0, {}, r"unknown instruction TENSOR\.CORE R1, R0"),
        ("FADD.SAT R1, R2, R3", 0, {}, r"unknown .*FADD\.SAT"),
        ("LDC R1, c[0x0][0x1c]", 0, {}, r"unknown .*constant c\[0x0\]\[0x1c\]"),
        ("SHFL.BFLY PT, R1, R2, 0x1, 0x1e0f", 0, {}, "unknown .*without 0x1f"),
        ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4], RZ", 0, {}, "unknown .*A1T0"),
        ("LDG.E.STRONG.GPU R1, desc[UR4][R2.64]", 0, {}, "unknown .*STRONG"),
        (PARTING, 8, {}, "outside of memory"),
        (".L_loop:; NOP; BRA `(.L_loop)", 0, {}, "does not end within 500 steps"),
        (NOT_COPIED, 144, {"blocks": 2}, "waits for ever"),
        (PUSH.replace("STAS.128", "STAS"), 128, PUSHING, "waits for ever"),  # a quarter of it
    ],
)
def test_what_is_not_known_or_wrong_is_refused_when_it_is_executed(
    text: str, memory: int, grid: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "MAX_STEPS", 500)
    with pytest.raises(RuntimeError, match=message):
        _run(f"{text}; EXIT", memory, **grid)
    if text == TENSOR:
        _run(text.replace("@P0", "@!P0"), 0)


@pytest.mark.parametrize(
    ("lines", "result"),
    [
        ("MOV R0, 0x80000001; SHF.R.S64 R1, RZ, 0x1f, R0", 2),
        ("MOV R0, 0x8000; PRMT R1, R0, 0x9910, RZ", 0xFFFF8000),
        ("MOV R0, 0xf0f; LOP3.LUT R1, R0, 0xff, 0xf000, 0xf8, !PT", 0xF0F),
        # 64 bits: 5 - 7 borrows, 7 - 7 and 5 - 0 do not
        ("MOV R0, 0x5; IADD3 R1, P0, R0, -0x7, RZ; IADD3.X R1, RZ, RZ, RZ, P0, !PT", 0),
        ("MOV R0, 0x7; IADD3 R1, P0, R0, -0x7, RZ; IADD3.X R1, RZ, RZ, RZ, P0, !PT", 1),
        ("MOV R0, 0x5; IADD3 R1, P0, R0, -RZ, RZ; IADD3.X R1, RZ, RZ, RZ, P0, !PT", 1),
        ("MOV R0, 0x7fc00000; FMNMX R1, R0, 1, !PT", 0x3F800000),
        # bfloat16, ties to even
        ("MOV R0, 0x3fc04000; F2FP.BF16.F32.PACK_AB R1, R0, 1.00390625", 0x3FC03F80),
        ("MOV R0, 0x3fc18000; F2FP.BF16.F32.PACK_AB R1, R0, -1", 0x3FC2BF80),
    ],
)
def test_arithmetic_that_losses_do_not_show(lines: str, result: int) -> None:
    assert _run(f"{lines}; MOV R0, RZ; {STORE}", 1, threads=32)[1] == [result]


# ------------------------------------------------------------------------------------ the count


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, float], tuple[float, ...]]:
    """Return a function of divergence and temperature that counts what runs for each element.

    It returns the instructions, and those of them that are special functions.
    """
    for tool in ("nvcc", "nvdisasm"):
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} (on PATH, in CUDA_HOME, or in triton's wheel)")
    folder = tmp_path_factory.mktemp("executed")
    launcher = counting.compile_launcher(folder)
    compiled = cache(lambda divergence: counting.compile_cluster(divergence, folder))
    return lambda name, t: counting.execute(name, t, compiled(name), launcher)


slow = pytest.mark.slow


# upper limits of the instructions and special functions per element; with less than 85 % of them
# something was not counted. If both sides have an exponential, two passes compute two each
@pytest.mark.parametrize(
    ("divergence", "temperature", "most", "most_special"),
    [
        ("forward_kl", 2.0, 34.5, 4.3),
        pytest.param("forward_kl", 3.0, 38.7, 6.3, marks=slow),
        pytest.param("reverse_kl", 3.0, 41.7, 5.3, marks=slow),
        pytest.param("jsd", 3.0, 94.5, 9.3, marks=slow),
        pytest.param("tvd", 3.0, 56.5, 7.3, marks=slow),
        pytest.param("mse", 1.0, 34.7, 2.2, marks=slow),
        pytest.param("none", 1.0, 24.0, 2.3, marks=slow),
    ],
)
def test_work(
    divergence: str, temperature: float, most: float, most_special: float, executed: Any
) -> None:
    total, special = executed(divergence, temperature)
    assert 0.85 * most < total <= most
    assert 0.85 * most_special < special <= most_special


#: What an instruction might be taken for: another function of the same operands.
MISREAD = {
    "FADD": operator.sub,
    "FFMA": lambda a, b, c: a * b - c,
    "SHFL.BFLY": lambda a, n: (True, a),
    "F2FP.BF16.F32.PACK_AB": lambda a, b: np.full(len(a), 0x3F803F80, np.uint32),
}


@pytest.mark.parametrize("name", MISREAD)
def test_code_that_is_read_wrongly_is_refused(
    name: str, executed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands, _ = operations.OPERATIONS[name]
    monkeypatch.setitem(operations.OPERATIONS, name, (operands, MISREAD[name]))
    with pytest.raises((AssertionError, NotImplementedError), match=r"close|unknown instruction"):
        executed("forward_kl", 2.0)
