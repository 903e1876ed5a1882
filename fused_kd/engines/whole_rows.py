"""The engine for logits on both sides: one call of the backend processes all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import named
from .settings import Inputs, Settings


def gradient_in_forward(settings: Settings, inputs: Inputs) -> bool:
    """Return False for float16, since a loss scale must precede the rounding, and in a trace."""
    return not torch.compiler.is_compiling() and _student(inputs).dtype != torch.float16


def losses(settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return hard (N,), soft (N,) and stats (N, STATS)."""
    formula = settings.formula(inputs.temperature)
    return named(settings.backend).forward(*_rows(inputs), formula)


def losses_and_gradients(
    settings: Settings, inputs: Inputs, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, None, None]]:
    """Return hard, soft, stats and the gradient, None if it overwrote the student's logits."""
    formula = settings.formula(inputs.temperature)
    backend = named(settings.backend)
    hard, soft, stats, gradient = backend.forward_backward(
        *_rows(inputs), formula, settings.inplace
    )
    return hard, soft, stats, (None if settings.inplace else gradient, None, None)


def gradients(
    settings: Settings, inputs: Inputs, stats: Tensor | None, wanted: tuple[bool, ...]
) -> tuple[Tensor, None, None]:
    """Return the gradient of the logits, computed from them and the row statistics."""
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
    """Multiply the forward's gradient by `scale`; rounded once, except in place."""
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return student, teacher, labels and weights; without a teacher, the student twice."""
    student = _student(inputs)
    teacher = student if inputs.teacher[0] is None else inputs.teacher[0]
    return student, teacher, inputs.labels, inputs.w_hard, inputs.w_soft
