"""The count of what the CUDA kernels execute: the machine that runs them, and their budgets."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks import cuda_executed, sass_machine, sass_operations
from benchmarks.cuda_executed import CARDS, Card, Executed, Planner, execute, same_code
from benchmarks.cuda_resources import (
    DIVERGENCES,
    NVCC_FLAGS,
    SOURCES,
    cluster_code,
    executed,
)
from benchmarks.executed_tables import executed_table
from benchmarks.sass import Code, find_tool, parse
from benchmarks.sass_machine import Counts, Machine
from benchmarks.sass_memory import Launch, Memory
from benchmarks.source_functions import function_at

#: Instructions and special functions per element at most, at the temperature that takes most.
WORK = {
    "forward_kl": (38.7, 6.3),
    "reverse_kl": (41.7, 5.3),
    "jsd": (109.0, 9.3),
    "tvd": (56.5, 8.3),
    "mse": (34.7, 2.2),
    "none": (24.0, 2.3),
}

# ---------------------------------------------------------------------------------- the machine

BASE = Memory(np.zeros(0, np.uint8)).base


def _listing(*lines: str) -> Code:
    """Return a kernel: labels end with a colon, the rest are instructions."""
    text, address = ".text.kernel:\n", 0
    for line in lines:
        if line.endswith(":"):
            text += f"{line}\n"
        else:
            text += f"        /*{address:04x}*/                   {line} ;\n"
            address += 16
    return parse(text)["kernel"]


def _run(
    code: Code, memory: int = 0, blocks: int = 1, threads: int = 64, cluster: int = 1
) -> tuple[Counts, np.ndarray]:
    """Return the counts, and memory: 32-bit words, whose address is the kernel's argument."""
    data = np.zeros(4 * memory, np.uint8)
    launch = Launch(blocks, cluster, threads, 256, BASE.to_bytes(8, "little"))
    counts = Machine(code, launch, Memory(data)).run()
    return counts, data.view(np.uint32)


def _parting(*join: str) -> Code:
    """Return a kernel in which 40 threads go one way and the others another."""
    begin, end = (join[0], join[1]) if join else ("NOP", "NOP")
    return _listing(
        "S2R R0, SR_TID.X",
        begin,
        "ISETP.GE.AND P0, PT, R0, 0x28, PT",
        "@P0 BRA `(.L_other)",
        "MOV R1, 0x1",
        "BRA `(.L_end)",
        ".L_other:",
        "MOV R1, 0x2",
        ".L_end:",
        end,
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE R2, R0, 0x4, R2",
        "STG.E desc[UR4][R2.64], R1",
        "EXIT",
    )


def test_parts_of_a_warp_are_counted_apart_until_they_meet() -> None:
    code = _parting("BSSY B0, `(.L_end)", "BSYNC B0")
    counts, memory = _run(code, 64)
    assert memory.tolist() == [1] * 40 + [2] * 24
    # the beginning, one side, the other, BSYNC (each part of the parted warp waits), the rest
    assert counts.warps.tolist() == [2, 2, 1, 3, 2]
    assert counts.lanes.tolist() == [64, 40, 24, 64, 64]
    apart, memory = _run(_parting(), 64)
    assert memory.tolist() == [1] * 40 + [2] * 24
    assert apart.warps.tolist() == [2, 2, 1, 3]


def test_a_warp_loops_as_often_as_its_slowest_lane() -> None:
    code = _listing(
        "S2R R0, SR_TID.X",
        "IMAD.MOV.U32 R1, RZ, RZ, RZ",
        "BSSY B0, `(.L_out)",
        ".L_loop:",
        "VIADD R1, R1, 0x1",
        "ISETP.LT.AND P0, PT, R1, R0, PT",
        "@P0 BRA `(.L_loop)",
        "BSYNC B0",
        ".L_out:",
        "EXIT",
    )
    counts, _ = _run(code)
    # threads 0 and 1 pass once, thread i passes i times
    assert counts.warps[1] == 31 + 63
    assert counts.lanes[1] == 1 + sum(range(64))
    # lanes arrive at BSYNC one after another, and leave it together
    assert counts.warps.tolist() == [2, 31 + 63, 31 + 32, 2]


