"""The operators `triton_measure` and `triton_measure_support`.

Each launches the kernels of :mod:`.launch`, for losses and statistics, and then one of
:mod:`.moments`, which is imported with triton on first use.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_kd import ops
from fused_kd.divergences import CODES
from fused_kd.measures import Support

from . import launch
from .configuration import MOST_REGISTERS, configuration
from .device import capability, kind, load_moments


def _numbers(temperature: Tensor) -> tuple[Any, ...]:
    """Return the scalar options of T² times forward_kl, as operators take them."""
    return CODES["forward_kl"], temperature, 0.5, True, 0.0


def _cut(student: Tensor, teacher: Tensor | None) -> dict[str, Any]:
    """Return how a program reads a row, as the kernels' constants and the compiler's options."""
    dtype = None if teacher is None else teacher.dtype
    gpu = kind(student.device)
    chosen = configuration(student.shape[2], student.dtype, dtype, gpu)
    if not launch._aligned([x for x in (student, teacher) if x is not None]):
        chosen = replace(chosen, vector=1, unroll=chosen.vector * chosen.unroll)
    return {
        "LANES": chosen.lanes,
        "VECTOR": chosen.vector,
        "UNROLL": chosen.unroll,
        "CUDA": capability(student.device),
        "num_warps": chosen.warps,
        **launch._EXACT,
        **({} if gpu.registers is None else {"maxnreg": MOST_REGISTERS}),
    }


def measure(
    student: Tensor,  # (B, S, V)
    teacher: Tensor,  # (B, S, V)
    labels: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    temperature: Tensor,  # 0-d
) -> tuple[Tensor, Tensor]:
    """Return the columns (N, MEASURES) and the largest entries (N, 2); raise RuntimeError."""
    launch._check_vector("weight", weight, torch.float32, student)
    call = launch._call(student, teacher, None, labels, weight, weight, *_numbers(temperature))
    losses = launch._losses_of(call, None)
    columns = weight.new_empty((call.rows, ops.MEASURES))
    largest = weight.new_empty((call.rows, 2), dtype=torch.int64)
    if call.rows > 0:
        with launch._guard(student):
            load_moments()._kd_measure_kernel[(call.rows,)](
                *(student, teacher, call.labels, call.w_soft, *losses, columns, largest),
                *(launch._rows_per_batch([student, teacher]), student.shape[2]),
                *(*launch._row_strides(student), *launch._row_strides(teacher)),
                *(_exponent(call.numbers.temperature), call.numbers.temperature),
                **_cut(student, teacher),
            )
    return columns, largest


def measure_support(
    student: Tensor,  # (B, S, V)
    token_ids: Tensor,  # (N, K)
    labels: Tensor,  # (N,)
    weight: Tensor,  # (N,)
    temperature: Tensor,  # 0-d
) -> tuple[Tensor, Tensor]:
    """Return the columns (N, 3) and the largest entries (N,); raise RuntimeError."""
    launch._check_vector("weight", weight, torch.float32, student)
    # of the teacher nothing is needed: the statistics contain those of the student's classes
    teacher = weight.new_zeros((token_ids.shape[-1] + 1,)).expand(*student.shape[:2], -1)
    rows = student, teacher, token_ids
    call = launch._call(*rows, labels, weight, weight, *_numbers(temperature))
    hard, _, stats = launch._losses_of(call, None)
    stats_1, t = stats, call.numbers.temperature
    if t != 1.0:
        at_1 = launch._call(*rows, None, None, weight, *_numbers(torch.ones(()).double()))
        *_, stats_1 = launch._losses_of(at_1, None)
    columns = weight.new_empty((call.rows, len(Support._fields)))
    largest = weight.new_empty((call.rows,), dtype=torch.int64)
    if call.rows > 0:
        with launch._guard(student):
            load_moments()._kd_measure_support_kernel[(call.rows,)](
                *(student, call.w_soft, hard, stats, stats_1, columns, largest),
                *(launch._rows_per_batch([student]), student.shape[2]),
                *(*launch._row_strides(student), _exponent(t), _exponent(1.0)),
                **_cut(student, None),
            )
    return columns, largest


def _exponent(temperature: float) -> float:
    """Return k: exp(x/T) is 2^(k·x)."""
    return math.log2(math.e) / temperature


launch.register({"measure": measure, "measure_support": measure_support})
