"""The arguments of the Triton functions, in groups.

Triton takes a tuple apart before it compiles, so a group costs nothing, even if a function reads
few of its fields. Fields in capitals, and `rule`, are compile-time constants. A group with such a
field is built in a call's arguments or passed on, but never assigned to a name, because Triton
would then turn the constants into run-time values.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from .rules import Rule

# --------------------------------------------------------------------------- compile-time constants


class Terms(NamedTuple):
    """The terms of the loss that a kernel computes."""

    rule: Rule  # of the soft term
    HAS_HARD: bool
    SMOOTHING: bool
    STANDS_IN: bool  # in a row whose soft term is off, t are the student's logits
    classes: Terms | None  # those of the classes of a top-k teacher; `rule` is then that of TAIL


class Layout(NamedTuple):
    """How a program reads its slice: the fields of a Configuration, and the GPU."""

    LANES: int
    VECTOR: int
    UNROLL: int
    CUDA: int  # the compute capability, times ten, of an NVIDIA GPU; else 0


class Launch(NamedTuple):
    """What a launch computes, and the number of its programs."""

    STEP: int  # ALL, FIRST, SECOND, LAST or BACKWARD of kernels.py
    WAIT: bool  # programs of a row wait for each other
    PARTS: int  # programs per row
    RING: int  # if WAIT: number of rows whose parts' sums are stored, a power of two


# ---------------------------------------------------------------------------- of the whole problem


class Numbers(NamedTuple):
    """The scalar options of a launch, float32."""

    k: tl.tensor  # log2(e)/power
    power: tl.tensor  # the hard term's exponentials are those at T to this power: T, or 1
    temperature: tl.tensor
    beta: tl.tensor
    soft_factor: tl.tensor  # c(T)
    soft_slope: tl.tensor  # c(T)/T
    smoothing: tl.tensor


class Pointers(NamedTuple):
    """The tensors of all rows, see _kd_rows_kernel; None for one that is not passed."""

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
    token_ids: tl.tensor
    inside: tl.tensor
    marks: tl.tensor


class Shape(NamedTuple):
    """Sizes and strides: row n begins at (n // S)·stride_b + (n % S)·stride_s."""

    S: tl.tensor
    V: tl.tensor
    s_stride_b: tl.tensor
    s_stride_s: tl.tensor
    t_stride_b: tl.tensor
    t_stride_s: tl.tensor
    g_stride_b: tl.tensor
    g_stride_s: tl.tensor
    K: tl.tensor  # tokens in the support of a top-k teacher
    MARKS: tl.tensor  # words of a program's marks


# ------------------------------------------------------------------------------------- of one row


class Classes(NamedTuple):
    """The support of a row's top-k teacher, and the scratch memory of :mod:`.classes`."""

    token_ids: tl.tensor  # (K,): absent if it is not in [0, V)
    logits: tl.tensor  # (K+1,): the teacher's of the classes, float32
    inside: tl.tensor  # (K,): the student's logits of these tokens, float32
    marks: tl.tensor  # of the program's slice: a byte for each vector, a bit for each entry
    K: tl.tensor
    V: tl.tensor


class Row(NamedTuple):
    """The index of a row, and pointers to its data."""

    n: tl.tensor
    s: tl.tensor
    t: tl.tensor
    g: tl.tensor  # None: not wanted
    label: tl.tensor
    hard: tl.tensor  # of all rows: n is added when needed, to save registers
    soft: tl.tensor
    stats: tl.tensor
    classes: Classes | None


class Part(NamedTuple):
    """The slice of a row that one program processes."""

    index: tl.tensor
    begin: tl.tensor
    end: tl.tensor
    entries: tl.tensor  # (LANES, VECTOR): positions in a block
    partials: tl.tensor  # where the sums of the row's parts are stored
    arrived: tl.tensor  # if WAIT: counters of programs that have arrived, and have finished


class Weights(NamedTuple):
    """Weights of the row's terms in the gradient; 0: the term is off in this row."""

    hard: tl.tensor
    soft: tl.tensor


class Tile(NamedTuple):
    """UNROLL sub-blocks (LANES, VECTOR) of both sides, as loaded."""

    s: tuple
    t: tuple
