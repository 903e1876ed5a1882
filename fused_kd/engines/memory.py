"""How many rows a chunk has, from the bytes of a row and the caller's budget; and what is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..options import MIB

#: Bytes of the automatic budget on a CPU.
CPU_BUDGET = 256 * MIB
#: An automatic chunk has at least this many rows: with fewer, reading and writing the weight
#: gradient takes a large share of the time.
FEWEST_ROWS = 64
#: Rows of an automatic chunk on a GPU; below about 1070 the weight gradient's traffic dominates
#: (calculated).
GPU_ROWS = 2048
#: ... and the share of the GPU's memory that they may take.
GPU_SHARE = 16
#: Bytes of a row's labels, weights, losses and statistics.
SMALL_PER_ROW = 128


class Sizes(NamedTuple):
    """The sizes that decide the memory of a chunk; ``*_bytes`` are bytes of an element."""

    vocabulary: int
    student_hidden: int | None  # None: the student's logits are given
    teacher_hidden: int | None = None  # None: the teacher's logits are given, or no teacher
    accum_bytes: int = 4  # of the arithmetic
    student_bytes: int = 4  # of the student's hidden states, or logits
    teacher_bytes: int = 4  # of the teacher's hidden states, or logits; 0 without a teacher
    gathered: bool = True  # rows are copied together: some are ignored, or are scattered
    converted: bool = False  # hidden states are not multiplied in the arithmetic's dtype
    gradient_bytes: int = 0  # of the gradient of the logits; 0: it needs no memory of its own
    classes: int = 0  # of a TopK teacher


def row_bytes(sizes: Sizes) -> int:
    """Return the bytes of one row of a chunk: logits, gathered inputs, converted inputs.

    At least one side must be a head, that is have a hidden size.
    """
    accum, vocabulary = sizes.accum_bytes, sizes.vocabulary
    heads = [
        (hidden, element)
        for hidden, element in (
            (sizes.student_hidden, sizes.student_bytes),
            (sizes.teacher_hidden, sizes.teacher_bytes),
        )
        if hidden is not None
    ]
    total = SMALL_PER_ROW + len(heads) * accum * vocabulary + (accum + 4) * sizes.classes
    # one product at a time: operands in the arithmetic's dtype and in their own
    copies = 0
    if sizes.converted:
        copies = max((accum + element) * hidden for hidden, element in heads)
    elif sizes.gathered and sizes.student_hidden is not None:
        copies = accum * sizes.student_hidden
    if sizes.gathered:
        total += sum(element * hidden for hidden, element in heads)
    # the larger of the two: a gradient is allocated after a copy of the teacher's logits was freed
    total += max(sizes.gradient_bytes, _copied_bytes(sizes)) * vocabulary
    return total + copies


def _copied_bytes(sizes: Sizes) -> int:
    """Return the bytes of an element of given logits if a chunk's are copied; 0 if not."""
    if sizes.gathered and sizes.student_hidden is None:
        return sizes.student_bytes
    return sizes.teacher_bytes if sizes.gathered and sizes.teacher_hidden is None else 0


def budget_rows(budget: int, sizes: Sizes, fixed: int) -> int:
    """Return the rows that a budget in bytes allows, after `fixed` bytes that any chunk needs.

    Raises:
        ValueError: Not even one row fits; the message states how many bytes one row needs.
    """
    rows = (budget - fixed) // row_bytes(sizes)
    if rows < 1:
        raise ValueError(
            f"memory_budget must hold at least one row, which needs {row_bytes(sizes) + fixed:,} "
            f"bytes for V = {sizes.vocabulary} ({fixed:,} of them for the matrix products); got "
            f"{budget:,}: pass at least that, or None"
        )
    return rows


