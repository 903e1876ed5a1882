"""The arguments of an engine: the constants of a call, and its tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..options import Formula, KDOptions
from ..sides import Head, Side, Teacher, Tensors, operand_dtype

#: Of the student's three tensors; None: not wanted, or written over the student's logits.
Gradients = tuple[Tensor | None, ...]


class ChunkSettings(NamedTuple):
    """The constants of a call with a Head; the integers are the caller's, None if not set."""

    student_dtype: torch.dtype  # of a Head's operands, see operand_dtype(); unused for logits
    teacher_dtype: torch.dtype
    student_scale: float  # the Head's; 1 for logits
    teacher_scale: float
    chunk_rows: int | None
    memory_budget: int | None  # bytes
    kept_rows: int | None
    grad_accum_dtype: torch.dtype  # of the sums of weight and bias gradients over chunks


class Settings(NamedTuple):
    """The constants of a call: a compiler specialises on them."""

    backend: str  # its name, never "auto"
    divergence: str
    beta: float
    soft_scale: str
    label_smoothing: float
    per_row: bool  # a loss for each row, without reduction
    inplace: bool  # this call overwrites the student's logits by their gradient
    chunks: ChunkSettings | None  # None: both sides are logits

    def formula(self, temperature: Tensor) -> Formula:
        """Return the options of a row kernel, with T as a tensor."""
        return Formula(
            self.divergence, temperature, self.beta, self.soft_scale, self.label_smoothing
        )


class Inputs(NamedTuple):
    """The tensors of a call, N rows."""

    student: Tensors  # logits, None, None; or hidden states, weight, bias
    teacher: Tensors  # the same; logits of a TopK's classes; three None: no term reads the teacher
    token_ids: Tensor | None  # (N, K), int32: of a TopK's classes, see Classes
    labels: Tensor | None  # (N,), int64
    w_hard: Tensor | None  # (N,), weight of H in the loss; None: the term is off; 0: for that row
    w_soft: Tensor | None  # (N,), weight of S, likewise
    temperature: Tensor  # 0-d CPU float64

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> Inputs:
        """Return the inputs from a list of the tensors that :meth:`flat` returns."""
        s, s_weight, s_bias, t, t_weight, t_bias, *rest = tensors
        return cls((s, s_weight, s_bias), (t, t_weight, t_bias), *rest)  # type: ignore[arg-type]

    def flat(self) -> tuple[Tensor | None, ...]:
        """Return all tensors in one tuple, the student's three first."""
        rows = (self.token_ids, self.labels, self.w_hard, self.w_soft, self.temperature)
        return *self.student, *self.teacher, *rows


def settings_of(
    options: KDOptions,
    backend: str,
    student: Side,
    teacher: Teacher | None,
    dtype: torch.dtype,  # of the arithmetic
    inplace: bool,
    kept_rows: int | None,
) -> Settings:
    """Return the constants of a call; `chunks` is None if both sides are logits.

    teacher=None: no term reads one. `backend` is the name that was chosen, not "auto"; `inplace` is
    the result of :func:`.writes_in_place`, not the caller's keyword.
    """
    chunks = None
    if isinstance(student, Head) or isinstance(teacher, Head):
        accumulate = options.grad_accum_dtype or torch.float32
        chunks = ChunkSettings(
            operand_dtype(student) if isinstance(student, Head) else dtype,
            operand_dtype(teacher) if isinstance(teacher, Head) else dtype,
            float(student.scale) if isinstance(student, Head) else 1.0,
            float(teacher.scale) if isinstance(teacher, Head) else 1.0,
            options.chunk_rows,
            options.memory_budget,
            kept_rows,
            accumulate if dtype == torch.float32 else dtype,
        )
    return Settings(
        backend,
        options.divergence,
        options.beta,
        options.soft_scale,
        options.label_smoothing,
        options.reduction == "none",
        inplace,
        chunks,
    )
