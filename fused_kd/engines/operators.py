"""The two registered operators of the chunk loop, which is opaque to a compiler.

A loop that a compiler traced would be compiled once more for every number of rows. Each operator
takes the sides (three tensors each: logits, None, None; or hidden states, weight, bias) and one
weight per row and term (None: the term is off), and returns the unweighted terms of every row; the
second one also the gradients of their weighted sum. Calling them directly is not differentiable.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import named
from ..ops import library
from ..options import Formula
from ..sides import arithmetic_dtype
from .driver import Gradients, Problem, empty_gradients, run_chunks
from .products import Projection

_ARGUMENTS = (
    "Tensor?[] student, Tensor?[] teacher, Tensor? labels, Tensor? w_hard, Tensor? w_soft, "
    "str divergence, Tensor temperature, float beta, str soft_scale, float label_smoothing, "
    "str backend, ScalarType student_dtype, ScalarType teacher_dtype, float student_scale, "
    "float teacher_scale, SymInt? chunk_rows, SymInt? memory_budget, SymInt? kept_rows"
)
library.define(f"chunked_losses({_ARGUMENTS}) -> (Tensor, Tensor)")
# gradients by the three tensors of the student, empty if not wanted. may_narrow: those of weight
# and bias have the weight's dtype if all rows fit in one chunk.
library.define(
    f"chunked_gradients({_ARGUMENTS}, bool[] wanted, ScalarType grad_accum_dtype, bool may_narrow)"
    " -> (Tensor, Tensor, Tensor[])"
)


def chunked_losses(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return hard (N,) and soft (N,)."""
    return _run(_problem(*arguments), None)[:2]


def chunked_gradients(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return hard, soft and the gradients."""
    *rest, wanted, grad_accum_dtype, may_narrow = arguments
    problem = _problem(*rest)
    problem = problem._replace(grad_accum_dtype=grad_accum_dtype, may_narrow=may_narrow)
    hard, soft, gradients = _run(problem, wanted)
    return hard, soft, [problem.rows.new_empty((0,)) if g is None else g for g in gradients]


def gradients_in_place(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return hard and soft, and overwrite the student's logits by the gradient."""
    problem = _problem(*arguments)._replace(inplace=True)
    return _run(problem, (True, False, False))[:2]


def _run(problem: Problem, wanted: tuple[bool, ...] | None) -> tuple[Tensor, Tensor, Gradients]:
    with torch.no_grad(), torch.autocast(problem.rows.device.type, enabled=False):
        return run_chunks(problem, wanted)


def _problem(
    student: list[Tensor | None],
    teacher: list[Tensor | None],
    labels: Tensor | None,
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    divergence: str,
    temperature: Tensor,
    beta: float,
    soft_scale: str,
    label_smoothing: float,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    student_scale: float,
    teacher_scale: float,
    chunk_rows: int | None,
    memory_budget: int | None,
    kept_rows: int | None,
) -> Problem:
    own = _side(student, student_dtype, student_scale)
    assert own is not None
    return Problem(
        student=own,
        teacher=None if w_soft is None else _side(teacher, teacher_dtype, teacher_scale),
        labels=labels,
        w_hard=w_hard,
        w_soft=w_soft,
        formula=Formula(divergence, temperature, beta, soft_scale, label_smoothing),
        backend_name=backend,
        backend=named(backend),
        accum_dtype=arithmetic_dtype(student[0], teacher[0]),
        chunk_rows=chunk_rows,
        memory_budget=memory_budget,
        kept_rows=kept_rows,
        grad_accum_dtype=torch.float32,
        may_narrow=False,
        inplace=False,
    )


def _side(
    tensors: list[Tensor | None], dtype: torch.dtype, scale: float
) -> Projection | Tensor | None:
    states, weight, bias = tensors
    if states is None or weight is None:
        return states
    return Projection(states, weight, bias, dtype, scale)


def _fake_losses(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(*arguments)
    rows = math.prod(problem.rows.shape[:-1])  # numel() would fix a symbolic size
    hard, soft = (problem.rows.new_empty((rows,), dtype=problem.accum_dtype) for _ in range(2))
    return hard, soft


def _fake_gradients(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *rest, wanted, grad_accum_dtype, _ = arguments
    problem = _problem(*rest)
    gradients = empty_gradients(problem.student, wanted, grad_accum_dtype, inplace=False)
    return (
        *_fake_losses(*rest),
        [problem.rows.new_empty((0,)) if g is None else g for g in gradients],
    )


for _name, _implementation, _fake in (
    ("chunked_losses", chunked_losses, _fake_losses),
    ("chunked_gradients", chunked_gradients, _fake_gradients),
):
    for _device in ("CPU", "CUDA", "XPU", "MPS"):
        library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"fused_kd::{_name}", _fake)


# What FlopCounterMode counts: the products of all rows. How many are ignored, no shape says.


@register_flop_formula(torch.ops.fused_kd.chunked_losses)
def _forward_flop(*shapes: Any, out_shape: Any = None) -> int:
    student, teacher, _, _, w_soft, *_ = shapes
    read = [student] if w_soft is None else [student, teacher]
    return sum(_product_flop(side) for side in read)


@register_flop_formula(torch.ops.fused_kd.chunked_gradients)
def _gradients_flop(*shapes: Any, out_shape: Any = None) -> int:
    student, *_, wanted, _, _ = shapes
    forward: int = _forward_flop(*shapes)
    return forward + _product_flop(student) * (int(wanted[0]) + int(wanted[1]))


def _product_flop(side: Any) -> int:
    states, weight, _ = side
    return 0 if weight is None else 2 * int(math.prod(states)) * int(weight[0])
