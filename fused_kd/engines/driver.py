"""The chunk driver: logits of a chunk of rows, the row kernel, the products of the gradient.

A Head's logits exist for one chunk at a time, in float32 buffers that all chunks share. The
gradient of a student Head's logits overwrites them; if the products take a 16-bit gradient, it
overwrites the teacher's logits instead (:func:`_doubling_parts`). The weight gradient is summed
over the chunks: the first chunk writes it, the others add.

hard and soft are what :class:`fused_kd.engines.Engine` defines; C is the number of rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..classes import Classes
from ..options import Formula
from .memory import Cut, Sizes, cut_rows
from .products import Products, Projection, products_for
from .selection import Selection, is_scattered, put, take

#: The first part of a chunk is 1/FIRST_PART of its rows if the gradient overwrites the teacher's
#: logits: a separate kernel rounds those rows. A power of two; doubling it costs one more launch
#: for each chunk.
FIRST_PART = 16

#: The rows of a chunk: a slice, or their indices.
Rows = slice | Tensor


class Problem(NamedTuple):
    """The rows of both models and the options: everything that a run over the chunks needs."""

    student: Projection | Tensor  # a head, or logits (..., V)
    teacher: Projection | Tensor | Classes | None  # or a TopK's; None: no term reads the teacher
    labels: Tensor | None  # (N,)
    w_hard: Tensor | None  # (N,); None: the term is off, 0: off for that row
    w_soft: Tensor | None  # (N,), likewise
    formula: Formula
    backend_name: str
    backend: Backend  # of this name
    accum_dtype: torch.dtype  # of computed logits, losses and sums
    chunk_rows: int | None  # None: from memory_budget
    memory_budget: int | None  # bytes; None: automatic
    kept_rows: int | None  # upper bound of the rows with a weight; None: count (CPU), or mask
    grad_accum_dtype: torch.dtype  # of the sums over chunks
    may_narrow: bool  # with a single chunk, the weight gradient has the weight's dtype
    inplace: bool  # the gradient overwrites the student's logits

    @property
    def rows(self) -> Tensor:
        """Return the student's logits (..., V) or hidden states (..., H), N rows."""
        return self.student if isinstance(self.student, Tensor) else self.student.hidden


#: Of the student's logits, None, None; or of hidden (..., H), weight (V, H), bias (V,). None: not
#: wanted, or in place. Those of weight and bias have the dtype of their sums (:func:`_sum_dtype`).
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


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
    cut = cut_rows(
        rows.all,
        rows.count,
        problem.chunk_rows,
        problem.memory_budget,
        x.device,
        sizes_of(problem, products, rows.gathers),
        products.fixed_bytes(),
    )
    hard, soft = (x.new_zeros(rows.all, dtype=dtype) for _ in range(2))
    gradients = None if wanted is None else _new_gradients(problem, wanted, cut, rows)
    chunk = _chunk_of(problem, products, min(cut.height, rows.count), gradients, rows)
    for begin in range(0, rows.count, cut.height):
        index = rows.at(begin, min(begin + cut.height, rows.count))
        hard[index], soft[index] = chunk.process(index, add=begin > 0)
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


def _new_gradients(
    problem: Problem, wanted: tuple[bool, ...], cut: Cut, rows: Selection
) -> Gradients:
    """Allocate the wanted gradients; set to 0 the rows that no chunk writes, in place too.

    With a single chunk, those of weight and bias may get the weight's dtype (``may_narrow``).
    """
    accumulate, student = problem.grad_accum_dtype, problem.student
    narrows = problem.may_narrow and cut.is_single and problem.accum_dtype == torch.float32
    if narrows and isinstance(student, Projection):
        accumulate = student.weight.dtype
    gradients = empty_gradients(student, wanted, accumulate, problem.inplace)
    first = student if problem.inplace and isinstance(student, Tensor) else gradients[0]
    if first is not None and rows.dropped is not None:
        put(first, rows.dropped, 0.0)
    if rows.count == 0:
        for gradient in (first, *gradients[1:]):
            if gradient is not None:
                gradient.zero_()
    return gradients


