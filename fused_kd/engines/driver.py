"""The chunk driver: it cuts the rows into chunks, and decides what is kept until the last of them.

The weight gradient of a student Head is summed over the chunks: the first chunk writes it, the
others add. If it takes no more memory, the gradients of all rows' logits are kept instead and
multiplied at once (:func:`_kept_dtype`); the memory of the weight gradient, which is then written
last, holds the chunks' logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..classes import Classes
from .chunks import chunk_of
from .gradients import Gradients, accumulator, new_gradients
from .memory import Cut, Sizes, cut_rows, keeping_bytes, rows_in_gradient, summing_bytes
from .problem import Problem
from .products import Products, Projection, products_for
from .selection import Selection, is_scattered


def run_chunks(
    problem: Problem, wanted: tuple[bool, ...] | None
) -> tuple[Tensor, Tensor, Gradients]:
    """Process all rows, chunk by chunk. Autograd and autocast must be off.

    Args:
        problem: the rows and the options.
        wanted: for each of the student's three tensors (hidden, weight, bias), whether its gradient
            is computed; None: losses only. That of logits always is.

    Returns:
        hard (N,) and soft (N,), unweighted, 0 for rows without a weight; and the gradients of
        Σ (w_hard·hard + w_soft·soft). With ``problem.inplace`` the student's logits are overwritten
        by theirs.

    Raises:
        ValueError: memory_budget does not hold one row.
    """
    x, dtype = problem.rows, problem.accum_dtype
    rows = Selection(x.shape[:-1].numel(), problem.w_hard, problem.w_soft, problem.kept_rows)
    products = products_for(problem.backend_name, x.device, dtype)
    sizes = sizes_of(problem, products, rows.gathers)
    cut = cut_rows(
        rows.all,
        rows.count,
        problem.chunk_rows,
        problem.memory_budget,
        x.device,
        sizes,
        products.fixed_bytes(),
    )
    hard, soft = (x.new_zeros(rows.all, dtype=dtype) for _ in range(2))
    height, kept, gradients = cut.height, None, None
    if wanted is not None:
        kept = _kept_dtype(problem, products, wanted, sizes, cut)
        gradients = new_gradients(problem, wanted, cut.is_single or kept is not None, rows)
        if kept is not None and gradients[1] is not None and problem.chunk_rows is None:
            height = rows_in_gradient(sizes, rows.count, height, gradients[1].itemsize)
    chunk = chunk_of(problem, products, min(height, rows.count), gradients, rows, kept)
    for begin in range(0, rows.count, height):
        part = slice(begin, min(begin + height, rows.count))
        hard[rows.at(part)], soft[rows.at(part)] = chunk.process(part)
    chunk.finish()
    return hard, soft, (None, None, None) if gradients is None else gradients


def sizes_of(problem: Problem, products: Products, gathered: bool) -> Sizes:
    """Return the sizes that decide how many rows a chunk has.

    Args:
        problem: the rows and the options.
        products: the matrix-product routines in use.
        gathered: every chunk copies its rows, because some rows are left out or masked.
    """
    student, teacher, dtype = problem.student, problem.teacher, problem.accum_dtype
    x = problem.rows
    t = teacher.hidden if isinstance(teacher, Projection) else teacher
    classes = 0
    if isinstance(t, Classes):
        classes, t = t.logits.shape[-1], None
    heads = [p for p in (student, teacher) if isinstance(p, Projection)]
    gradient_bytes = 0
    if isinstance(student, Projection):
        gradient_dtype = products.gradient_dtype(dtype, student.compute)
        # no memory of its own if it overwrites the student's logits, or those of a teacher's head
        if not isinstance(teacher, Projection) and gradient_dtype != dtype:
            gradient_bytes = gradient_dtype.itemsize
    return Sizes(
        vocabulary=student.weight.shape[0] if isinstance(student, Projection) else x.shape[-1],
        student_hidden=x.shape[-1] if isinstance(student, Projection) else None,
        teacher_hidden=teacher.weight.shape[1] if isinstance(teacher, Projection) else None,
        accum_bytes=dtype.itemsize,
        student_bytes=x.dtype.itemsize,
        teacher_bytes=0 if t is None else t.dtype.itemsize,
        classes=classes,
        gathered=gathered or any(is_scattered(y) for y in (x, t) if y is not None),
        converted=any({p.hidden.dtype, p.compute} != {dtype} for p in heads),
        gradient_bytes=gradient_bytes,
    )


def _kept_dtype(
    problem: Problem, products: Products, wanted: tuple[bool, ...], sizes: Sizes, cut: Cut
) -> torch.dtype | None:
    """Return the dtype in which the gradients of all rows' logits are kept; None: they are not.

    They are kept if that takes no more memory than a sum of the weight gradient over the chunks, or
    with a single chunk than its gradient.
    """
    student = problem.student
    if isinstance(student, Tensor) or not wanted[1]:
        return None
    weight, bias, rows = student.weight, student.bias, problem.rows.shape[:-1].numel()
    of_products = products.kept_dtype if _narrow(bias, wanted[2]) else products.gradient_dtype
    kept = of_products(problem.accum_dtype, student.compute)
    written = accumulator(problem, without_sum=True)
    total = written if cut.is_single else accumulator(problem, without_sum=False)
    summing = summing_bytes(sizes, min(cut.height, rows), total.itemsize, weight.itemsize)
    keeping = keeping_bytes(sizes, rows, min(cut.height, rows), kept.itemsize, written.itemsize)
    return kept if keeping <= summing else None


def _narrow(bias: Tensor | None, wanted: bool) -> bool:
    """Return True if the gradient of the bias has 16 bits or is not wanted."""
    return bias is None or not wanted or bias.itemsize == 2
