"""The chunk driver: logits of a chunk of rows, the row kernel, the products of the gradient.

A Head's logits exist for one chunk at a time, in float32 buffers that all chunks share. The
gradient of a student Head's logits overwrites them; if the products take a 16-bit gradient, it
overwrites the teacher's logits instead (:func:`_doubling_parts`). The weight gradient is summed
over the chunks: the first chunk writes it, the others add. If it takes no more memory, the
gradients of all rows' logits are kept instead and multiplied at once (:func:`_kept_dtype`); the
memory of the weight gradient, which is then written last, holds the chunks' logits.

hard and soft are what :class:`fused_kd.engines.Engine` defines; C is the number of rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..classes import Classes
from ..options import Formula
from .memory import Cut, Sizes, cut_rows, keeping_bytes, rows_in_gradient, summing_bytes
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
    may_narrow: bool  # without a sum over chunks, the weight gradient has the weight's dtype
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
        gradients = _new_gradients(problem, wanted, cut.is_single or kept is not None, rows)
        if kept is not None and gradients[1] is not None and problem.chunk_rows is None:
            height = rows_in_gradient(sizes, rows.count, height, gradients[1].itemsize)
    chunk = _chunk_of(problem, products, min(height, rows.count), gradients, rows, kept)
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
    written = _accumulator(problem, without_sum=True)
    total = written if cut.is_single else _accumulator(problem, without_sum=False)
    summing = summing_bytes(sizes, min(cut.height, rows), total.itemsize, weight.itemsize)
    keeping = keeping_bytes(sizes, rows, min(cut.height, rows), kept.itemsize, written.itemsize)
    return kept if keeping <= summing else None


def _narrow(bias: Tensor | None, wanted: bool) -> bool:
    """Return True if the gradient of the bias has 16 bits or is not wanted."""
    return bias is None or not wanted or bias.itemsize == 2


def _accumulator(problem: Problem, without_sum: bool) -> torch.dtype:
    """Return the dtype of the weight gradient before it is rounded to that of the weight.

    It is that of the weight if no sum over chunks is needed and the caller allows it
    (``may_narrow``).
    """
    student = problem.student
    assert isinstance(student, Projection)
    if problem.may_narrow and without_sum and problem.accum_dtype == torch.float32:
        return _sum_dtype(student.weight.dtype, student.weight)
    return _sum_dtype(problem.grad_accum_dtype, student.weight)


def _new_gradients(
    problem: Problem, wanted: tuple[bool, ...], without_sum: bool, rows: Selection
) -> Gradients:
    """Allocate the wanted gradients; set to 0 the rows that no chunk writes, in place too.

    Args:
        problem: the rows and the options.
        wanted: for each of the student's three tensors, as in :func:`run_chunks`.
        without_sum: no gradient is a sum over chunks.
        rows: the rows that are computed.
    """
    accumulate, student = problem.grad_accum_dtype, problem.student
    if isinstance(student, Projection):
        accumulate = _accumulator(problem, without_sum)
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


class _Memory:
    """Memory for the buffers of a chunk: at first that of `spare`, which is written last.

    Args:
        like: a tensor on the device.
        spare: a contiguous tensor; None: there is none.
    """

    def __init__(self, like: Tensor, spare: Tensor | None = None) -> None:
        self.like = like
        self.left = None if spare is None else spare.view(-1).view(torch.uint8)

    def take(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor, in what is left of the spare memory if it fits."""
        size = math.prod(shape) * dtype.itemsize
        if self.left is None or size > self.left.numel():
            return self.like.new_empty(shape, dtype=dtype)
        part, self.left = self.left[:size], self.left[size:]
        return part.view(dtype).view(shape)


