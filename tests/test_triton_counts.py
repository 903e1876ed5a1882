"""The count of what the Triton kernels execute: on a listing, against a simulation, the goals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import sass
from benchmarks.triton_counts import count, executed, trips
from benchmarks.triton_resources import Variant, compile_rows, has_two_passes
from fused_kd.backends.triton.configuration import Configuration, configuration

#: One pass: a loop over tiles (two loads, and three ways for the temperature) and one over the
#: rest; a program that waits; one that reports; a division's slow path.
LISTING = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_wait:
        /*0010*/                   LDG.E.STRONG.GPU R6, [R2.64] ;
        /*0020*/              @!P0 BRA `(.L_wait) ;
        /*0030*/               @P1 BRA `(.L_rest) ;
.L_tile:
        /*0040*/                   LDG.E.128 R4, [R2.64] ;
        /*0050*/                   LDG.E.128 R8, [R2.64+0x10] ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/              @!P3 BRA `(.L_done) ;
        /*0080*/               @P2 BRA `(.L_other) ;
        /*0090*/                   FMUL R4, R4, R4 ;
        /*00a0*/                   BRA `(.L_done) ;
.L_other:
        /*00b0*/                   FMUL R5, R5, 1.5 ;
        /*00c0*/                   MUFU.EX2 R4, R5 ;
        /*00d0*/                   FADD R4, R4, R4 ;
.L_done:
        /*00e0*/               @P1 BRA `(.L_tile) ;
.L_rest:
        /*00f0*/                   LDG.E.U16 R4, [R2.64] ;
        /*0100*/               @P1 BRA `(.L_rest) ;
        /*0110*/               @P4 BRA `(.L_quick) ;
        /*0120*/                   MOV R1, R2 ;
        /*0130*/                   CALL.REL.NOINC `(.L_slow) ;
.L_quick:
        /*0140*/               @P5 BRA `(.L_end) ;
        /*0150*/                   STG.E [R2.64], R4 ;
        /*0160*/                   STG.E [R2.64+0x4], R5 ;
.L_end:
        /*0170*/                   EXIT ;
.L_slow:
        /*0180*/                   RET.REL.NODEC R1 ;
"""


def test_the_count_of_a_listing() -> None:
    (code,) = sass.parse(LISTING).values()
    chosen = Configuration(warps=1, lanes=32, vector=1, unroll=2, parts=2)
    # two slices of 296: four tiles of 64 entries, and two passes over the rest
    assert trips(592, chosen) == (4, 2, 9.25)
    # around the loops: LDC, the wait twice, the branch past the tiles, two branches, EXIT; for one
    # program in two, two stores
    around, tile, rest = 7 + 2 / 2, 8, 2
    found = count(code, 592, chosen, 1)
    assert found.instructions * 9.25 == pytest.approx(around + 4 * tile + 2 * rest)
    assert found.around * 9.25 == pytest.approx(around)
    assert found.special * 9.25 == pytest.approx(4 * 1)
    found = count(code, 592, chosen, 1, two=False)
    assert found.instructions * 9.25 == pytest.approx(around + 4 * (tile + 1) + 2 * rest)
    assert found.special * 9.25 == pytest.approx(4 * 2)
    with pytest.raises(LookupError, match="two loops for each of 2 passes"):
        count(code, 592, chosen, 2)


@pytest.mark.parametrize("vocabulary", [32, 45, 4096, 32000, 128256, 151936, 50257])
def test_how_often_the_loops_run(vocabulary: int) -> None:
    """The same as the ranges of the kernel give."""
    chosen = configuration(vocabulary, torch.bfloat16, torch.bfloat16)
    block = chosen.lanes * chosen.vector
    length = vocabulary
    if chosen.parts > 1:
        step = 8 * chosen.vector
        length = (vocabulary + chosen.parts * step - 1) // (chosen.parts * step) * step
    tiles = rest = 0
    for begin in range(0, chosen.parts * length, length):
        end = min(begin + length, vocabulary)
        whole = begin + max(0, end - begin) // (block * chosen.unroll) * (block * chosen.unroll)
        tiles += len(range(begin, whole, block * chosen.unroll))
        rest += len(range(whole, end, block))
    found = trips(vocabulary, chosen)
    assert (found[0] * chosen.parts, found[1] * chosen.parts) == (tiles, rest)
    assert found[2] * chosen.lanes * chosen.parts == pytest.approx(vocabulary)


# at the speed of an H200's memory there is time for 46.7; around the loops 7 to 11
@pytest.mark.parametrize("vocabulary", [128256, 151936])
@pytest.mark.parametrize(
    ("divergence", "most"), [("forward_kl", 36), ("reverse_kl", 38), ("tvd", 60), ("jsd", 110)]
)
def test_the_goals(divergence: str, most: float, vocabulary: int) -> None:
    chosen = configuration(vocabulary, torch.bfloat16, torch.bfloat16)
    passes = 2 + has_two_passes(divergence)
    cubin = compile_rows(Variant(divergence=divergence, vocabulary=vocabulary), 90).cubin
    found = executed(cubin, vocabulary, chosen, passes)
    assert most / 2 < found.instructions <= most
    assert 5 < found.around < 12
