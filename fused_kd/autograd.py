"""The one autograd.Function of the loss: which gradient is computed, and when.

* A scalar loss (``mean``, ``sum``) computes its gradients in the forward, while it has the logits.
  They are handed over in the first backward, scaled by the upstream gradient; a later one
  (``retain_graph=True``) recomputes them.
* The backward computes the gradients of losses of single rows (``none``), whose upstream gradients
  are known only then; what an engine excludes (float16, so that a loss scale enters before the
  rounding); and those of a batch of upstream gradients.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import increment_version

from .engines import Inputs, Settings, engine_of
from .rows import Weights
from .sides import Tensors

#: Tensors of a side: the first three inputs of the Function are the student's.
_STUDENT = 3
#: Inputs of the Function: the tensors of Inputs, the settings and which gradients are wanted.
_INPUTS = 12


def differentiable_loss(
    settings: Settings,
    student: Tensors,
    teacher: Tensors,
    labels: Tensor | None,  # (N,)
    weights: Weights,
    temperature: Tensor,  # 0-d CPU float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, a sum or (N,) for "none", and H and S of every row, without gradient."""
    has_gradient = torch.is_grad_enabled()
    states, weight, bias = student
    assert states is not None
    wanted = (
        has_gradient and states.requires_grad,
        has_gradient and weight is not None and weight.requires_grad,
        has_gradient and bias is not None and bias.requires_grad,
    )
    inputs = Inputs(student, teacher, labels, weights.hard, weights.soft, temperature)
    result = Loss.apply(*inputs.flat(), settings, wanted)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor], result)


class Loss(torch.autograd.Function):
    """The loss of any pair of sides; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss, and the gradients if this is the time for them."""
        *tensors, settings, wanted = arguments
        inputs, engine = Inputs.of(tensors), engine_of(settings)
        made: tuple[Tensor | None, ...] = ()
        stats: Tensor | None
        if any(wanted) and not settings.per_row and engine.gradient_in_forward(settings, inputs):
            hard, soft, stats, made = engine.losses_and_gradients(settings, inputs, wanted)
            if settings.inplace:
                increment_version(tensors[0])
        else:
            hard, soft, stats = engine.losses(settings, inputs)
        ctx.settings, ctx.wanted, ctx.hand_over = settings, wanted, None
        if torch.compiler.is_compiling():
            save_tensors(ctx, *tensors, stats, *made)
        else:
            ctx.hand_over = HandOver(made)
            save_tensors(ctx, *tensors, stats)
        loss = _weighted(hard, soft, inputs.w_hard, inputs.w_soft)
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        return loss if settings.per_row else loss.sum(), hard, soft

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """Return the student's gradients: those of the forward, or recomputed."""
        scale, settings = upstream[0], ctx.settings
        if scale is None:
            return (None,) * _INPUTS
        made = _take_made(ctx, scale)
        tensors, stats, saved = _saved(ctx)
        student = tensors[:_STUDENT]
        tensors[:_STUDENT] = [None if x is None else x.detach() for x in student]
        inputs, engine = Inputs.of(tensors), engine_of(settings)
        if made is None:
            made = saved
        with torch.no_grad():
            if made:
                gradients = engine.rescaled(settings, inputs, stats, made, scale)
            else:
                inputs = inputs._replace(
                    w_hard=_times(inputs.w_hard, scale), w_soft=_times(inputs.w_soft, scale)
                )
                gradients = engine.gradients(settings, inputs, stats, ctx.wanted)
            if settings.inplace:
                increment_version(tensors[0])
        refused = (None if g is None else refuse_double_backward(g, *student) for g in gradients)
        return (*refused, *(None,) * (_INPUTS - _STUDENT))


# ------------------------------------------------------------------- gradients of the forward


class HandOver:
    """The gradients that the forward computed, for the first backward pass.

    Two threads may run the backward of one graph, and operators release the GIL. ``list.pop`` is
    atomic, so exactly one of them takes the gradients. They are not kept here afterwards, or the
    buffers would live as long as the graph.

    Args:
        gradients: what the backward needs; an empty tuple if the forward computed none.
    """

    def __init__(self, gradients: Any) -> None:
        self._once = [gradients]  # one entry at most, for the sake of pop()

    def take(self) -> tuple[bool, Any]:
        """Return True and the gradients to the first caller, False and () to all later ones."""
        try:
            return True, self._once.pop()
        except IndexError:
            return False, ()