class _TeacherRows:
    """The teacher's logits of a chunk, in a buffer that all chunks share."""

    def __init__(self, problem: Problem, products: Products, height: int, memory: _Memory) -> None:
        self.side, self.products = problem.teacher, products
        self.buffer: Tensor | None = None
        if isinstance(self.side, Projection):
            vocabulary = self.side.weight.shape[0]
            self.buffer = memory.take(height, vocabulary, dtype=problem.accum_dtype)

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
        gradients: those that are written, with None for an unwanted one; None: losses only.
        rows: the rows that are computed.
        kept: the dtype in which the gradients of all rows' logits are kept for :meth:`finish`;
            None: they are not.
    """

    def __init__(
        self,
        problem: Problem,
        student: Projection,
        products: Products,
        height: int,
        gradients: Gradients | None,
        rows: Selection,
        kept: torch.dtype | None,
    ) -> None:
        self.problem, self.side, self.products = problem, student, products
        self.gradients, self.rows, self.keeps = gradients, rows, kept is not None
        weights = (_scaled_weights(w, student.scale) for w in (problem.w_hard, problem.w_soft))
        self.vectors = (problem.labels, *weights)
        vocabulary = student.weight.shape[0]
        memory = _Memory(student.hidden, gradients[1] if gradients and kept else None)
        self.logits = memory.take(height, vocabulary, dtype=problem.accum_dtype)
        self.teacher = _TeacherRows(problem, products, height, memory)
        self.gradient_dtype = products.gradient_dtype(problem.accum_dtype, student.compute)
        self.gradient: Tensor | None = None  # in the products' dtype; None: not allocated yet
        self.over_teacher = False
        if gradients is None:
            return
        if kept is not None:
            self.gradient = self.logits.new_empty((rows.count, vocabulary), dtype=kept)
        elif self.gradient_dtype == problem.accum_dtype:
            self.gradient = self.logits
        elif self.teacher.buffer is not None:
            overwritten = self.teacher.buffer.view(-1).view(self.gradient_dtype)
            self.gradient = overwritten[: self.logits.numel()].view(self.logits.shape)
            self.over_teacher = True
        elif not (isinstance(problem.teacher, Tensor) and _copies(problem.teacher, rows)):
            self.gradient = torch.empty_like(self.logits, dtype=self.gradient_dtype)

    def process(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return hard and soft of a chunk; write or add its part of the gradients, or keep it.

        Args:
            part: the positions of the chunk's rows among those computed. The first chunk
                overwrites the gradients of weight and bias, the others add to them.
        """
        hidden = self._hidden(part)
        losses = self._losses(part, hidden)
        if self.gradients is not None:
            gradient = self._gradient_of(part)
            if self.gradients[0] is not None:
                self._hidden_gradient(self.gradients[0], self.rows.at(part), gradient)
            if not self.keeps:
                self._sum_gradients(gradient, hidden, add=part.start > 0)
        return losses

    def finish(self) -> None:
        """Write the gradients of weight and bias from the gradients that were kept."""
        if self.keeps and self.rows.count > 0:
            everything = slice(0, self.rows.count)
            hidden = self._hidden(everything)
            self._sum_gradients(self._gradient_of(everything), hidden, add=False)

    def _hidden(self, part: slice) -> Tensor:
        """Return the hidden states (C, H) of these rows, 0 where a row is masked."""
        index = self.rows.at(part)
        hidden = take(self.side.hidden, index)
        if self.rows.mask is not None:  # 0 times NaN would spoil the weight gradient
            hidden = torch.where(self.rows.mask[index, None], hidden, 0)
        return hidden

    def _losses(self, part: slice, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return hard and soft (C,); if gradients are wanted, store that of the chunk's logits.

        It is stored where `_gradient_memory` says; if that is None, over `self.logits`.
        """
        count, rows = hidden.shape[0], self.rows.at(part)
        s = self.logits[:count]
        self.products.logits(s, hidden, self.side)
        t = self.teacher.at(rows, s)
        out = self._gradient_memory(part)
        vectors = tuple(None if x is None else x[rows] for x in self.vectors)
        parts = _doubling_parts(count) if self.over_teacher else [slice(0, count)]
        losses = [self._process_part(p, s, t, out, *vectors) for p in parts]
        if len(losses) == 1:
            return losses[0]
        hard, soft = (torch.cat(x) for x in zip(*losses, strict=True))
        return hard, soft

    def _gradient_memory(self, part: slice) -> Tensor | None:
        """Return the memory of the gradient of a chunk's logits (C, V); None: not yet allocated."""
        if self.gradient is None:
            return None
        return self.gradient[part if self.keeps else slice(0, part.stop - part.start)]

    def _process_part(
        self,
        part: slice,
        s: Tensor,
        t: Tensor | Classes,
        gradient: Tensor | None,
        *vectors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return hard and soft of a part of the chunk; store the gradient of its logits if wanted.

        Args:
            part: the rows of the part, counted within the chunk.
            s: the student's logits of the chunk (C, V); may be overwritten by the gradient.
            t: the teacher's, likewise.
            gradient: the memory for it (C, V); None: over the student's logits.
            vectors: labels, w_hard and w_soft of the chunk, (C,) or None.
        """
        backend, formula = self.problem.backend, self.problem.formula
        s, t = s[part], t.at(part) if isinstance(t, Classes) else t[part]
        labels, w_hard, w_soft = (None if x is None else x[part] for x in vectors)
        rows = (s[None], _batched(t), labels, w_hard, w_soft, formula)
        if self.gradients is None:
            return backend.forward(*rows)[:2]
        if gradient is None or self.gradient is self.logits:
            return backend.forward_backward(*rows, inplace=True)[:2]
        if self.over_teacher and part.start == 0:  # these rows of the teacher are being read
            losses = backend.forward_backward(*rows, inplace=True)[:2]
            gradient[part].copy_(s)
            return losses
        return backend.forward_backward(*rows, out=gradient[part][None])[:2]

    def _gradient_of(self, part: slice) -> Tensor:
        """Return the gradient of a chunk's logits (C, V), in a dtype that the products take."""
        stored = self._gradient_memory(part)
        if stored is not None:
            return stored
        # allocated only now, after the copy of the teacher's logits was freed
        return self.logits[: part.stop - part.start].to(self.gradient_dtype)

    def _hidden_gradient(self, out: Tensor, rows: Rows, gradient: Tensor) -> None:
        """Write the rows of the hidden gradient."""
        target = out.view(-1, out.shape[-1])
        if isinstance(rows, slice):
            self.products.hidden_gradient(target[rows], gradient, self.side)
            return
        part = target.new_empty((gradient.shape[0], target.shape[1]))
        self.products.hidden_gradient(part, gradient, self.side)
        target[rows] = part

    def _sum_gradients(self, gradient: Tensor, hidden: Tensor, add: bool) -> None:
        """Multiply a gradient of logits into those of weight and bias: overwrite them, or `add`."""
        assert self.gradients is not None
        _, of_weight, of_bias = self.gradients
        if of_bias is not None:
            self.products.bias_gradient(of_bias, gradient, add)
        if of_weight is not None:
            self.products.weight_gradient(of_weight, gradient, hidden, self.side.compute, add)


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
        rows: Selection,
    ) -> None:
        self.problem, self.logits, self.rows = problem, logits, rows
        self.teacher = _TeacherRows(problem, products, height, _Memory(logits))
        #: The memory for the gradient; None: not wanted.
        self.out = None
        if gradients is not None:
            self.out = logits if problem.inplace else gradients[0]

    def process(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return hard and soft of a chunk; write the gradient of its logits if it is wanted.

        Args:
            part: the positions of the chunk's rows among those computed.
        """
        rows = self.rows.at(part)
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

    def finish(self) -> None:
        """Return at once: the chunk of each row wrote its gradient."""


def _chunk_of(
    problem: Problem,
    products: Products,
    height: int,
    gradients: Gradients | None,
    rows: Selection,
    kept: torch.dtype | None,
) -> _HeadChunk | _LogitsChunk:
    student = problem.student
    if isinstance(student, Projection):
        return _HeadChunk(problem, student, products, height, gradients, rows, kept)
    return _LogitsChunk(problem, student, products, height, gradients, rows)


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
