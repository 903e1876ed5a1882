"""How many rows a chunk has: what a row of a chunk needs, and what the caller's budget allows."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..options import MIB

#: Bytes of the automatic budget on a CPU.
CPU_BUDGET = 256 * MIB
#: The automatic budget is never below what this many rows need: fewer would read and write the
#: weight gradient so often that it takes a good part of the time.
FEWEST_ROWS = 64
#: Rows of an automatic chunk on a GPU; below about 1070 the weight gradient's traffic dominates
#: (calculated).
GPU_ROWS = 2048
#: ... and the share of the GPU's memory that they may take.
GPU_SHARE = 16
#: Labels, weights, losses and statistics of a row.
SMALL_PER_ROW = 128


class Sizes(NamedTuple):
    """What the memory of a chunk depends on; ``*_bytes`` are bytes of an element."""

    vocabulary: int
    student_hidden: int
    teacher_hidden: int | None = None  # None: the teacher's logits are given
    wide_bytes: int = 4  # of the arithmetic
    student_bytes: int = 4  # of the student's hidden states
    teacher_bytes: int = 4  # of the teacher's hidden states, or logits
    gathered: bool = True  # rows are copied together: some are ignored, or lie apart
    converted: bool = False  # hidden states are not multiplied in the arithmetic's dtype
    gradient_bytes: int = 0  # of the gradient of the logits, 0: written over logits


def row_bytes(sizes: Sizes) -> int:
    """What one row of a chunk needs: logits of both models, gathered inputs, converted ones."""
    wide, vocabulary, hidden = sizes.wide_bytes, sizes.vocabulary, sizes.student_hidden
    total = SMALL_PER_ROW + wide * vocabulary
    # one product at a time: operands wide and as they were
    copies = wide * hidden if sizes.gathered else 0
    if sizes.converted:
        copies = (wide + sizes.student_bytes) * hidden
    if sizes.teacher_hidden is not None:
        total += wide * vocabulary
        if sizes.converted:
            copies = max(copies, (wide + sizes.teacher_bytes) * sizes.teacher_hidden)
    if sizes.gathered:
        total += sizes.student_bytes * hidden
        if sizes.teacher_hidden is not None:
            total += sizes.teacher_bytes * sizes.teacher_hidden
    # the gradient is made when a copy of the teacher's logits is gone
    copied = sizes.gathered and sizes.teacher_hidden is None
    total += max(sizes.gradient_bytes, sizes.teacher_bytes if copied else 0) * vocabulary
    return total + copies


def budget_rows(budget: int, sizes: Sizes, fixed: int) -> int:
    """Rows that a budget in bytes allows, beside `fixed` bytes that any chunk needs.

    Raises:
        ValueError: none; says what one row needs.
    """
    rows = (budget - fixed) // row_bytes(sizes)
    if rows < 1:
        raise ValueError(
            f"memory_budget must hold at least one row, which needs {row_bytes(sizes) + fixed:,} "
            f"bytes for V = {sizes.vocabulary} (logits of {sizes.wide_bytes} bytes that are not "
            f"given, and {fixed:,} bytes for the products); got {budget:,}"
        )
    return rows


def automatic_rows(device: torch.device, sizes: Sizes, fixed: int) -> int:
    """Rows of a chunk where the caller does not say."""
    if device.type == "cpu":
        fits = (CPU_BUDGET - fixed) // row_bytes(sizes)
    else:
        memory = torch.get_device_module(device).get_device_properties(device).total_memory
        fits = min(GPU_ROWS, memory // GPU_SHARE // row_bytes(sizes))
    return max(FEWEST_ROWS, fits)


def chunk_rows(
    rows: int,
    asked: int | None,
    budget: int | None,
    device: torch.device,
    sizes: Sizes,
    fixed: int,
) -> int:
    """Rows of each chunk but the last: as many as allowed, in chunks of equal height.

    Args:
        rows: all that are kept.
        asked: by the caller; taken as it is.
        budget: in bytes; None: :func:`automatic_rows`.
        device: where the chunks live.
        sizes: of a row.
        fixed: bytes that the products need whatever the height.
    """
    if asked is not None:
        return asked
    if budget is None:
        most = automatic_rows(device, sizes, fixed)
    else:
        most = budget_rows(budget, sizes, fixed)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))
