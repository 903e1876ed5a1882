"""The two registered operators of the linear level: the whole chunk loop is opaque to a compiler.

A loop that a compiler traced would be compiled anew for every number of rows. Each operator takes
the tensors and options of :func:`fused_kd.linear_kd_loss`, one weight per row and term (None: the
term is off), and gives the unweighted terms of every row; the second one also the gradients of
their weighted sum. Calling them directly is not differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import named
from ..ops import library
from ..options import KDOptions
from ..reduction import arithmetic_dtype
from .chunks import Gradients, Problem, run_chunks
from .products import Side

_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? student_bias, Tensor? teacher_hidden, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits, Tensor? labels, "
    "Tensor? w_hard, Tensor? w_soft"
)
_SETTINGS = (
    "str divergence, float temperature, float beta, str soft_scale, float label_smoothing, "
    "str backend, ScalarType student_dtype, ScalarType teacher_dtype, SymInt? chunk_rows, "
    "SymInt? memory_budget, SymInt? kept_rows"
)
library.define(f"linear_losses({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)")
# gradients by the student's hidden, weight and bias, empty if not wanted
library.define(
    f"linear_gradients({_TENSORS}, {_SETTINGS}, bool[] wanted, ScalarType accumulate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def linear_losses(*arguments: Any) -> tuple[Tensor, Tensor]:
    """hard (N,) and soft (N,)."""
    problem = _problem(*arguments)
    with torch.no_grad(), torch.autocast(problem.student.hidden.device.type, enabled=False):
        return run_chunks(problem, None)


def linear_gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hard, soft and the gradients by hidden, weight and bias."""
    *rest, wanted, accumulate = arguments
    problem = _problem(*rest)
    outputs = _empty_gradients(problem.student, wanted, accumulate)
    asked = (x if w else None for x, w in zip(outputs, wanted, strict=True))
    with torch.no_grad(), torch.autocast(problem.student.hidden.device.type, enabled=False):
        hard, soft = run_chunks(problem, Gradients(*asked))
    return hard, soft, *outputs


def _problem(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    divergence: str,
    temperature: float,
    beta: float,
    soft_scale: str,
    label_smoothing: float,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    chunk_rows: int | None,
    memory_budget: int | None,
    kept_rows: int | None,
) -> Problem:
    wide = arithmetic_dtype(student_hidden, teacher_hidden, teacher_logits)
    teacher = None
    if w_soft is None:
        teacher_logits = None  # no term reads the teacher
    elif teacher_hidden is not None and teacher_weight is not None:
        teacher = Side(teacher_hidden, teacher_weight, teacher_bias, teacher_dtype)
    options = KDOptions(
        divergence=divergence,
        temperature=temperature,
        beta=beta,
        soft_scale=soft_scale,
        label_smoothing=label_smoothing,
    )
    return Problem(
        student=Side(student_hidden, student_weight, student_bias, student_dtype),
        teacher=teacher,
        teacher_logits=teacher_logits,
        labels=labels,
        w_hard=w_hard,
        w_soft=w_soft,
        options=options,
        backend=named(backend),
        wide=wide,
        chunk_rows=chunk_rows,
        memory_budget=memory_budget,
        kept_rows=kept_rows,
    )


def _empty_gradients(
    student: Side, wanted: list[bool], accumulate: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = student.hidden, student.weight, student.bias
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    sums = (_sum_dtype(accumulate, x) for x in (weight, bias))
    dtypes = (hidden.dtype, *sums)
    made = (
        hidden.new_empty(shape if want else (0,), dtype=dtype)
        for shape, dtype, want in zip(shapes, dtypes, wanted, strict=True)
    )
    return tuple(made)  # type: ignore[return-value]


def _sum_dtype(accumulate: torch.dtype, parameter: Tensor | None) -> torch.dtype:
    """Return the wider of both dtypes, for a bias may be wider than the weight; at most float32.

    float64 only if the arithmetic is float64, which `accumulate` then is.
    """
    if parameter is None or accumulate == torch.float64:
        return accumulate
    wider = torch.promote_types(accumulate, parameter.dtype)
    return torch.float32 if wider == torch.float64 else wider


def _fake_losses(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(*arguments)
    hidden = problem.student.hidden
    rows = math.prod(hidden.shape[:-1])  # numel() would fix a symbolic size
    hard, soft = (hidden.new_empty((rows,), dtype=problem.wide) for _ in range(2))
    return hard, soft


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, wanted, accumulate = arguments
    student = _problem(*rest).student
    return *_fake_losses(*rest), *_empty_gradients(student, wanted, accumulate)


for _name, _run, _fake in (
    ("linear_losses", linear_losses, _fake_losses),
    ("linear_gradients", linear_gradients, _fake_gradients),
):
    for _device in ("CPU", "CUDA", "XPU", "MPS"):
        library.impl(_name, _run, _device)
    torch.library.register_fake(f"fused_kd::{_name}", _fake)


# What FlopCounterMode counts: the products of all rows. How many are ignored, no shape says.


@register_flop_formula(torch.ops.fused_kd.linear_losses)
def _forward_flop(*shapes: Any, out_shape: Any = None) -> int:
    student_hidden, student_weight, _, teacher_hidden, teacher_weight, *_ = shapes
    w_soft = shapes[9]
    flop: int = 2 * math.prod(student_hidden) * student_weight[0]
    if w_soft is not None and teacher_hidden is not None:
        flop += 2 * math.prod(teacher_hidden) * teacher_weight[0]
    return flop


@register_flop_formula(torch.ops.fused_kd.linear_gradients)
def _gradients_flop(*shapes: Any, out_shape: Any = None) -> int:
    student_hidden, student_weight, *_, wanted, _ = shapes
    of_hidden, of_weight, _ = wanted
    backward: int = 2 * math.prod(student_hidden) * student_weight[0] * (of_hidden + of_weight)
    forward: int = _forward_flop(*shapes)
    return forward + backward
