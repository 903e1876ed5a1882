"""The input of a run over chunks of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..classes import Classes
from ..options import Formula
from .products import Projection


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