def empty_gradients(
    student: Projection | Tensor, wanted: tuple[bool, ...], accumulate: torch.dtype, inplace: bool
) -> Gradients:
    """Allocate the wanted gradients, uninitialised; None for the others. Fake tensors work too.

    Args:
        student: a head, or logits, whose gradient is always wanted.
        wanted: for hidden, weight and bias.
        accumulate: the dtype of the sums over chunks, see :func:`_sum_dtype`.
        inplace: the gradient of logits needs no memory: it is None.
    """
    if isinstance(student, Tensor):
        return None if inplace else student.new_empty(student.shape), None, None
    hidden, weight, bias = student.hidden, student.weight, student.bias
    of_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
    dtypes = (_sum_dtype(accumulate, p) for p in (weight, bias))
    shapes = (weight.shape, weight.shape[:1])
    of_weight, of_bias = (
        hidden.new_empty(shape, dtype=dtype) if want else None
        for shape, dtype, want in zip(shapes, dtypes, wanted[1:], strict=True)
    )
    return of_hidden, of_weight, of_bias


def _sum_dtype(accumulate: torch.dtype, parameter: Tensor | None) -> torch.dtype:
    """Return the dtype of a parameter's gradient sum: the wider of both dtypes, at most float32.

    A bias may be wider than the weight. It is `accumulate` without a parameter, and if that is
    float64, as it is if the arithmetic is.
    """
    if parameter is None or accumulate == torch.float64:
        return accumulate
    wider = torch.promote_types(accumulate, parameter.dtype)
    return torch.float32 if wider == torch.float64 else wider


# -------------------------------------------------------------------------------------- a chunk


class _TeacherRows:
    """The teacher's logits of a chunk, in a buffer that all chunks share."""

    def __init__(self, problem: Problem, products: Products, height: int) -> None:
        self.side, self.products = problem.teacher, products
        self.buffer: Tensor | None = None
        if isinstance(self.side, Projection):
            shape = (height, self.side.weight.shape[0])
            self.buffer = self.side.hidden.new_empty(shape, dtype=problem.accum_dtype)

    def at(self, rows: Rows, student: Tensor) -> Tensor | Classes:
        """Return the teacher's logits (C, V) of these rows; a Head's are valid until the next call.

        Of a TopK, its classes. Logits that were passed are a view of the caller's if possible, not
        to be written to.
        Without a teacher it returns `student`, the student's logits (C, V): the row kernel then
        ignores its teacher argument.
        """
        if self.side is None:
            return student
        if isinstance(self.side, Tensor):
            return take(self.side, rows)
        if isinstance(self.side, Classes):
            return self.side.at(rows)
        assert self.buffer is not None
        hidden = take(self.side.hidden, rows)
        logits = self.buffer[: hidden.shape[0]]
        self.products.logits(logits, hidden, self.side)
        return logits


