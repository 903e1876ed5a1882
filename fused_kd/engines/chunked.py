"""The engine for a Head on either side: the logits of one chunk of rows at a time.

The loop over the chunks is one registered operator, see :mod:`fused_kd.engines.operators`.
:class:`fused_kd.engines.Engine` documents the functions, hard, soft and `wanted`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import named
from ..rows import logit_rows
from . import operators  # noqa: F401  registers them
from .settings import ChunkSettings, Gradients, Inputs, Settings


def gradient_in_forward(settings: Settings, inputs: Inputs) -> bool:
    """Return False if a gradient is rounded to float16, since a loss scale must come first."""
    chunks = _chunks(settings)
    student, weight, _ = inputs.student
    assert student is not None
    rounded_to = {student.dtype}
    if weight is not None:
        rounded_to |= {chunks.student_dtype, weight.dtype, chunks.grad_accum_dtype}
    return torch.float16 not in rounded_to


def losses(settings: Settings, inputs: Inputs) -> tuple[Tensor, Tensor, None]:
    """Return hard, soft and None: no statistics are kept, since the logits are freed."""
    hard, soft = torch.ops.fused_kd.chunked_losses(*_arguments(settings, inputs))
    return hard, soft, None


def losses_and_gradients(
    settings: Settings, inputs: Inputs, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, None, Gradients]:
    """Return hard, soft, None for stats, and the gradients; None for one unwanted or in place.

    In place there is one, of the logits: `wanted` is not read.
    """
    if settings.inplace:
        hard, soft = torch.ops.fused_kd.chunked_gradients_(*_arguments(settings, inputs))
        return hard, soft, None, (None, None, None)
    # a narrowed gradient's dtype depends on the number of rows: a trace would specialise on it
    may_narrow = not torch.compiler.is_compiling()
    hard, soft, *grads = torch.ops.fused_kd.chunked_gradients(
        *_arguments(settings, inputs),
        list(wanted),
        _chunks(settings).grad_accum_dtype,
        may_narrow,
    )
    return hard, soft, None, tuple(g if w else None for g, w in zip(grads, wanted, strict=True))


def gradients(
    settings: Settings, inputs: Inputs, stats: None, wanted: tuple[bool, ...]
) -> Gradients:
    """Compute the logits again and return the gradients, in the dtypes of the student's tensors.

    None for one that is not wanted. With inplace they overwrite the student's logits, which are
    returned. `stats` are not read.
    """
    *_, grads = losses_and_gradients(settings, inputs, wanted)
    if settings.inplace:
        return inputs.student[0], None, None
    return tuple(
        None if g is None or x is None else g.to(x.dtype)
        for g, x in zip(grads, inputs.student, strict=True)
    )


def rescaled(
    settings: Settings, inputs: Inputs, stats: None, forward_gradients: Gradients, scale: Tensor
) -> Gradients:
    """Return `scale` times the gradients, in the dtypes of the student's tensors.

    Outside a trace `forward_gradients` are overwritten: do not use them again. With inplace the
    student's logits hold the gradient, and are multiplied and returned.
    """
    if settings.inplace:
        student = inputs.student[0]
        assert student is not None
        named(settings.backend).multiply(logit_rows(student.detach(), None)[0], scale)
        return student, None, None
    return tuple(
        None if g is None or x is None else _scaled(g, scale, settings).to(x.dtype)
        for g, x in zip(forward_gradients, inputs.student, strict=True)
    )


def _scaled(gradient: Tensor, scale: Tensor, settings: Settings) -> Tensor:
    """Return scale·gradient, outside a trace in its memory.

    0 stays 0 for any scale, so that an ignored row is never NaN.
    """
    if torch.compiler.is_compiling():
        return torch.where(gradient != 0, gradient * scale, 0.0)
    if gradient.numel() > 0:
        named(settings.backend).multiply(gradient.view(1, -1, gradient.shape[-1]), scale)
    return gradient


def _chunks(settings: Settings) -> ChunkSettings:
    assert settings.chunks is not None
    return settings.chunks


def _arguments(settings: Settings, inputs: Inputs) -> tuple[Any, ...]:
    """Return the arguments that all chunk operators have in common."""
    chunks = _chunks(settings)
    return (
        *(*inputs.student, *inputs.teacher, inputs.token_ids),
        *(inputs.labels, inputs.w_hard, inputs.w_soft),
        *settings.formula(inputs.temperature),
        settings.backend,
        *(chunks.student_dtype, chunks.teacher_dtype, chunks.student_scale, chunks.teacher_scale),
        *(chunks.chunk_rows, chunks.memory_budget, chunks.kept_rows),
    )
