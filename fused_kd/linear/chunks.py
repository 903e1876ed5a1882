"""The chunk driver: logits of some rows, the row kernel over them, the products with the gradient.

Of either model's logits no more than one chunk exists: float32 in buffers that every chunk uses
again, the gradient written over the student's. The weight gradient is accumulated over the chunks,
the first of which is written, not added.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..options import KDOptions
from .memory import Sizes, chunk_rows
from .products import Products, Side, products_for


class Problem(NamedTuple):
    """N rows of both models, and what is asked about them."""

    student: Side
    teacher: Side | None
    teacher_logits: Tensor | None  # (..., V); None as well if no term reads the teacher
    labels: Tensor | None  # (N,)
    w_hard: Tensor | None  # (N,); None: the term is off, 0: off for that row
    w_soft: Tensor | None  # (N,)
    options: KDOptions
    backend: Backend
    wide: torch.dtype  # of logits and losses
    chunk_rows: int | None
    memory_budget: int | None
    kept_rows: int | None  # at most so many rows have a weight; None: ask the device, or mask


class Gradients(NamedTuple):
    """By the student's hidden (..., H), weight (V, H) and bias (V,); None: not wanted.

    The first in its own dtype, the others in that of the accumulation.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def run_chunks(problem: Problem, gradients: Gradients | None) -> tuple[Tensor, Tensor]:
    """hard (N,) and soft (N,), unweighted, 0 for rows without weight; fills the gradients.

    Args:
        problem: what to compute.
        gradients: to be written, whatever is in them.
    """
    rows = _Rows(problem)
    hidden, wide = problem.student.hidden, problem.wide
    hard, soft = (hidden.new_zeros(rows.all, dtype=wide) for _ in range(2))
    _clear(gradients, rows)
    products = products_for(hidden.device, wide)
    height = chunk_rows(
        rows.count,
        problem.chunk_rows,
        problem.memory_budget,
        hidden.device,
        sizes_of(
            problem.student,
            problem.teacher,
            problem.teacher_logits,
            wide,
            gathered=rows.index is not None or rows.mask is not None,
        ),
        products.fixed_bytes(),
    )
    chunk = _Chunk(problem, products, min(height, rows.count))
    for begin in range(0, rows.count, height):
        here = rows.at(begin, min(begin + height, rows.count))
        states = take(hidden, here)
        if rows.mask is not None:  # 0 times what is not a number would spoil the weight gradient
            states = torch.where(rows.mask[here, None], states, 0)
        hard[here], soft[here] = chunk.losses(here, states, gradients is not None)
        if gradients is not None:
            chunk.multiply(here, states, gradients, add=begin > 0)
    return hard, soft


def sizes_of(
    student: Side,
    teacher: Side | None,
    teacher_logits: Tensor | None,
    wide: torch.dtype,
    gathered: bool,
) -> Sizes:
    """What the height of a chunk depends on; `gathered`: rows are copied together in any case."""
    products = products_for(student.hidden.device, wide)
    given = teacher_logits if teacher is None else teacher.hidden
    dtypes = {student.hidden.dtype, student.compute}
    if teacher is not None:
        dtypes |= {teacher.hidden.dtype, teacher.compute}
    return Sizes(
        vocabulary=student.weight.shape[0],
        student_hidden=student.weight.shape[1],
        teacher_hidden=None if teacher is None else teacher.weight.shape[1],
        wide_bytes=wide.itemsize,
        student_bytes=student.hidden.dtype.itemsize,
        teacher_bytes=0 if given is None else given.dtype.itemsize,
        gathered=gathered or any(_lies_apart(x) for x in (student.hidden, given) if x is not None),
        converted=dtypes != {wide},
        # with a teacher's head the copy lies over its logits
        operand_bytes=0 if teacher else products.operand_bytes(student.compute),
    )


class _Rows:
    """Which rows are visited: all of them, or those of an index."""

    def __init__(self, problem: Problem) -> None:
        self.all = self.count = problem.student.hidden.shape[:-1].numel()
        self.index: Tensor | None = None
        self.mask: Tensor | None = None  # of the rows that have a weight, where others are visited
        weights = [w for w in (problem.w_hard, problem.w_soft) if w is not None]
        if not weights:
            self.count = 0
            return
        has_weight = (torch.stack(weights) != 0).any(0)
        if _host_knows(has_weight):
            if not bool(has_weight.all()):
                self.index = has_weight.nonzero().squeeze(1)
        else:
            self.mask = has_weight
            if problem.kept_rows is not None:
                self.index = torch.argsort((~has_weight).byte(), stable=True)[: problem.kept_rows]
        if self.index is not None:
            self.count = self.index.shape[0]

    def at(self, begin: int, end: int) -> slice | Tensor:
        """Which rows these of the visited ones are."""
        return slice(begin, end) if self.index is None else self.index[begin:end]


