"""The chunk driver: logits of some rows, the row kernel over them, the products with the gradient.

Of either model's logits no more than one chunk exists: float32 in buffers that every chunk uses
again. The gradient is written over the student's logits, or, where the products take it in 16 bits,
over the teacher's (:func:`_doubling_parts`). The weight gradient is accumulated over the chunks,
the first of which is written, not added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..options import KDOptions
from .memory import Sizes, chunk_rows
from .products import Products, Side, products_for

#: Rows of a chunk over those of its first visit, where the gradient is written over the teacher's
#: logits: those rows are rounded by a separate kernel. A power of two; twice as many is one more
#: launch for each chunk.
FIRST_VISIT = 16


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
    chunk = _Chunk(
        problem,
        products,
        min(height, rows.count),
        with_gradient=gradients is not None,
        gathered=rows.index is not None,
    )
    for begin in range(0, rows.count, height):
        here = rows.at(begin, min(begin + height, rows.count))
        states = take(hidden, here)
        if rows.mask is not None:  # 0 times what is not a number would spoil the weight gradient
            states = torch.where(rows.mask[here, None], states, 0)
        hard[here], soft[here] = chunk.losses(here, states)
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
    gradient_dtype = products.gradient_dtype(wide, student.compute)
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
        # it is written over the student's logits, or over those of a teacher's head
        gradient_bytes=0 if teacher or gradient_dtype == wide else gradient_dtype.itemsize,
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

    def __init__(
        self, problem: Problem, products: Products, height: int, with_gradient: bool, gathered: bool
    ) -> None:
        self.problem, self.products, self.with_gradient = problem, products, with_gradient
        side, logits = problem.student, problem.teacher_logits
        shape = (height, side.weight.shape[0])
        self.student = side.hidden.new_empty(shape, dtype=problem.wide)
        self.teacher = None if problem.teacher is None else self.student.new_empty(shape)
        self.gradient_dtype = products.gradient_dtype(problem.wide, side.compute)
        self.gradient: Tensor | None = None  # as the products take it; None: there is none yet
        self.over_teacher = False
        if not with_gradient:
            return
        if self.gradient_dtype == problem.wide:
            self.gradient = self.student
        elif self.teacher is not None:
            memory = self.teacher.view(-1).view(self.gradient_dtype)
            self.gradient, self.over_teacher = memory[: self.student.numel()].view(shape), True
        elif logits is None or not (gathered or _lies_apart(logits)):
            self.gradient = self.student.new_empty(shape, dtype=self.gradient_dtype)

    def losses(self, rows: slice | Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return hard and soft of these rows, and leave the gradient of their logits."""
        problem, count = self.problem, hidden.shape[0]
        s = self.student[:count]
        self.products.logits(s, hidden, problem.student)
        t = self._teacher_logits(rows, s)
        vectors = (problem.labels, problem.w_hard, problem.w_soft)
        labels, w_hard, w_soft = (None if x is None else x[rows] for x in vectors)
        parts = _doubling_parts(count) if self.over_teacher else [slice(0, count)]
        visits = [self._visit(part, s, t, labels, w_hard, w_soft) for part in parts]
        if len(visits) == 1:
            return visits[0]
        hard, soft = (torch.cat(x) for x in zip(*visits, strict=True))
        return hard, soft

    def _visit(
        self, part: slice, s: Tensor, t: Tensor, *vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return hard and soft of a part of the chunk's rows, and leave their gradient."""
        backend, options = self.problem.backend, self.problem.options
        s, t = s[part], t[part]
        labels, w_hard, w_soft = (None if x is None else x[part] for x in vectors)
        rows = (s[None], t[None], labels, w_hard, w_soft, options)
        if not self.with_gradient:
            return backend.forward(*rows)[:2]
        out = self._free_memory(part)
        if out is not None:
            return backend.forward_backward(*rows, out=out[None])[:2]
        losses = backend.forward_backward(*rows, inplace=True)[:2]
        if self.over_teacher and self.gradient is not None:
            self.gradient[part].copy_(s)
        return losses

    def _free_memory(self, part: slice) -> Tensor | None:
        """Return where the row kernel writes the gradient; None: over the student's logits."""
        if self.gradient is None or self.gradient.dtype == self.student.dtype:
            return None
        return None if self.over_teacher and part.start == 0 else self.gradient[part]

    def multiply(
        self, rows: slice | Tensor, hidden: Tensor, gradients: Gradients, add: bool
    ) -> None:
        """The chunk's part of each wanted gradient."""
        side, count = self.problem.student, hidden.shape[0]
        if self.gradient is not None:
            gradient = self.gradient[:count]
        else:  # only now is there memory for it: a copy of the teacher's logits is gone
            gradient = self.student[:count].to(self.gradient_dtype)
        if gradients.bias is not None:
            part = gradient.sum(0, dtype=self.student.dtype)
            gradients.bias.copy_(gradients.bias + part if add else part)
        if gradients.hidden is not None:
            self._hidden_gradient(gradients.hidden, rows, gradient)
        if gradients.weight is not None:
            self.products.weight_gradient(gradients.weight, gradient, hidden, side.compute, add)

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


def _doubling_parts(count: int) -> Iterator[slice]:
    """Yield the rows of a chunk that are visited together, if the teacher's logits make way.

    The gradient of rows [0, 2b) has 16 bits and so takes the memory of the teacher's float32 logits
    of rows [0, b), which are free when these rows have been visited: the parts after the first
    begin at b and end at 2b, and never write what they or a later part read.
    """
    begin, end = 0, -(-count // FIRST_VISIT)
    while begin < count:
        yield slice(begin, min(end, count))
        begin, end = end, 2 * end


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
