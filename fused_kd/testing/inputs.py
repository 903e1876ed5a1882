"""Random logits and labels in regimes that have broken some implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..sides import TopK

#: The dtypes of logits that the compiled kernels support, by short name.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs(NamedTuple):
    """Logits and labels of some rows."""

    student: Tensor  # (N, V)
    teacher: Tensor | TopK  # (N, V), or N rows
    labels: Tensor  # (N,), int64, in [0, V)


def make_inputs(
    regime: str,
    rows: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Inputs:
    """Return random inputs of a regime that has broken some implementation.

    Args:
        regime: a key of :data:`REGIMES`.
        rows: N.
        vocabulary: V.
        dtype: dtype of the student's logits.
        teacher_dtype: dtype of the teacher's logits; None: `dtype`.
        seed: seed of the generator; equal arguments give equal inputs.

    Returns:
        CPU tensors that do not require grad. A value beyond the range of its dtype is infinite: the
        -1e30 of "finite_mask" is -inf in float16.

    Raises:
        KeyError: The regime is unknown.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    student = torch.randn(rows, vocabulary, generator=generator)
    teacher = torch.randn(rows, vocabulary, generator=generator)
    student, teacher = REGIMES[regime](student, teacher, labels)
    return Inputs(student.to(dtype), teacher.to(teacher_dtype or dtype), labels)


def _at_label(logits: Tensor, labels: Tensor, bonus: float) -> Tensor:
    return logits.scatter_add(1, labels[:, None], torch.full((len(labels), 1), bonus))


def _one_hot_teacher(s: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    only_label = torch.full_like(t, -math.inf).scatter(1, y[:, None], 0.0)
    return s, only_label


def _columns(s: Tensor, t: Tensor, y: Tensor, value: float, part: slice) -> tuple[Tensor, Tensor]:
    """Return both sides with `value` in the columns `part`, but not at the label."""
    masked_s, masked_t = s.clone(), t.clone()
    masked_s[:, part], masked_t[:, part] = value, value
    index = y[:, None]
    return (
        masked_s.scatter(1, index, s.gather(1, index)),
        masked_t.scatter(1, index, t.gather(1, index)),
    )


def _peaks(s: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return _at_label(s, y, 120.0), _at_label(t, (y + 1) % s.shape[1], 120.0)


def _spread(x: Tensor) -> Tensor:
    return x + torch.linspace(-200, 200, x.shape[1])


#: Functions of (student, teacher, labels) that return new logits of both. Every loss is finite
#: unless the comment says otherwise.
REGIMES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    # softmax nearly uniform: the loss is about log V
    "flat": lambda s, t, y: (s * 1e-3, t * 1e-3),
    "constant": lambda s, t, y: (torch.zeros_like(s), torch.zeros_like(t)),
    "randn": lambda s, t, y: (s, t),
    "language_model": lambda s, t, y: (3 * s, 3 * s + t),
    # π_y > 0.999: the true class's gradient is a small difference
    "confident": lambda s, t, y: (_at_label(s, y, 25.0), _at_label(t, y, 25.0)),
    # both peaked, on different classes: a mixture's other entries underflow
    "opposed": _peaks,
    # divergence 0, gradient 0
    "equal": lambda s, t, y: (4 * s, 4 * s),
    # divergence far below the rounding of its terms
    "nearly_equal": lambda s, t, y: (4 * s, 4 * s + 1e-3 * t),
    # q log q with q = 0 by a logit of -inf: infinite for reverse_kl and mse, nothing for the rest
    "one_hot_teacher": _one_hot_teacher,
    "huge": lambda s, t, y: (1e4 * s.sign() + s, 1e4 * t.sign() + t),
    "shifted": lambda s, t, y: (s + 1e4, t - 1e4),
    "range_400": lambda s, t, y: (_spread(s), _spread(t)),
    # padded vocabulary
    "inf_columns": lambda s, t, y: _columns(s, t, y, -math.inf, slice(1, None, 3)),
    # a whole first block without a finite logit
    "inf_first": lambda s, t, y: _columns(s, t, y, -math.inf, slice(0, (3 * s.shape[1]) // 4)),
    # masks that people write instead of -inf
    "finite_mask": lambda s, t, y: _columns(s, t, y, -1e30, slice(1, None, 3)),
    # few distinct values: maxima that occur many times
    "ties": lambda s, t, y: ((2 * s).round() / 2, (2 * t).round() / 2),
}