def _take_made(ctx: Any, scale: Tensor) -> Any:
    """Return the gradients of the forward, () if there are none (left), None in a trace."""
    if ctx.hand_over is None:
        return None
    batched = is_batched(scale)
    if ctx.settings.inplace and batched:
        raise RuntimeError(
            "inplace=True has memory for one gradient; got a batch of upstream gradients "
            "(is_grads_batched=True): pass inplace=False to kd_loss"
        )
    is_first, made = (False, ()) if batched else ctx.hand_over.take()
    if ctx.settings.inplace and not is_first:
        raise RuntimeError(
            "a second backward after inplace=True: the student's logits were overwritten by the "
            "gradient of the first; pass inplace=False to kd_loss"
        )
    return made


def is_batched(gradient: Tensor) -> bool:
    """Return True for a batch of gradients: of ``is_grads_batched=True``, or of ``torch.vmap``."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    is_legacy = functorch.is_legacy_batchedtensor(gradient)  # of is_grads_batched
    return bool(is_legacy or functorch.is_batchedtensor(gradient))


# ----------------------------------------------------------------------------- weights of rows


def _weighted(
    hard: Tensor,  # (N,)
    soft: Tensor,  # (N,)
    w_hard: Tensor | None,  # (N,)
    w_soft: Tensor | None,  # (N,)
) -> Tensor:
    """Return w_hard·hard + w_soft·soft of every row; a term that is off is left out."""
    if w_hard is None:
        return torch.zeros_like(soft) if w_soft is None else w_soft * soft
    return w_hard * hard if w_soft is None else torch.addcmul(w_hard * hard, w_soft, soft)


def _times(w: Tensor | None, upstream: Tensor) -> Tensor | None:
    """Return w·upstream, and 0 where w is 0 even if upstream is not finite."""
    return None if w is None else torch.where(w != 0, w * upstream, 0.0)


# ------------------------------------------------------------------------------ saved tensors


def save_tensors(ctx: Any, *tensors: Tensor | None) -> None:
    """Save for the backward, and hold tensors made under inference_mode, which autograd refuses."""
    ctx.held = held = {}
    if not torch.compiler.is_compiling():
        held = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    if held:
        ctx.held = held
        tensors = tuple(None if i in held else t for i, t in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> tuple[list[Any], Any, tuple[Any, ...]]:
    """Return the tensors of the inputs, stats, and in a trace the gradients of the forward.

    Raises:
        RuntimeError: One of them was written to; the message names `inplace` if that may be why.
    """
    try:
        saved = list(ctx.saved_tensors)
    except RuntimeError as error:
        if not ctx.settings.inplace or "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "an input of the loss was written to between the loss and its backward. With "
            "inplace=True, kd_loss itself writes to the student's logits: a second call on another "
            "slice of the same tensor does this; pass inplace=False, or call the loss once on the "
            f"whole tensor ({error})"
        ) from error
    for i, tensor in ctx.held.items():
        saved[i] = tensor
    count = _INPUTS - 2
    return saved[:count], saved[count], tuple(saved[count + 1 :])


# --------------------------------------------------------------------------- double backward

_TWICE = (
    "kd_loss cannot be differentiated twice (create_graph=True, gradient penalties, Hessians): use "
    "fused_kd.testing.eager_kd_loss, plain torch, where you need that"
)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes the gradient through and raises when it is differentiated.

    It takes the loss's differentiable inputs, so that autograd reaches it regardless of what
    the gradient depends on: a bare ``once_differentiable`` was seen to drop the term silently.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        """Return the gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """Raise."""
        raise RuntimeError(_TWICE)


def refuse_double_backward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return the gradient such that differentiating it by any of the inputs raises."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    if is_batched(gradient):  # whose graph would not contain _NoSecondDerivative
        raise RuntimeError(_TWICE)
    result = _NoSecondDerivative.apply(gradient, *inputs)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)