def test_a_predicated_instruction_is_issued_but_does_nothing() -> None:
    code = _listing(
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        "IMAD.WIDE R2, R0, 0x4, R2",
        "ISETP.EQ.AND P0, PT, R0, 0x5, PT",
        "@P0 STG.E desc[UR4][R2.64], R0",
        "EXIT",
    )
    counts, memory = _run(code, 64)
    assert counts.warps.tolist() == [2]
    assert memory.nonzero()[0].tolist() == [5]


# One thread of each block copies 64 bytes; the others wait for them, come what may first.
COPY = (
    "S2R R0, SR_TID.X",
    "LDC.64 R2, c[0x0][0x210]",
    "ULDC.64 UR6, c[0x0][0x210]",
    "S2UR UR4, SR_CgaCtaId",
    "UMOV UR5, 0x400",
    "ULEA UR8, UR4, UR5, 0x18",  # the mbarrier, in this block's shared memory
    "UIADD3 UR9, UR8, 0x0, URZ",
    "UIADD3 UR10, UR8, 0x40, URZ",  # where the copy goes to, and its mbarrier
    "UMOV UR11, UR9",
    "UMOV UR12, 0xffffe",
    "USHF.L.U32 UR12, UR12, 0x1, URZ",
    "UIADD3 UR12, UR12, 0x2, URZ",
    "UMOV UR13, URZ",
    "UMOV UR14, 0x4",
    "MOV R5, 0x40",
    "MOV R7, RZ",
    "ISETP.NE.AND P0, PT, R0, RZ, PT",
    "@!P0 SYNCS.EXCH.64 URZ, [UR9], UR12",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P0 BRA `(.L_wait)",
    "SYNCS.ARRIVE.TRANS64 RZ, [UR9], R5",
    "UBLKCP.S.G [UR10], [UR6], UR14, desc[UR16]",
    ".L_wait:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R7",
    "@!P1 BRA `(.L_wait)",
    "IMAD.U32 R6, RZ, RZ, UR10",
    "LOP3.LUT R8, R0, 0xf, RZ, 0xc0, !PT",
    "LEA R6, R8, R6, 0x2",
    "LDS R6, [R6]",
    "S2R R9, SR_CTAID.X",
    "IMAD R9, R9, 0x40, R0",
    "IMAD.WIDE R2, R9, 0x4, R2",
    "STG.E desc[UR4][R2.64+0x40], R6",
    "EXIT",
)


def test_waiting_for_a_copy_is_one_try() -> None:
    code = _listing(*COPY)
    data = np.concatenate([np.arange(100, 116), np.zeros(128)]).astype(np.uint32)
    launch = Launch(2, 2, 64, 256, BASE.to_bytes(8, "little"))
    memory = Memory(data.view(np.uint8))
    counts = Machine(code, launch, memory).run()
    assert data[16:].tolist() == list(range(100, 116)) * 8
    tries = [i for i, one in enumerate(code.instructions) if "TRYWAIT" in one.opcode]
    block = next(i for i, block in enumerate(code.blocks) if tries[0] in block)
    # thread 0 has parted from its warp for the copy: three parts in a block, each tries once
    assert counts.warps[block] == 6
    assert counts.lanes[block] == 128
    waits = [x for x in COPY if "UBLKCP" not in x]
    with pytest.raises(RuntimeError, match="waits for ever"):
        Machine(_listing(*waits), launch, Memory(data.view(np.uint8))).run()


