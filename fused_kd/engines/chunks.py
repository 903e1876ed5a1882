"""A chunk of rows: logits of the heads, the row kernel, the products of the gradient.

A Head's logits exist for one chunk at a time, in float32 buffers that all chunks share. The
gradient of a student Head's logits overwrites them; if the products take a 16-bit gradient, it
overwrites the teacher's logits instead (:func:`_doubling_parts`).

hard and soft are what :class:`fused_kd.engines.Engine` defines; C is the number of rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..classes import Classes
from .gradients import Gradients
from .problem import Problem
from .products import Products, Projection
from .selection import Selection, is_scattered, put, take

#: The first part of a chunk is 1/FIRST_PART of its rows if the gradient overwrites the teacher's
#: logits: a separate kernel rounds those rows. A power of two; doubling it costs one more launch
#: for each chunk.
FIRST_PART = 16

#: The rows of a chunk: a slice, or their indices.
Rows = slice | Tensor


def chunk_of(
    problem: Problem,
    products: Products,
    height: int,
    gradients: Gradients | None,
    rows: Selection,
    kept: torch.dtype | None,
) -> HeadChunk | _LogitsChunk:
    """Return the chunks of a student's head or logits; the arguments are those of HeadChunk."""
    student = problem.student
    if isinstance(student, Projection):
        return HeadChunk(problem, student, products, height, gradients, rows, kept)
    return _LogitsChunk(problem, student, products, height, gradients, rows)


class HeadChunk:
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

    The arguments are those of :class:`HeadChunk`, with the student's logits (..., V).
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
