"""When the linear level computes which gradient.

A scalar loss makes its gradients in the forward, chunk by chunk, since the logits exist only there;
the first backward scales them and hands them over. A later one (``retain_graph=True``) recomputes.
So do the losses of single rows, whose upstream gradients come with the backward, and whatever is
rounded to float16 (hidden states, operands under autocast, the accumulator): a loss scale must
enter before that.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..autograd import (
    HandOver,
    Triple,
    is_batched,
    refuse_double_backward,
    save_tensors,
    saved_tensors,
    term_weights,
    times,
    weighted,
)
from ..backends import named
from ..options import KDOptions
from . import operators  # noqa: F401  registers them

#: Positions of the differentiable inputs among those of LinearLoss.
_STUDENT = 3
_INPUTS = 11


class Settings(NamedTuple):
    """What the operators need besides tensors."""

    options: KDOptions
    backend: str
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    chunk_rows: int | None
    memory_budget: int | None
    kept_rows: int | None
    accumulate: torch.dtype

    def arguments(self) -> tuple[Any, ...]:
        o = self.options
        return (
            *(o.divergence, o.temperature, o.beta, o.soft_scale, o.label_smoothing),
            *(self.backend, self.student_dtype, self.teacher_dtype),
            *(self.chunk_rows, self.memory_budget, self.kept_rows),
        )


def linear_losses(
    student: tuple[Tensor, Tensor, Tensor | None],  # hidden (..., H), weight (V, H), bias (V,)
    teacher: tuple[Tensor | None, ...],  # the same, or None, and logits (..., V), or None
    labels: Tensor | None,  # (N,)
    w: Tensor,  # (N,)
    settings: Settings,
) -> Triple:
    """The loss, a sum, or (N,) for "none"; and H and S of every row, without gradient."""
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student)
    result = LinearLoss.apply(  # type: ignore[no-untyped-call]
        *student, *teacher, labels, w, settings, wanted
    )
    return cast(Triple, result)


class LinearLoss(torch.autograd.Function):
    """The linear level's loss; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Triple:
        *tensors, w, settings, wanted = inputs
        options = settings.options
        w_hard, w_soft = term_weights(w, options)
        ctx.settings, ctx.wanted, ctx.hand_over = settings, wanted, None
        per_row = options.reduction == "none"
        rounded_to = (inputs[0].dtype, settings.student_dtype, settings.accumulate)
        in_forward = any(wanted) and not per_row and torch.float16 not in rounded_to
        made: tuple[Tensor, ...] = ()
        if in_forward:
            hard, soft, *gradients = _gradients(tensors, w_hard, w_soft, settings, wanted)
            made = tuple(gradients)
        else:
            hard, soft = torch.ops.fused_kd.linear_losses(
                *tensors, w_hard, w_soft, *settings.arguments()
            )
        ctx.in_forward = in_forward
        if torch.compiler.is_compiling():
            save_tensors(ctx, *tensors, w_hard, w_soft, *made)
        else:
            ctx.hand_over = HandOver(made) if in_forward else None
            save_tensors(ctx, *tensors, w_hard, w_soft)
        loss = weighted(hard, soft, w_hard, w_soft)
        if not per_row:
            loss = loss.sum()
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        return loss, hard, soft

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        scale, settings = upstream[0], ctx.settings
        if scale is None:
            return (None,) * _INPUTS
        *tensors, w_hard, w_soft = saved_tensors(ctx)[: _INPUTS - 1]
        student = tensors[:_STUDENT]
        made = None
        if ctx.in_forward and torch.compiler.is_compiling():
            made = saved_tensors(ctx)[_INPUTS - 1 :]
        elif ctx.hand_over is not None and not is_batched(scale):
            _, made = ctx.hand_over.take()
        with torch.no_grad():
            if made is not None:
                gradients = [
                    _scaled(made[i], scale, x.dtype, settings) if ctx.wanted[i] else None
                    for i, x in enumerate(student)
                ]
            else:
                w_hard, w_soft = times(w_hard, scale), times(w_soft, scale)
                _, _, *made = _gradients(tensors, w_hard, w_soft, settings, ctx.wanted)
                gradients = [
                    made[i].to(x.dtype) if ctx.wanted[i] else None for i, x in enumerate(student)
                ]
        refused = (None if g is None else refuse_double_backward(g, *student) for g in gradients)
        return (*refused, *(None,) * (_INPUTS - _STUDENT))


def _gradients(
    tensors: list[Any],
    w_hard: Tensor | None,
    w_soft: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, ...],
) -> Any:
    return torch.ops.fused_kd.linear_gradients(
        *tensors, w_hard, w_soft, *settings.arguments(), list(wanted), settings.accumulate
    )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype, settings: Settings) -> Tensor:
    """scale·gradient in `dtype`, in the gradient's memory where it has that dtype.

    0 stays 0 whatever the scale, as in a row that does not count.
    """
    if torch.compiler.is_compiling():
        return torch.where(gradient != 0, gradient * scale, 0.0).to(dtype)
    if gradient.numel() > 0:
        rows = gradient.view(1, -1, gradient.shape[-1])
        backend: Any = named(settings.backend)
        backend.rescale(rows, scale, *(None,) * 6, settings.options)  # by multiplication
    return gradient.to(dtype)