# Each of four blocks writes its rank into every peer's memory, and waits for theirs.
PUSH = (
    "S2R R0, SR_TID.X",
    "S2R R4, SR_CgaCtaId",
    "S2R R18, SR_SWINHI",
    "MOV R3, 0x400",
    "LEA R19, R4, R3, 0x18",
    "UMOV UR4, 0xfffff",
    "USHF.L.U32 UR4, UR4, 0x1, URZ",
    "MOV R2, 0x20",
    "ISETP.NE.AND P0, PT, R0, RZ, PT",
    "@!P0 SYNCS.EXCH.64 URZ, [R19+URZ], UR4",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
    "@!P0 SYNCS.ARRIVE.TRANS64 RZ, [R19+URZ], R2",
    "ISETP.GT.U32.AND P1, PT, R0, 0x3, PT",
    "VIADD R3, R19, 0x40",
    "PRMT R13, R0, 0x654, R19",
    "PRMT R3, R0, 0x654, R3",
    "LEA R12, R4, R3, 0x2",
    "@!P1 STAS [R12.64], R4",
    "VIADD R6, R12, 0x20",
    "MOV R7, R13",
    "@!P1 STAS [R6.64], R0",
    ".L_wait:",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R19+URZ], RZ",
    "@!P2 BRA `(.L_wait)",
    "LOP3.LUT R5, R0, 0x3, RZ, 0xc0, !PT",
    "LEA R5, R5, R19, 0x2",
    "LDS R1, [R5+0x40]",
    "MOV R8, R3",  # the first peers' memory, by a generic address
    "MOV R9, R18",
    "@!P1 LD.E R10, [R8]",
    "@!P1 IADD3 R1, R1, R10, RZ",
    "LDC.64 R2, c[0x0][0x210]",
    "S2R R9, SR_CTAID.X",
    "IMAD R9, R9, 0x20, R0",
    "IMAD.WIDE R2, R9, 0x4, R2",
    "STG.E desc[UR4][R2.64], R1",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
    "EXIT",
)


def test_blocks_push_into_each_others_memory() -> None:
    counts, memory = _run(_listing(*PUSH), 4 * 32, blocks=4, threads=32, cluster=4)
    # the first word of every peer is what rank 0 wrote: 0
    assert memory.tolist() == [0, 1, 2, 3] * 32
    assert counts.warps[0] == 4
    short = [x for x in PUSH if "[R6.64]" not in x]  # half of the bytes that are expected
    with pytest.raises(RuntimeError, match="waits for ever"):
        _run(_listing(*short), 4 * 32, blocks=4, threads=32, cluster=4)


def test_a_barrier_waits_for_all_that_are_there() -> None:
    """One of two blocks, or warps, goes past a barrier's arrival to its end, or to a wait."""

    def of(here: str, *, ends: bool) -> Code:
        return _listing(
            here,
            "ISETP.EQ.AND P0, PT, R0, RZ, PT",
            "@P0 BRA `(.L_away)",
            "UCGABAR_ARV",
            "BAR.SYNC.DEFER_BLOCKING 0x0",
            "UCGABAR_WAIT",
            "EXIT",
            ".L_away:",
            "EXIT" if ends else "UCGABAR_WAIT",
            "EXIT",
        )

    rank, warp = "S2R R0, SR_CgaCtaId", "S2R R0, SR_TID.X"
    _run(of(rank, ends=True), blocks=2, cluster=2)
    _run(of(warp, ends=True), blocks=2, cluster=2)
    for here in (rank, warp):
        with pytest.raises(RuntimeError, match="waits for ever"):
            _run(of(here, ends=False), blocks=2, cluster=2)


def test_a_loop_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass_machine, "MAX_STEPS", 100)
    with pytest.raises(RuntimeError, match="does not end within 100 steps"):
        _run(_listing(".L_loop:", "NOP", "BRA `(.L_loop)"))


def test_what_is_not_known_is_refused_where_it_is_executed() -> None:
    lines = ("S2R R0, SR_TID.X", "@P0 BRA `(.L_end)", "TENSOR.CORE R1, R0", ".L_end:", "EXIT")
    code = _listing(*lines)
    with pytest.raises(NotImplementedError, match=r"at 0x20: TENSOR\.CORE R1, R0"):
        _run(code)
    _run(_listing(lines[0], lines[1].replace("@P0", "@!P0"), *lines[2:]))
    with pytest.raises(NotImplementedError, match=r"FADD\.SAT: SAT"):
        _run(_listing("FADD.SAT R1, R2, R3", "EXIT"))
    with pytest.raises(NotImplementedError, match=r"constant c\[0x0\]\[0x1c\]"):
        _run(_listing("LDC R1, c[0x0][0x1c]", "EXIT"))
    with pytest.raises(RuntimeError, match="outside of memory"):
        _run(_parting(), 8)


