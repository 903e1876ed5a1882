"""The two autograd.Functions: which gradient is computed, and when.

* :class:`ScalarLoss` (``mean``, ``sum``): one visit of the rows in the forward gives loss and
  gradient. The buffer is handed over in the first backward, scaled by the upstream gradient; a
  later one (``retain_graph=True``) recomputes it. float16 recomputes always, so that a loss scale
  enters before the rounding, and so do a traced graph and a batch of upstream gradients.
* :class:`RowLosses` (``none``): the upstream gradient of each row is known only in the backward.

Weights `w` are those of the reduction, zero for rows that do not count; the weight of a term of a
row in the gradient is ``w * hard_weight`` or ``w * soft_weight``, and None if the term is off.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import increment_version

from .backends import Backend
from .options import KDOptions

Triple = tuple[Tensor, Tensor, Tensor]


def kd_scalar_loss(
    student: Tensor,  # (B, S, V)
    teacher: Tensor | None,  # (B, S, V); None: no term reads it
    labels: Tensor | None,  # (N,)
    w: Tensor,  # (N,)
    options: KDOptions,
    backend: Backend,
    inplace: bool,
) -> Triple:
    """Σ w·(hard_weight·H + soft_weight·S), and H and S of every row, without gradient."""
    gradient_now = (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and student.requires_grad
        and student.dtype != torch.float16
    )
    result = ScalarLoss.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, w, options, backend, inplace, gradient_now
    )
    return cast(Triple, result)


def kd_row_losses(
    student: Tensor,  # (B, S, V)
    teacher: Tensor | None,  # (B, S, V); None: no term reads it
    labels: Tensor | None,  # (N,)
    w: Tensor,  # (N,)
    options: KDOptions,
    backend: Backend,
) -> Triple:
    """w·(hard_weight·H + soft_weight·S) of every row, and H and S without gradient: (N,) each."""
    result = RowLosses.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, w, options, backend
    )
    return cast(Triple, result)


class ScalarLoss(torch.autograd.Function):
    """The reduced loss; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        w: Tensor,
        options: KDOptions,
        backend: Backend,
        inplace: bool,
        gradient_now: bool,
    ) -> Triple:
        w_hard, w_soft = term_weights(w, options)
        ctx.options, ctx.backend, ctx.inplace, ctx.hand_over = options, backend, inplace, None
        rows = (student, student if teacher is None else teacher, labels, w_hard, w_soft)
        if gradient_now:
            hard, soft, stats, gradient = backend.forward_backward(*rows, options, inplace)
            if inplace:
                increment_version(student)
            ctx.hand_over = HandOver(None if inplace else gradient)
        else:
            hard, soft, stats = backend.forward(*rows, options)
            if inplace:
                ctx.hand_over = HandOver(None)
        ctx.gradient_now = gradient_now
        save_tensors(ctx, student, teacher, labels, w_hard, w_soft, stats)
        loss = weighted(hard, soft, w_hard, w_soft).sum()
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        return loss, hard, soft

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        scale = upstream[0]
        if scale is None:
            return (None,) * 8
        batched = is_batched(scale)
        if ctx.inplace and batched:
            raise RuntimeError(
                "inplace=True has memory for one gradient; got a batch of upstream gradients "
                "(is_grads_batched=True): pass inplace=False to kd_loss"
            )
        is_first, gradient = False, cast(Any, None)
        if ctx.hand_over is not None and not batched:
            is_first, gradient = ctx.hand_over.take()
        if ctx.inplace and not is_first:
            raise RuntimeError(
                "a second backward after inplace=True: the student logits were overwritten with "
                "the gradient of the first; pass inplace=False to kd_loss"
            )
        student, teacher, labels, w_hard, w_soft, stats = _saved_or_overwritten(ctx)
        s = student.detach()
        t = s if teacher is None else teacher
        with torch.no_grad():
            if ctx.gradient_now and is_first:
                gradient, kept = (s, None) if ctx.inplace else (gradient, s)
                rest = (t, labels, w_hard, w_soft, stats, ctx.options)
                ctx.backend.rescale(gradient, scale, kept, *rest)
            else:
                w_hard, w_soft = times(w_hard, scale), times(w_soft, scale)
                rest = (t, labels, w_hard, w_soft, stats, ctx.options)
                gradient = ctx.backend.backward(s, *rest, ctx.inplace)
            if ctx.inplace:
                increment_version(student)
        return (refuse_double_backward(gradient, student), *(None,) * 7)


