"""How the Triton kernels cut a row: computed from V, the dtypes and the kind of GPU, not searched.

The bits of a row's results depend on the row and its configuration: not on N, and not on the other
rows. They depend on the row's address only if V is a multiple of 16 and the address is not a
multiple of 16 bytes.
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
    """The way a row is cut, on which the bits of its results depend."""

    warps: int  # of a program
    lanes: int  # threads of a program, each with its own sums
    vector: int  # neighbouring entries that a lane loads at once
    unroll: int  # loads of a lane per side that are in flight together
    parts: int  # programs per row


@dataclass(frozen=True)
class Kind:
    """A kind of GPU: the properties on which configurations and register limits depend."""

    warp_size: int
    threads: int  # of a program; fewer if a row is shorter than a tile
    registers: int | None = None  # limit for a thread; None: the compiler's choice


#: Three programs of 256 threads with 80 registers share the 65536 of an SM, and no kernel spills.
#: Without a limit, ptxas spills some kernels at 64 and gives others 118. For compute capability 10
#: it spills scalars at 80, so the limit is 96, with programs of 128 threads, of which five fit.
NVIDIA = Kind(32, 256, 80)
BLACKWELL = Kind(32, 128, 96)
AMD = Kind(64, 256)
OTHER = Kind(32, 256)
#: Kernels that would spill get more registers, and two programs of 256 threads share an SM.
#: MORE_REGISTERS in addition: rows that vectors cannot read, and divergences with a logarithm of
#: every entry (jsd, bound by arithmetic anyway). MOST_REGISTERS: label smoothing, with two more
#: sums and a test of every entry, and tiles of vectors whose entries are loaded one by one.
MORE_REGISTERS, MOST_REGISTERS = 16, 128

#: Entries of a lane per tile: 16 of each side take at most 32 registers. 32 would save 4 % of the
#: instructions, but take 128 registers, so that two programs share an SM instead of three.
ENTRIES = 16
#: Bytes of a slice, both sides together. Three programs on each of an H100's 132 SMs then use 32 MB
#: of its 50 MB of L2, from which the later passes over a row read: 8 parts for a bfloat16 row of
#: 128256 or 151936, 16 for 262144, 1 up to 20480. The environment variable FUSED_KD_SLICE_BYTES
#: overrides it for experiments; the bits of the results then change.
SLICE_BYTES = 80 * 1024
#: Limit of the programs per row; a GPU with this number of multiprocessors can run them at once.
MAX_PARTS = 32
#: Limit of V: positions in a row are 32 bits wide.
LONGEST = 2**30

#: The fields that :func:`overridden` sets at present.
_override: dict[str, int] = {}


def configuration(
    vocabulary: int, student: torch.dtype, teacher: torch.dtype | None, kind: Kind = NVIDIA
) -> Configuration:
    """Return the configuration for rows of `vocabulary` entries of these dtypes.

    teacher: None if the passes over a row do not read it, since it is a TopK.

    Raises:
        ValueError: FUSED_KD_SLICE_BYTES, which is read once per process, is not a positive number.
    """
    # Triton loads vectors only if the rows' stride is known to be a multiple of 16 entries; else
    # a thread loads one entry, so that the threads of a warp read neighbours.
    sizes = [x.itemsize for x in (student, teacher) if x is not None]
    vector = 16 // max(sizes) if vocabulary % 16 == 0 else 1
    warps = kind.threads // kind.warp_size
    while warps > 1 and warps * kind.warp_size * ENTRIES > vocabulary:
        warps //= 2
    size = vocabulary * sum(sizes)
    parts = 1
    while parts * _slice_bytes() < size and parts < MAX_PARTS:
        parts *= 2
    chosen = Configuration(warps, warps * kind.warp_size, vector, ENTRIES // vector, parts)
    return replace(chosen, **{k: v for k, v in _override.items() if k != "wait"})


@cache
def _slice_bytes() -> int:
    value = os.environ.get("FUSED_KD_SLICE_BYTES", str(SLICE_BYTES))
    if not value.isdecimal() or int(value) == 0:
        raise ValueError(f"FUSED_KD_SLICE_BYTES must be a positive number of bytes; got {value!r}")
    return int(value)


def registers(
    kind: Kind, vector: int, logarithms: bool, smoothing: bool, aligned: bool
) -> int | None:
    """Return the limit of registers of a thread of `_kd_rows_kernel`; None: the compiler's choice.

    Args:
        kind: the kind of GPU.
        vector: entries of a lane that are loaded at once.
        logarithms: the divergence takes a logarithm of every entry.
        smoothing: labels are smoothed.
        aligned: every row begins at a multiple of 16 bytes.
    """
    if kind.registers is None:
        return None
    if smoothing or (vector > 1 and not aligned):
        return MOST_REGISTERS
    return kind.registers + (MORE_REGISTERS if vector == 1 or logarithms else 0)


def candidates(rule: Configuration) -> list[Configuration]:
    """Return the configurations that are timed with FUSED_KD_AUTOTUNE=1.

    These are `rule`, half of its threads, half of its UNROLL, and both, as far as these exist; the
    parts never change.
    """
    warp_size = rule.lanes // rule.warps
    return [
        replace(rule, warps=warps, lanes=warps * warp_size, unroll=unroll)
        for warps in dict.fromkeys((rule.warps, max(1, rule.warps // 2)))
        for unroll in dict.fromkeys((rule.unroll, max(1, rule.unroll // 2)))
    ]


def may_wait() -> bool:
    """Return True if programs may wait for each other: always, except in ``overridden(wait=0)``."""
    return bool(_override.get("wait", 1))


@contextmanager
def overridden(**fields: int) -> Iterator[None]:
    """Set fields of every Configuration inside a ``with`` block, for tests.

    wait=0: programs never wait for each other, since every step is a launch. The fields are set for
    all threads; an unknown one makes :func:`configuration` raise TypeError.
    """
    before = dict(_override)
    _override.update(fields)
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
