"""The memory of the gradients: what is allocated, and the dtype of the sums over the chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem
from .products import Projection
from .selection import Selection, put

#: Of the student's logits, None, None; or of hidden (..., H), weight (V, H), bias (V,). None: not
#: wanted, or in place. Those of weight and bias have the dtype of their sums over the chunks
#: (:func:`sum_dtype`).
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def new_gradients(
    problem: Problem, wanted: tuple[bool, ...], without_sum: bool, rows: Selection
) -> Gradients:
    """Allocate the wanted gradients; set to 0 the rows that no chunk writes, in place too.

    Args:
        problem: the rows and the options.
        wanted: for each of the student's three tensors, as for ``driver.run_chunks``.
        without_sum: no gradient is a sum over chunks.
        rows: the rows that are computed.
    """
    accumulate, student = problem.grad_accum_dtype, problem.student
    if isinstance(student, Projection):
        accumulate = accumulator(problem, without_sum)
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
        accumulate: the dtype of the sums over chunks, see :func:`sum_dtype`.
        inplace: the gradient of logits needs no memory: it is None.
    """
    if isinstance(student, Tensor):
        return None if inplace else student.new_empty(student.shape), None, None
    hidden, weight, bias = student.hidden, student.weight, student.bias
    of_hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
    dtypes = (sum_dtype(accumulate, p) for p in (weight, bias))
    shapes = (weight.shape, weight.shape[:1])
    of_weight, of_bias = (
        hidden.new_empty(shape, dtype=dtype) if want else None
        for shape, dtype, want in zip(shapes, dtypes, wanted[1:], strict=True)
    )
    return of_hidden, of_weight, of_bias


def accumulator(problem: Problem, without_sum: bool) -> torch.dtype:
    """Return the dtype of the weight gradient before it is rounded to that of the weight.

    It is that of the weight if no sum over chunks is needed and the caller allows it
    (``may_narrow``).
    """
    student = problem.student
    assert isinstance(student, Projection)
    if problem.may_narrow and without_sum and problem.accum_dtype == torch.float32:
        return sum_dtype(student.weight.dtype, student.weight)
    return sum_dtype(problem.grad_accum_dtype, student.weight)


def sum_dtype(accumulate: torch.dtype, parameter: Tensor | None) -> torch.dtype:
    """Return the dtype of a parameter's gradient sum: the wider of both dtypes, at most float32.

    A bias may be wider than the weight. It is `accumulate` without a parameter, and if that is
    float64, as it is if the arithmetic is.
    """
    if parameter is None or accumulate == torch.float64:
        return accumulate
    wider = torch.promote_types(accumulate, parameter.dtype)
    return torch.float32 if wider == torch.float64 else wider
