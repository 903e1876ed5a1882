"""The engine for a student's logits, and a teacher's logits or TopK: one call for all rows.

:class:`fused_kd.engines.Engine` documents the functions, hard, soft, stats and `wanted`; here there
is one gradient, of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import named
from ..classes import Classes
from .settings import Inputs, Settings


def gradient_in_forward(settings: Settings, inputs: Inputs) -> bool:
    """Return False for float16, since a loss scale must precede the rounding, and in a trace."""
    return not torch.compiler.is_compiling() and _student(inputs).dtype != torch.float16


def losses(settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard (N,), soft (N,) and stats (N, STATS); (N, 0) from the reference backend."""
    formula = settings.formula(inputs.temperature)
    return named(settings.backend).forward(*_rows(inputs), formula)


def losses_and_gradients(
    settings: Settings, inputs: Inputs, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, None, None]]:
    """Return hard, soft, stats and the gradient, None if it overwrote the student's logits.

    `wanted` is not read: the engine is called for the gradient of the logits only.
    """
    formula = settings.formula(inputs.temperature)
    backend = named(settings.backend)
    hard, soft, stats, gradient = backend.forward_backward(
        *_rows(inputs), formula, settings.inplace
    )
    return hard, soft, stats, (None if settings.inplace else gradient, None, None)


def gradients(
    settings: Settings, inputs: Inputs, stats: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, None, None]:
    """Return the gradient, computed from logits and stats; in place, in the student's memory.

    `stats` must not be None; `wanted` is not read.
    """
    assert stats is not None
    formula = settings.formula(inputs.temperature)
    backend = named(settings.backend)
    return backend.backward(*_rows(inputs), stats, formula, settings.inplace), None, None


def rescaled(
    settings: Settings,
    inputs: Inputs,
    stats: Tensor | None,
    forward_gradients: tuple[Tensor | None, ...],
    scale: Tensor,
) -> tuple[Tensor, None, None]:
    """Return `scale` times the forward's gradient, which is overwritten.

    It is rounded once in all. In place, that is if the gradient is None, the student's logits hold
    it: they are multiplied, and rounded again.
    """
    assert stats is not None
    backend = named(settings.backend)
    student, teacher, *vectors = _rows(inputs)
    gradient = forward_gradients[0]
    if gradient is None:
        backend.multiply(student, scale)
        return student, None, None
    labels, w_hard, w_soft = vectors
    formula = settings.formula(inputs.temperature)
    backend.rescale(gradient, scale, student, teacher, labels, w_hard, w_soft, stats, formula)
    return gradient, None, None


def _student(inputs: Inputs) -> Tensor:
    student = inputs.student[0]
    assert student is not None
    return student


def _rows(
    inputs: Inputs,
) -> tuple[Tensor, Tensor | Classes, Tensor | None, Tensor | None, Tensor | None]:
    """Return student, teacher (the student again if None), labels, w_hard and w_soft."""
    student = _student(inputs)
    logits = student if inputs.teacher[0] is None else inputs.teacher[0]
    teacher = logits if inputs.token_ids is None else Classes(logits, inputs.token_ids)
    return student, teacher, inputs.labels, inputs.w_hard, inputs.w_soft
