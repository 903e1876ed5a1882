"""What the functions of the Triton kernels pass to each other, in groups.

Triton takes a tuple apart before it compiles: a group costs nothing, whichever of its fields a
function reads. Fields in capitals are known to the compiler, and so is `rule`. A group that holds
such a field is passed on or made in a call's arguments, never assigned to a name: Triton would make
values of the fields.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from .rules import Rule

# --------------------------------------------------------------------------- known to the compiler


class Terms(NamedTuple):
    """Which terms a kernel computes."""

    rule: Rule  # of the soft term
    HAS_HARD: bool
    SMOOTHING: bool
    STANDS_IN: bool  # t is the student's logits in a row whose soft term is off


class Layout(NamedTuple):
    """How a program reads its slice."""

    LANES: int
    VECTOR: int
    UNROLL: int
    CUDA: int  # the compute capability, times ten, of an NVIDIA GPU; else 0


class Launch(NamedTuple):
    """What a launch does, and with how many programs."""

    STEP: int
    WAIT: bool  # programs of a row wait for each other
    PARTS: int
    RING: int  # WAIT: rows whose parts' sums are kept, a power of two


# ---------------------------------------------------------------------------- of the whole problem


class Numbers(NamedTuple):
    """Scalars, float32."""

    k: tl.tensor  # log2(e)/power
    power: tl.tensor  # of the softened exponential in the hard term: T, or 1
    temperature: tl.tensor
    beta: tl.tensor
    soft_factor: tl.tensor  # c(T)
    soft_slope: tl.tensor  # c(T)/T
    smoothing: tl.tensor


class Pointers(NamedTuple):
    """Memory of all rows; None for what is absent."""

    s: tl.tensor
    t: tl.tensor
    g: tl.tensor
    labels: tl.tensor
    w_hard: tl.tensor
    w_soft: tl.tensor
    hard: tl.tensor
    soft: tl.tensor
    stats: tl.tensor
    partial: tl.tensor
    counters: tl.tensor


class Shape(NamedTuple):
    """Row n begins at (n // S)·stride_b + (n % S)·stride_s."""

    S: tl.tensor
    V: tl.tensor
    s_stride_b: tl.tensor
    s_stride_s: tl.tensor
    t_stride_b: tl.tensor
    t_stride_s: tl.tensor
    g_stride_b: tl.tensor
    g_stride_s: tl.tensor


# ------------------------------------------------------------------------------------- of one row


class Row(NamedTuple):
    """A row's number and memory."""

    n: tl.tensor
    s: tl.tensor
    t: tl.tensor
    g: tl.tensor  # None: not wanted
    label: tl.tensor
    hard: tl.tensor  # of all rows: n is added when needed, registers are scarce
    soft: tl.tensor
    stats: tl.tensor


class Part(NamedTuple):
    """One program's slice of the row."""

    index: tl.tensor
    begin: tl.tensor
    end: tl.tensor
    entries: tl.tensor  # (LANES, VECTOR): positions in a block
    partials: tl.tensor  # where the sums of the row's parts are stored
    arrived: tl.tensor  # WAIT: programs that have arrived, then those that have finished


class Weights(NamedTuple):
    """Of the row's terms in the gradient; 0: the term is off in this row."""

    hard: tl.tensor
    soft: tl.tensor


class Tile(NamedTuple):
    """UNROLL sub-blocks (LANES, VECTOR) of both sides, as loaded."""

    s: tuple
    t: tuple