def automatic_rows(device: torch.device, sizes: Sizes, fixed: int) -> int:
    """Return the rows of a chunk without chunk_rows and memory_budget, at least FEWEST_ROWS.

    `fixed` is as in :func:`chunk_rows`, and ignored on a GPU. For a device that this machine lacks,
    torch raises RuntimeError, AssertionError or AttributeError.
    """
    if device.type == "cpu":
        fits = (CPU_BUDGET - fixed) // row_bytes(sizes)
    else:
        memory = torch.get_device_module(device).get_device_properties(device).total_memory
        fits = min(GPU_ROWS, memory // GPU_SHARE // row_bytes(sizes))
    return max(FEWEST_ROWS, fits)


def chunk_rows(
    rows: int,
    requested: int | None,
    budget: int | None,
    device: torch.device,
    sizes: Sizes,
    fixed: int,
) -> int:
    """Return the rows of each chunk but the last: as many as allowed, in chunks of equal height.

    At least 1, also without rows.

    Args:
        rows: the number of rows to compute.
        requested: the caller's chunk_rows, returned unchanged; None: not set.
        budget: the caller's memory_budget in bytes; None: :func:`automatic_rows`.
        device: the device of the tensors.
        sizes: the sizes of a row.
        fixed: bytes that the products need for any number of rows.

    Raises:
        ValueError: The budget does not hold one row.
    """
    if requested is not None:
        return requested
    if budget is None:
        limit = automatic_rows(device, sizes, fixed)
    else:
        limit = budget_rows(budget, sizes, fixed)
    return _equal(rows, limit)


def summing_bytes(sizes: Sizes, height: int, sum_bytes: int, weight_bytes: int) -> int:
    """Return the most bytes at once if the weight gradient is summed over chunks.

    Inputs and the hidden gradient are not counted.

    Args:
        sizes: the sizes of a row.
        height: the rows of a chunk.
        sum_bytes: of an element of the sum.
        weight_bytes: of an element of the weight. If it differs, the sum is rounded at the end.
    """
    elements = sizes.vocabulary * (sizes.student_hidden or 0)
    other = height * sizes.vocabulary * max(sizes.gradient_bytes, _copied_bytes(sizes))
    chunk = sum(_buffers(sizes, height)) + other
    rounded = elements * weight_bytes if weight_bytes != sum_bytes else 0
    return elements * sum_bytes + max(chunk, rounded)


def keeping_bytes(
    sizes: Sizes, rows: int, height: int, kept_bytes: int, gradient_bytes: int
) -> int:
    """Return the most bytes at once if the gradients of all rows' logits are kept to the end.

    The weight gradient is written last; until then its memory holds what it can of a chunk's
    logits. Inputs and the hidden gradient are not counted.

    Args:
        sizes: the sizes of a row.
        rows: the number of rows, whether they count or not.
        height: the rows of a chunk.
        kept_bytes: of an element of the gradients of the logits.
        gradient_bytes: of an element of the weight gradient.
    """
    hidden = sizes.student_hidden or 0
    row = sizes.vocabulary * kept_bytes + (hidden * sizes.student_bytes if sizes.gathered else 0)
    logits = sum(_buffers(sizes, height)) - in_gradient_bytes(sizes, height, gradient_bytes)
    logits += height * sizes.vocabulary * _copied_bytes(sizes)
    return sizes.vocabulary * hidden * gradient_bytes + rows * row + logits


def in_gradient_bytes(sizes: Sizes, height: int, gradient_bytes: int) -> int:
    """Return the bytes of a chunk's logits for which the memory of the weight gradient has space.

    The arguments are those of :func:`keeping_bytes`.
    """
    space = sizes.vocabulary * (sizes.student_hidden or 0) * gradient_bytes
    used = 0
    for size in _buffers(sizes, height):
        used += size if used + size <= space else 0
    return used


def rows_in_gradient(sizes: Sizes, rows: int, height: int, gradient_bytes: int) -> int:
    """Return the rows of a chunk if the weight gradient's memory may hold their logits.

    At least `height`; chunks of equal height, which take no more memory beside the weight gradient
    than one of `height` rows with its logits.

    Args:
        sizes: the sizes of a row.
        rows: the number of rows that are computed.
        height: the rows that the budget allows.
        gradient_bytes: of an element of the weight gradient.
    """
    logits = sum(_buffers(sizes, 1))
    fit = sizes.vocabulary * (sizes.student_hidden or 0) * gradient_bytes // logits
    affordable = height * row_bytes(sizes) // (row_bytes(sizes) - logits)
    return _equal(rows, max(height, min(fit, affordable)))


def _equal(rows: int, limit: int) -> int:
    """Return the height of the fewest chunks of about equal height, at most `limit` rows each."""
    chunks = max(1, -(-rows // limit))
    return max(1, -(-rows // chunks))


def _buffers(sizes: Sizes, height: int) -> list[int]:
    """Return the bytes of a chunk's logits, for each head."""
    heads = [h for h in (sizes.student_hidden, sizes.teacher_hidden) if h is not None]
    return [height * sizes.vocabulary * sizes.accum_bytes] * len(heads)


class Cut(NamedTuple):
    """How rows are cut into chunks."""

    height: int  # rows of each chunk but the last
    is_single: bool  # one chunk would hold all rows, even if each had to be copied


def cut_rows(
    rows: int,
    computed: int,
    requested: int | None,
    budget: int | None,
    device: torch.device,
    sizes: Sizes,
    fixed: int,
) -> Cut:
    """Return how the rows that are computed, `computed` of `rows`, are cut into chunks.

    The other arguments, and the errors, are those of :func:`chunk_rows`.
    """
    # first, so that the message for a budget below one row states what suffices for any labels
    limit = chunk_rows(rows, requested, budget, device, sizes._replace(gathered=True), fixed)
    height = chunk_rows(computed, requested, budget, device, sizes, fixed)
    return Cut(height, rows <= limit)