def _host_knows(x: Tensor) -> bool:
    """Whether values can be asked for without waiting for a device."""
    return x.device.type == "cpu"


class _Chunk:
    """Buffers that every chunk uses again, and what is done with one chunk."""

    def __init__(self, problem: Problem, products: Products, height: int) -> None:
        self.problem, self.products = problem, products
        shape = (height, problem.student.weight.shape[0])
        self.student = problem.student.hidden.new_empty(shape, dtype=problem.wide)
        has_pair = problem.teacher is not None
        self.teacher = self.student.new_empty(shape) if has_pair else None

    def losses(
        self, rows: slice | Tensor, hidden: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """hard and soft of these rows; the gradient lies over the student's logits after it."""
        problem = self.problem
        s = self.student[: hidden.shape[0]]
        self.products.logits(s, hidden, problem.student)
        t = self._teacher_logits(rows, s)
        vectors = (problem.labels, problem.w_hard, problem.w_soft)
        labels, w_hard, w_soft = (None if x is None else x[rows] for x in vectors)
        arguments = (s[None], t[None], labels, w_hard, w_soft, problem.options)
        if with_gradient:
            return problem.backend.forward_backward(*arguments, inplace=True)[:2]
        return problem.backend.forward(*arguments)[:2]

    def multiply(
        self, rows: slice | Tensor, hidden: Tensor, gradients: Gradients, add: bool
    ) -> None:
        """The chunk's part of each wanted gradient."""
        side, count = self.problem.student, hidden.shape[0]
        gradient = self.student[:count]
        if gradients.bias is not None:
            part = gradient.sum(0)
            gradients.bias.copy_(gradients.bias + part if add else part)
        operand = self.products.operand(gradient, self.teacher, side.compute)
        if gradients.hidden is not None:
            self._hidden_gradient(gradients.hidden, rows, operand)
        if gradients.weight is not None:
            self.products.weight_gradient(gradients.weight, operand, hidden, side.compute, add)

    def _hidden_gradient(self, out: Tensor, rows: slice | Tensor, gradient: Tensor) -> None:
        side, target = self.problem.student, out.view(-1, out.shape[-1])
        if isinstance(rows, slice) and target.dtype == self.student.dtype:
            self.products.hidden_gradient(target[rows], gradient, side)
            return
        part = self.student.new_empty((gradient.shape[0], target.shape[1]))
        self.products.hidden_gradient(part, gradient, side)
        target[rows] = part.to(target.dtype)

    def _teacher_logits(self, rows: slice | Tensor, s: Tensor) -> Tensor:
        problem = self.problem
        if problem.teacher is None:
            return s if problem.teacher_logits is None else take(problem.teacher_logits, rows)
        assert self.teacher is not None
        hidden = take(problem.teacher.hidden, rows)
        t = self.teacher[: hidden.shape[0]]
        self.products.logits(t, hidden, problem.teacher)
        return t


def take(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Return these rows of x (..., K) as (C, K), last stride 1: a view where possible, else a copy.

    Only arithmetic with Python numbers: a tensor made of them would be copied to the device, for
    which the host waits, and which a CUDA graph refuses.
    """
    folded = _folded(x)
    if folded is not None:
        here = folded[rows]
        return here if here.stride(-1) == 1 else here.contiguous()
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    index: list[Tensor] = []
    for size in reversed(x.shape[1:-1]):
        index.append(rows % size)
        rows = rows // size
    return x[(rows, *reversed(index))].contiguous()


def _folded(x: Tensor) -> Tensor | None:
    """Return x (..., K) as a view (N, K), None if the leading dimensions do not fold."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


def _lies_apart(x: Tensor) -> bool:
    """Return whether `take` copies rows of x even if they follow each other."""
    folded = _folded(x)
    return folded is None or folded.stride(-1) != 1


def _clear(gradients: Gradients | None, rows: _Rows) -> None:
    """Zeros where no chunk will write."""
    if gradients is None:
        return
    if gradients.hidden is not None and rows.index is not None:
        gradients.hidden.zero_()
    if rows.count == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
