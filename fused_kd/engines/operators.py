"""The registered operators of the chunk loop.

They keep the loop out of a compiler's trace, which would compile again for every number of rows.
Each takes the two sides (three tensors each: logits, None, None; or hidden states, weight, bias),
token_ids of a TopK, and one weight per row and term (None: the term is off). Each returns the
unweighted terms of every row, hard and soft (N,); two also compute the gradients of the weighted
sum. Calling them directly is not differentiable. A memory_budget that does not hold one row raises
ValueError.

No argument and no result is a list of tensors: ``is_grads_batched=True`` and ``torch.vmap`` call an
operator without a batching rule once for each entry of the batch, but not one with lists.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends import named
from ..classes import Classes
from ..ops import library
from ..options import Formula
from ..sides import arithmetic_dtype
from .driver import run_chunks
from .gradients import Gradients, empty_gradients
from .problem import Problem
from .products import Projection

_ARGUMENTS = (
    "Tensor student, Tensor? student_weight, Tensor? student_bias, Tensor? teacher, "
    "Tensor? teacher_weight, Tensor? teacher_bias, Tensor? token_ids, Tensor? labels, "
    "Tensor? w_hard, Tensor? w_soft, "
    "str divergence, Tensor temperature, float beta, str soft_scale, float label_smoothing, "
    "str backend, ScalarType student_dtype, ScalarType teacher_dtype, float student_scale, "
    "float teacher_scale, SymInt? chunk_rows, SymInt? memory_budget, SymInt? kept_rows"
)
library.define(f"chunked_losses({_ARGUMENTS}) -> (Tensor, Tensor)")
# also the gradients of the student's three tensors, empty if not wanted; may_narrow: those of
# weight and bias have the weight's dtype if no sum over chunks is needed
library.define(
    f"chunked_gradients({_ARGUMENTS}, bool[] wanted, ScalarType grad_accum_dtype, bool may_narrow)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# the student's logits are overwritten by their gradient
library.define(
    f"chunked_gradients_({_ARGUMENTS.replace('Tensor student', 'Tensor(a!) student', 1)})"
    " -> (Tensor, Tensor)"
)


def chunked_losses(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return hard and soft; the arguments are those of the schema, here and below."""
    return _run(_problem(*arguments), None)[:2]


def chunked_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    """Return hard, soft and the three gradients; an empty tensor for one that is not wanted."""
    *rest, wanted, grad_accum_dtype, may_narrow = arguments
    problem = _problem(*rest)
    problem = problem._replace(grad_accum_dtype=grad_accum_dtype, may_narrow=may_narrow)
    hard, soft, gradients = _run(problem, wanted)
    return hard, soft, *_tensors(problem, gradients)


def chunked_gradients_(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return hard and soft; overwrite the student's logits by their gradient."""
    problem = _problem(*arguments)._replace(inplace=True)
    return _run(problem, (True, False, False))[:2]


def _run(problem: Problem, wanted: tuple[bool, ...] | None) -> tuple[Tensor, Tensor, Gradients]:
    with torch.no_grad(), torch.autocast(problem.rows.device.type, enabled=False):
        return run_chunks(problem, wanted)


def _tensors(problem: Problem, gradients: Gradients) -> list[Tensor]:
    return [problem.rows.new_empty((0,)) if g is None else g for g in gradients]


def _problem(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    token_ids: Tensor | None,
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
    other: Projection | Tensor | Classes | None
    if w_soft is None or teacher is None:
        other = None
    elif token_ids is not None:
        other = Classes(teacher, token_ids)
    else:
        other = _side(teacher, teacher_weight, teacher_bias, teacher_dtype, teacher_scale)
    return Problem(
        student=_side(student, student_weight, student_bias, student_dtype, student_scale),
        teacher=other,
        labels=labels,
        w_hard=w_hard,
        w_soft=w_soft,
        formula=Formula(divergence, temperature, beta, soft_scale, label_smoothing),
        backend_name=backend,
        backend=named(backend),
        accum_dtype=arithmetic_dtype(student, teacher),
        chunk_rows=chunk_rows,
        memory_budget=memory_budget,
        kept_rows=kept_rows,
        grad_accum_dtype=torch.float32,
        may_narrow=False,
        inplace=False,
    )


def _side(
    states: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, scale: float
) -> Projection | Tensor:
    return states if weight is None else Projection(states, weight, bias, dtype, scale)


def _fake_losses(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = _problem(*arguments)
    rows = math.prod(problem.rows.shape[:-1])  # numel() would fix a symbolic size
    hard, soft = (problem.rows.new_empty((rows,), dtype=problem.accum_dtype) for _ in range(2))
    return hard, soft


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, wanted, grad_accum_dtype, _ = arguments
    problem = _problem(*rest)
    gradients = empty_gradients(problem.student, wanted, grad_accum_dtype, inplace=False)
    return *_fake_losses(*rest), *_tensors(problem, gradients)


for _name, _implementation, _fake in (
    ("chunked_losses", chunked_losses, _fake_losses),
    ("chunked_gradients", chunked_gradients, _fake_gradients),
    ("chunked_gradients_", chunked_gradients_, _fake_losses),
):
    for _device in ("CPU", "CUDA", "XPU", "MPS"):
        library.impl(_name, _implementation, _device)
    torch.library.register_fake(f"fused_kd::{_name}", _fake)


# For FlopCounterMode: the products of all rows, since the shapes do not show how many are ignored.


@register_flop_formula([torch.ops.fused_kd.chunked_losses, torch.ops.fused_kd.chunked_gradients_])
def _forward_flop(*shapes: Any, out_shape: Any = None) -> int:
    w_soft = shapes[9]
    return _product_flop(*shapes[:2]) + (0 if w_soft is None else _product_flop(*shapes[3:5]))


@register_flop_formula(torch.ops.fused_kd.chunked_gradients)
def _gradients_flop(*shapes: Any, out_shape: Any = None) -> int:
    *_, wanted, _, _ = shapes
    forward: int = _forward_flop(*shapes)
    return forward + _product_flop(*shapes[:2]) * (int(wanted[0]) + int(wanted[1]))


def _product_flop(states: Any, weight: Any) -> int:
    return 0 if weight is None else 2 * int(math.prod(states)) * int(weight[0])