class _HeadChunk:
    """The chunks of a student Head, processed one at a time in buffers that all chunks share.

    For each chunk: the logits, the row kernel, and the products of the gradient of the logits.

    Args:
        problem: the rows and the options.
        student: the student's head.
        products: the matrix-product routines.
        height: the largest number of rows of a chunk.
        gradients: those that :meth:`process` writes, with None for an unwanted one; None: losses
            only.
        rows: the rows that are computed.
    """

    def __init__(
        self,
        problem: Problem,
        student: Projection,
        products: Products,
        height: int,
        gradients: Gradients | None,
        rows: Selection,
    ) -> None:
        self.problem, self.side, self.products = problem, student, products
        self.gradients, self.mask = gradients, rows.mask
        weights = (_scaled_weights(w, student.scale) for w in (problem.w_hard, problem.w_soft))
        self.vectors = (problem.labels, *weights)
        self.teacher = _TeacherRows(problem, products, height)
        shape = (height, student.weight.shape[0])
        self.logits = student.hidden.new_empty(shape, dtype=problem.accum_dtype)
        self.gradient_dtype = products.gradient_dtype(problem.accum_dtype, student.compute)
        self.gradient: Tensor | None = None  # in the products' dtype; None: not allocated yet
        self.over_teacher = False
        if gradients is None:
            return
        if self.gradient_dtype == problem.accum_dtype:
            self.gradient = self.logits
        elif self.teacher.buffer is not None:
            memory = self.teacher.buffer.view(-1).view(self.gradient_dtype)
            self.gradient, self.over_teacher = memory[: self.logits.numel()].view(shape), True
        elif not (isinstance(problem.teacher, Tensor) and _copies(problem.teacher, rows)):
            self.gradient = self.logits.new_empty(shape, dtype=self.gradient_dtype)

    def process(self, rows: Rows, add: bool) -> tuple[Tensor, Tensor]:
        """Return hard and soft of these rows; write their part of the gradients, or add it.

        Args:
            rows: the rows of this chunk.
            add: add to the weight and bias gradients; False: overwrite them (the first chunk).
        """
        hidden = take(self.side.hidden, rows)
        if self.mask is not None:  # 0 times NaN would spoil the weight gradient
            hidden = torch.where(self.mask[rows, None], hidden, 0)
        losses = self._losses(rows, hidden)
        if self.gradients is not None:
            self._multiply(rows, hidden, self.gradients, add)
        return losses

    def _losses(self, rows: Rows, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return hard and soft (C,); if gradients are wanted, store that of the chunk's logits.

        It is stored in `self.gradient`; if that is None, over `self.logits`.
        """
        count = hidden.shape[0]
        s = self.logits[:count]
        self.products.logits(s, hidden, self.side)
        t = self.teacher.at(rows, s)
        vectors = tuple(None if x is None else x[rows] for x in self.vectors)
        parts = _doubling_parts(count) if self.over_teacher else [slice(0, count)]
        losses = [self._process_part(part, s, t, *vectors) for part in parts]
        if len(losses) == 1:
            return losses[0]
        hard, soft = (torch.cat(x) for x in zip(*losses, strict=True))
        return hard, soft

    def _process_part(
        self, part: slice, s: Tensor, t: Tensor | Classes, *vectors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return hard and soft of a part of the chunk; store the gradient of its logits if wanted.

        Args:
            part: the rows of the part, counted within the chunk.
            s: the student's logits of the chunk (C, V); may be overwritten by the gradient.
            t: the teacher's, likewise.
            vectors: labels, w_hard and w_soft of the chunk, (C,) or None.
        """
        backend, formula = self.problem.backend, self.problem.formula
        s, t = s[part], t.at(part) if isinstance(t, Classes) else t[part]
        labels, w_hard, w_soft = (None if x is None else x[part] for x in vectors)
        rows = (s[None], _batched(t), labels, w_hard, w_soft, formula)
        if self.gradients is None:
            return backend.forward(*rows)[:2]
        out = self._free_memory(part)
        if out is not None:
            return backend.forward_backward(*rows, out=out[None])[:2]
        losses = backend.forward_backward(*rows, inplace=True)[:2]
        if self.over_teacher and self.gradient is not None:
            self.gradient[part].copy_(s)
        return losses

    def _free_memory(self, part: slice) -> Tensor | None:
        """Return memory for the gradient of a part's logits; None: over the student's logits."""
        if self.gradient is None or self.gradient.dtype == self.logits.dtype:
            return None
        return None if self.over_teacher and part.start == 0 else self.gradient[part]

    def _multiply(self, rows: Rows, hidden: Tensor, gradients: Gradients, add: bool) -> None:
        """Multiply the gradient that `_losses` has stored for this chunk into each wanted gradient.

        Rows of the hidden gradient are written; those of weight and bias are overwritten, or added
        to if `add`.
        """
        of_hidden, of_weight, of_bias = gradients
        count = hidden.shape[0]
        if self.gradient is not None:
            gradient = self.gradient[:count]
        else:  # allocated only now, after the copy of the teacher's logits was freed
            gradient = self.logits[:count].to(self.gradient_dtype)
        if of_bias is not None:
            part = gradient.sum(0, dtype=self.logits.dtype)
            of_bias.copy_(of_bias + part if add else part)
        if of_hidden is not None:
            self._hidden_gradient(of_hidden, rows, gradient)
        if of_weight is not None:
            self.products.weight_gradient(of_weight, gradient, hidden, self.side.compute, add)

    def _hidden_gradient(self, out: Tensor, rows: Rows, gradient: Tensor) -> None:
        target = out.view(-1, out.shape[-1])
        if isinstance(rows, slice) and target.dtype == self.logits.dtype:
            self.products.hidden_gradient(target[rows], gradient, self.side)
            return
        part = self.logits.new_empty((gradient.shape[0], target.shape[1]))
        self.products.hidden_gradient(part, gradient, self.side)
        target[rows] = part.to(target.dtype)


class _LogitsChunk:
    """The chunks of a student's logits with a teacher Head, processed one at a time.

    The arguments are those of :class:`_HeadChunk`, with the student's logits (..., V).
    """

    def __init__(
        self,
        problem: Problem,
        logits: Tensor,
        products: Products,
        height: int,
        gradients: Gradients | None,
    ) -> None:
        self.problem, self.logits = problem, logits
        self.teacher = _TeacherRows(problem, products, height)
        #: The memory for the gradient; None: not wanted.
        self.out = None
        if gradients is not None:
            self.out = logits if problem.inplace else gradients[0]

    def process(self, rows: Rows, add: bool) -> tuple[Tensor, Tensor]:
        """Return hard and soft of these rows; write the gradient of their logits if it is wanted.

        Args:
            rows: the rows of this chunk.
            add: unused, since each row's gradient is written once.
        """
        s = take(self.logits, rows)
        t = self.teacher.at(rows, s)
        p = self.problem
        labels, w_hard, w_soft = (
            None if x is None else x[rows] for x in (p.labels, p.w_hard, p.w_soft)
        )
        arguments = (s[None], _batched(t), labels, w_hard, w_soft, p.formula)
        if self.out is None:
            return p.backend.forward(*arguments)[:2]
        if isinstance(rows, slice) and not p.inplace:
            return p.backend.forward_backward(*arguments, out=take(self.out, rows)[None])[:2]
        losses = p.backend.forward_backward(*arguments, inplace=True)[:2]
        if not isinstance(rows, slice) or is_scattered(self.logits):  # s is a copy
            put(self.out, rows, s)
        return losses


def _chunk_of(
    problem: Problem,
    products: Products,
    height: int,
    gradients: Gradients | None,
    rows: Selection,
) -> _HeadChunk | _LogitsChunk:
    student = problem.student
    if isinstance(student, Projection):
        return _HeadChunk(problem, student, products, height, gradients, rows)
    return _LogitsChunk(problem, student, products, height, gradients)


def _batched(teacher: Tensor | Classes) -> Tensor | Classes:
    """Return the teacher of a chunk (C, V) as a backend takes it, with logits (1, C, V)."""
    if isinstance(teacher, Classes):
        return teacher._replace(logits=teacher.logits[None])
    return teacher[None]


def _scaled_weights(w: Tensor | None, scale: float) -> Tensor | None:
    """Return scale·w, 0 only if w is 0; None stays None.

    With these weights the row kernel computes the gradient by hidden·weightᵀ + bias; the logits are
    `scale` times that.
    """
    if w is None or scale == 1.0:
        return w
    scaled = w * scale
    lost = (w != 0) & (scaled == 0)  # underflowed; 0 would switch the row's term off
    return torch.where(lost, torch.finfo(w.dtype).tiny, scaled)


def _copies(logits: Tensor, rows: Selection) -> bool:
    """Return True if :func:`take` copies a chunk of these logits instead of returning a view."""
    return rows.index is not None or is_scattered(logits)


def _doubling_parts(count: int) -> Iterator[slice]:
    """Yield the parts of a chunk of `count` rows if the gradient overwrites the teacher's logits.

    The 16-bit gradient of rows [0, 2b) fits the memory of the teacher's float32 logits of rows
    [0, b), which are not needed after these rows were processed. So each part after the first is
    [b, 2b), and never writes what it or a later part reads.
    """
    begin, end = 0, -(-count // FIRST_PART)
    while begin < count:
        yield slice(begin, min(end, count))
        begin, end = end, 2 * end
