"""The count of what the Triton kernels execute: on a listing, against a simulation, the goals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from sass.listing import code_of

from benchmarks.triton_counts import count, executed, trips
from benchmarks.triton_resources import Variant
from fused_kd.backends.triton.configuration import Configuration, configuration

#: One pass: a loop over tiles (two loads, and three ways for the temperature) and one over the
#: rest; a program that waits; one that reports; a division's slow path.
LISTING = """LDC R1, c[0x0][0x28]; .L_wait:; LDG.E.STRONG.GPU R6, [R2.64]; @!P0 BRA `(.L_wait)
    @P1 BRA `(.L_rest)
    .L_tile:; LDG.E.128 R4, [R2.64]; LDG.E.128 R8, [R2.64+0x10]; MUFU.EX2 R4, R4
    @!P3 BRA `(.L_done); @P2 BRA `(.L_other); FMUL R4, R4, R4; BRA `(.L_done)
    .L_other:; FMUL R5, R5, 1.5; MUFU.EX2 R4, R5; FADD R4, R4, R4; .L_done:; @P1 BRA `(.L_tile)
    .L_rest:; LDG.E.U16 R4, [R2.64]; @P1 BRA `(.L_rest)
    @P4 BRA `(.L_quick); MOV R1, R2; CALL.REL.NOINC `(.L_slow)
    .L_quick:; @P5 BRA `(.L_end); STG.E [R2.64], R4; STG.E [R2.64+0x4], R5; .L_end:; EXIT
    .L_slow:; RET.REL.NODEC R1"""
CUT = Configuration(warps=1, lanes=32, vector=1, unroll=2, parts=2)
ALIGNED, UNALIGNED = (configuration(v, torch.bfloat16, torch.bfloat16) for v in (128256, 50257))


# around the loops: LDC, the wait twice, the branch past the tiles, two branches, EXIT; for one
# program in two, two stores. A tile's way at T = 2, and at another temperature
@pytest.mark.parametrize(("two", "tile", "exponentials"), [(True, 8, 1), (False, 9, 2)])
def test_the_count_of_a_listing(two: bool, tile: int, exponentials: int) -> None:
    counts = [9.25 * x for x in count(code_of(LISTING), 592, CUT, 1, two)]
    assert counts == pytest.approx([7 + 2 / 2 + 4 * tile + 2 * 2, 4 * exponentials])
    with pytest.raises(LookupError, match="two loops for each of 2 passes"):
        count(code_of(LISTING), 592, CUT, 2, two)


@pytest.mark.parametrize(
    ("vocabulary", "chosen", "expected"),
    [
        # two slices of 296: four tiles of 64 entries, and two passes over the rest
        (592, CUT, (4, 2, 9.25)),
        # seven slices of 16064 and one of 15808: three tiles of 4096, and two blocks of 2048
        (128256, ALIGNED, (3, 2, 128256 / 8 / 256)),
        # three slices of 12568 and one of 12553: three tiles of 4096, and two blocks of 256
        (50257, UNALIGNED, (3, 2, 50257 / 4 / 256)),
    ],
)
def test_how_often_the_loops_run(
    vocabulary: int, chosen: Configuration, expected: tuple[float, ...]
) -> None:
    assert trips(vocabulary, chosen) == expected


# instructions per element; at the speed of an H200's memory there is time for 46.7
@pytest.mark.parametrize("vocabulary", [128256, 151936])
@pytest.mark.parametrize(
    ("divergence", "most"), [("forward_kl", 36), ("reverse_kl", 38), ("tvd", 60), ("jsd", 100)]
)
def test_the_goals(divergence: str, most: float, vocabulary: int, tmp_path: Path) -> None:
    total, *_ = executed(Variant(divergence=divergence, vocabulary=vocabulary), tmp_path)
    assert most / 2 < total <= most


def test_the_goal_of_a_top_k_teacher(tmp_path: Path) -> None:
    # two thirds of the bytes, and of the time for instructions
    total, *_ = executed(Variant(k=64), tmp_path)
    assert 31 / 2 < total <= 31


def test_the_goal_of_measuring(tmp_path: Path) -> None:
    # without the forward: two reads of the bytes, of which three give time for 46.7
    total, *_ = executed(Variant("measure"), tmp_path)
    assert 31 / 2 < total <= 31