def test_arithmetic_of_rare_forms() -> None:
    """What a kernel's losses do not show, because it only occurs on paths that they do not take."""

    def of(*lines: str) -> int:
        store = ("LDC.64 R2, c[0x0][0x210]", "STG.E desc[UR4][R2.64], R1", "EXIT")
        return int(_run(_listing(*lines, *store), 1, threads=32)[1][0])

    assert of("MOV R0, 0x80000000", "SHF.R.S32.HI R1, RZ, 0x1f, R0") == 0xFFFFFFFF
    assert of("MOV R0, 0x80000001", "SHF.R.S64 R1, RZ, 0x1f, R0") == 2
    assert of("MOV R0, 0x80000001", "SHF.R.S64 R1, RZ, 0x21, R0") == 0xC0000000
    assert of("MOV R0, 0x12345678", "SHF.L.U32.HI R1, R0, 0x10, 0xabcd") == 0xABCD1234
    assert of("MOV R0, 0x8000", "PRMT R1, R0, 0x9910, RZ") == 0xFFFF8000
    assert of("MOV R0, 0xff", "LOP3.LUT R1, R0, 0xf0, 0xf00, 0xf8, !PT") == 0xFF
    assert of("MOV R0, 0xf0f", "LOP3.LUT R1, R0, 0xff, 0xf000, 0xf8, !PT") == 0xF0F
    assert of("MOV R0, 0x5", "IADD3 R1, R0, -0x7, RZ") == 0xFFFFFFFE
    # 64 bits: 5 - 7 borrows
    assert of("MOV R0, 0x5", "MOV R4, 0x7", "IADD3 R1, P0, R0, -R4, RZ",
              "IADD3.X R1, RZ, RZ, RZ, P0, !PT") == 0  # fmt: skip
    assert of("MOV R0, 0x7", "MOV R4, 0x5", "IADD3 R1, P0, R0, -R4, RZ",
              "IADD3.X R1, RZ, RZ, RZ, P0, !PT") == 1  # fmt: skip
    assert of("MOV R0, 0x5", "IADD3 R1, P0, R0, -RZ, RZ",
              "IADD3.X R1, RZ, RZ, RZ, P0, !PT") == 1  # fmt: skip
    assert of("MOV R0, 0x3fc00000", "FMNMX R1, R0, 1, PT") == 0x3F800000
    assert of("MOV R0, 0x7fc00000", "FMNMX R1, R0, 1, !PT") == 0x3F800000
    assert of("MOV R0, 0x3fc04000", "F2FP.BF16.F32.PACK_AB R1, R0, 1.00390625") == 0x3FC03F80
    # rounded to even, and maxima of two halves at once
    assert of("MOV R0, 0x3fc08000", "F2FP.BF16.F32.PACK_AB R1, R0, -1") == 0x3FC0BF80
    assert of("MOV R0, 0x3f80c000", "MOV R4, 0x40003f80",
              "HMNMX2.BF16_V2 R1, R0, R4, !PT") == 0x40003F80  # fmt: skip


# -------------------------------------------------------------------------- lines and functions


def test_the_function_of_a_line(tmp_path: Path) -> None:
    source = tmp_path / "some.cuh"
    source.write_text(
        "template <class T>\n"
        "DEVICE void outer(T x,\n"
        "                  T y) {  // a { brace\n"
        "  if (x) {\n"
        "    each([&](int i) {\n"
        '      use(i, "}");\n'
        "    });\n"
        "  }\n"
        "}\n"
        "struct Thing {\n"
        "  int size = 3;\n"
        "  DEVICE Thing(int n) : size(n) {\n"
        "    size += 1;\n"
        "  }\n"
        "};\n"
        "__global__ void __launch_bounds__(2, 3)\n"
        "    kernel() { outer(1, 2); }\n"
    )
    found = [function_at(str(source), line) for line in range(1, 18)]
    assert found == ["outer"] * 9 + [None] * 2 + ["Thing"] * 3 + [None] + ["kernel"] * 2
    assert function_at(str(tmp_path / "none.h"), 1) is None


CHAIN = """
.text.kernel:
\t//## File "/a/sums.cuh", line 7 inlined at "/a/rows.cuh", line 9
\t//## File "/a/rows.cuh", line 9
        /*0000*/                   MOV R1, 0x1 ;
        /*0010*/                   MOV R1, 0x2 ;
\t//## File "/a/rows.cuh", line 10
        /*0020*/                   EXIT ;
"""