def _saved_or_overwritten(ctx: Any) -> list[Any]:
    """Return the saved tensors; if one was written to, raise an error that names `inplace`."""
    try:
        return saved_tensors(ctx)
    except RuntimeError as error:
        if not ctx.inplace or "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "an input of the loss was written to between the loss and its backward. With "
            "inplace=True, kd_loss itself writes to student_logits: a second call on another slice "
            "of the same tensor does this; pass inplace=False, or call the loss once on the whole "
            f"tensor ({error})"
        ) from error


class RowLosses(torch.autograd.Function):
    """The loss of every row; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor | None,
        w: Tensor,
        options: KDOptions,
        backend: Backend,
    ) -> Triple:
        w_hard, w_soft = term_weights(w, options)
        t = student if teacher is None else teacher
        hard, soft, stats = backend.forward(student, t, labels, w_hard, w_soft, options)
        ctx.options, ctx.backend = options, backend
        save_tensors(ctx, student, teacher, labels, w_hard, w_soft, stats)
        loss = weighted(hard, soft, w_hard, w_soft)
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        return loss, hard, soft

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        per_row = upstream[0]
        if per_row is None:
            return (None,) * 6
        student, teacher, labels, w_hard, w_soft, stats = saved_tensors(ctx)
        with torch.no_grad():
            w_hard, w_soft = times(w_hard, per_row), times(w_soft, per_row)
            s = student.detach()
            t = s if teacher is None else teacher
            gradient = ctx.backend.backward(s, t, labels, w_hard, w_soft, stats, ctx.options, False)
        return (refuse_double_backward(gradient, student), *(None,) * 5)


class HandOver:
    """The gradient that the forward computed, for the first backward pass.

    Two threads may run the backward of one graph, and operators release the GIL. ``list.pop`` is
    atomic, so exactly one of them takes the gradient. It does not stay here afterwards, or the
    buffer would live as long as the graph.

    Args:
        gradient: what the backward needs; None if it overwrote the student's logits.
    """

    def __init__(self, gradient: Any) -> None:
        self._once = [gradient]  # one entry at most, for the sake of pop()

    def take(self) -> tuple[bool, Any]:
        """Return True and the gradient to the first caller, False and None to all later ones."""
        try:
            return True, self._once.pop()
        except IndexError:
            return False, None


def is_batched(gradient: Tensor) -> bool:
    """Return True for a batch of gradients: of ``is_grads_batched=True``, or of ``torch.vmap``."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    is_legacy = functorch.is_legacy_batchedtensor(gradient)  # of is_grads_batched
    return bool(is_legacy or functorch.is_batchedtensor(gradient))


_TWICE = (
    "kd_loss and linear_kd_loss cannot be differentiated twice (create_graph=True, gradient "
    "penalties, Hessians): use fused_kd.testing.eager_kd_loss, plain torch, where you need that"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes the gradient through and raises when it is differentiated.

    It takes the loss's differentiable inputs, so that autograd reaches it whatever the gradient
    itself depends on: a bare ``once_differentiable`` was seen to drop the term silently.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise RuntimeError(_TWICE)


def refuse_double_backward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """The gradient by one of the inputs, whose own derivative by any of them raises."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    if is_batched(gradient):  # whose graph would not contain _NoSecondDerivative
        raise RuntimeError(_TWICE)
    result = _NoSecondDerivative.apply(gradient, *inputs)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)


def term_weights(w: Tensor, options: KDOptions) -> tuple[Tensor | None, Tensor | None]:
    hard, soft = options.hard_weight, options.soft_weight
    w_hard = None if hard == 0.0 else w if hard == 1.0 else w * hard
    if soft == hard:
        return w_hard, w_hard
    return w_hard, None if soft == 0.0 else w if soft == 1.0 else w * soft


def weighted(
    hard: Tensor,  # (N,)
    soft: Tensor,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
) -> Tensor:
    """Return w_hard·hard + w_soft·soft of every row; a term that is off is left out."""
    if w_hard is None:
        return soft if w_soft is None else w_soft * soft
    return w_hard * hard if w_soft is None else torch.addcmul(w_hard * hard, w_soft, soft)


def times(w: Tensor | None, upstream: Tensor) -> Tensor | None:
    """w·upstream, and 0 where w is 0 even if upstream is not finite."""
    return None if w is None else torch.where(w != 0, w * upstream, 0.0)


def save_tensors(ctx: Any, *tensors: Tensor | None) -> None:
    """save_for_backward, which refuses tensors made under inference_mode: those are held as is."""
    ctx.held = {}
    if not torch.compiler.is_compiling():
        ctx.held = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.held else t for i, t in enumerate(tensors)))


def saved_tensors(ctx: Any) -> list[Any]:
    return [ctx.held.get(i, tensor) for i, tensor in enumerate(ctx.saved_tensors)]
