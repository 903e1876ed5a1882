"""How the Triton kernels cut a row: a rule by V, the dtypes and the kind of GPU, not a search.

The bits of a row depend on its configuration and on nothing else but the row: not on N, not on the
other rows, and on its place in memory only if V is a multiple of 16 and its address isn't one
of 16 bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Configuration:
    """How a row is cut: everything that its bits depend on besides its entries."""

    warps: int
    lanes: int  # threads, each with its own sums
    vector: int  # neighbouring entries of a lane, one load
    unroll: int  # loads of a lane per side that are in flight together
    parts: int  # programs per row


@dataclass(frozen=True)
class Kind:
    """A kind of GPU."""

    warp_size: int
    threads: int  # of a program, fewer where a row is shorter than a tile
    registers: int | None = None  # of a thread, at most; None: the compiler's choice


#: Three programs of 256 threads with 80 registers share the 65536 of an SM, and no kernel spills.
#: Left alone, ptxas spills some at 64 and gives others 118. For compute capability 10 it spills
#: scalars at 80: 96, and programs of 128 threads, of which five fit.
NVIDIA = Kind(32, 256, 80)
BLACKWELL = Kind(32, 128, 96)
AMD = Kind(64, 256)
OTHER = Kind(32, 256)
#: What spills at these takes more, and two programs of 256 threads share an SM: rows that vectors
#: cannot read, divergences with a logarithm of every entry (jsd, bound by arithmetic anyway); and
#: at the most, label smoothing, with two more sums and a test of every entry, and tiles of vectors
#: whose entries are loaded one by one.
MORE_REGISTERS, MOST_REGISTERS = 16, 128

#: Entries of a lane per tile: 16 of each side fill 32 registers at most. 32 would save 4 % of the
#: instructions and take 128 registers, which leaves two programs on an SM instead of three.
ENTRIES = 16
#: Bytes of a slice, both sides. Three programs on each of an H100's 132 SMs keep 32 MB of its 50 MB
#: of L2, so that the later passes over a row find it there: 8 parts for a bfloat16 row of 128256 or
#: 151936, 16 for 262144, 1 up to 20480. FUSED_KD_SLICE_BYTES in the environment overrides it, for
#: trials: other parts, other bits.
SLICE_BYTES = 80 * 1024
#: The multiprocessors that a GPU must have for a row's programs to wait for each other.
MAX_PARTS = 32
#: Positions in a row are 32 bits wide.
LONGEST = 2**30

_override: dict[str, int] = {}


def configuration(
    vocabulary: int, student: torch.dtype, teacher: torch.dtype, kind: Kind = NVIDIA
) -> Configuration:
    """Return the configuration of rows of `vocabulary` entries."""
    # Triton loads vectors only if the rows' stride is known to be a multiple of 16 entries; else
    # one entry, so that the threads of a warp read neighbours.
    widest = max(student.itemsize, teacher.itemsize)
    vector = 16 // widest if vocabulary % 16 == 0 else 1
    warps = kind.threads // kind.warp_size
    while warps > 1 and warps * kind.warp_size * ENTRIES > vocabulary:
        warps //= 2
    size = vocabulary * (student.itemsize + teacher.itemsize)
    parts = 1
    while parts * _slice_bytes() < size and parts < MAX_PARTS:
        parts *= 2
    chosen = Configuration(warps, warps * kind.warp_size, vector, ENTRIES // vector, parts)
    return replace(chosen, **{k: v for k, v in _override.items() if k != "wait"})


@cache
def _slice_bytes() -> int:
    given = os.environ.get("FUSED_KD_SLICE_BYTES", str(SLICE_BYTES))
    if not given.isdecimal() or int(given) == 0:
        raise ValueError(f"FUSED_KD_SLICE_BYTES must be a positive number of bytes; got {given!r}")
    return int(given)


def registers(
    kind: Kind, vector: int, logarithms: bool, smoothing: bool, aligned: bool
) -> int | None:
    """Return the most registers of a thread of `_kd_rows_kernel`; None: the compiler's choice.

    Args:
        kind: The kind of GPU.
        vector: Entries of a lane that are loaded at once.
        logarithms: The divergence takes a logarithm of every entry.
        smoothing: Labels are smoothed.
        aligned: Every row begins at a multiple of 16 bytes.
    """
    if kind.registers is None:
        return None
    if smoothing or (vector > 1 and not aligned):
        return MOST_REGISTERS
    return kind.registers + (MORE_REGISTERS if vector == 1 or logarithms else 0)


def candidates(rule: Configuration) -> list[Configuration]:
    """Return what FUSED_KD_AUTOTUNE=1 tries: half of the threads, half of the tile; never parts."""
    warp_size = rule.lanes // rule.warps
    return [
        replace(rule, warps=warps, lanes=warps * warp_size, unroll=unroll)
        for warps in dict.fromkeys((rule.warps, max(1, rule.warps // 2)))
        for unroll in dict.fromkeys((rule.unroll, max(1, rule.unroll // 2)))
    ]


def may_wait() -> bool:
    """Return False in ``overridden(wait=0)``."""
    return bool(_override.get("wait", 1))


@contextmanager
def overridden(**fields: int) -> Iterator[None]:
    """Set fields of every configuration, and wait=0 for one launch per step: for tests."""
    before = dict(_override)
    _override.update(fields)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