def test_the_lines_of_an_instruction() -> None:
    places = [one.places for one in parse(CHAIN)["kernel"].instructions]
    chain = (("/a/sums.cuh", 7), ("/a/rows.cuh", 9))
    assert places == [chain, chain, (("/a/rows.cuh", 10),)]


# ------------------------------------------------------------------------------------ the count


def test_budgets_of_cards() -> None:
    assert [round(card.instructions(), 1) for card in CARDS] == [59.0, 46.7, 30.0]
    assert [round(card.special(), 1) for card in CARDS] == [7.4, 5.8, 3.7]
    some = Card("some", 100, 1.0, 3.0)
    assert some.instructions() == pytest.approx(128 * 100 * 1e9 / 0.5e12)
    work = Executed("forward_kl", "T = 2")
    work.phases["first"] = 25.0
    assert work.within(some)
    assert not replace(work, divergence="none").within(some)  # 4 bytes an element
    work.opcodes["MUFU.EX2"] = 3.3
    assert not work.within(some)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("nvcc", "nvdisasm"):
        if find_tool(tool) is None:
            pytest.skip(f"no {tool} (on PATH, in CUDA_HOME, or in triton's wheel)")
    return tmp_path_factory.mktemp("executed")


@pytest.fixture(scope="module")
def planner(folder: Path) -> Planner:
    return Planner(SOURCES, NVCC_FLAGS, folder)


@pytest.fixture(scope="module")
def forward_kl(folder: Path) -> Code:
    return cluster_code("forward_kl", folder)


def test_work_of_forward_kl(forward_kl: Code, planner: Planner) -> None:
    found = execute("forward_kl", 0, "T = 2", forward_kl, planner)
    assert found.instructions <= 34.5, found  # at T = 2: the goal is 34
    assert found.special <= WORK["forward_kl"][1], found
    # nothing is left out: two exponentials a side and element at least, and every phase
    assert found.special > 4
    assert all(found.phases[phase] > 1 for phase in ("around", "first", "gradient"))
    assert sum(found.functions.values()) == pytest.approx(found.instructions)
    assert sum(found.opcodes.values()) == pytest.approx(found.instructions)
    assert "`forward_kl`" in executed_table([found])


#: An instruction and what it might be taken for: another function of the same operands.
MISREAD = {
    "FADD": lambda x: sass_operations._arithmetic(x, lambda a, b: a - b),
    "FFMA": lambda x: sass_operations._arithmetic(x, lambda a, b, c: a * b - c),
    "SHFL": lambda x: sass_operations._move(_second(x)),
    "F2FP": lambda x: x.result(lambda: np.uint32(0x3F803F80)),
}


def _second(x: sass_operations._Parts) -> sass_operations._Parts:
    return sass_operations._Parts("MOV", frozenset(), x.operands[1:], x.registers, x.special)


@pytest.mark.parametrize("name", MISREAD)
def test_code_that_is_read_wrongly_is_refused(
    name: str, forward_kl: Code, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sass_operations._OPERATIONS, name, MISREAD[name])
    with pytest.raises(RuntimeError, match="comes out wrong"):
        execute("forward_kl", 0, "T = 2", forward_kl, planner)


def test_other_code_is_seen(forward_kl: Code) -> None:
    last = forward_kl.instructions[-1]
    other = Code([*forward_kl.instructions[:-1], replace(last, opcode="NOP2")], forward_kl.labels)
    assert not same_code(other, forward_kl)
    assert same_code(Code([replace(x, places=()) for x in forward_kl.instructions]), forward_kl)


def test_a_pass_that_was_renamed_is_missed(
    forward_kl: Code, planner: Planner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cuda_executed.PHASES, "first", "first_look")
    with pytest.raises(RuntimeError, match="no instruction belongs to first_look"):
        execute("forward_kl", 0, "T = 2", forward_kl, planner)


@pytest.mark.slow
def test_work_of_every_divergence(folder: Path) -> None:
    for found in executed(DIVERGENCES, folder):
        assert found.instructions <= WORK[found.divergence][0], found
        assert found.special <= WORK[found.divergence][1], found
