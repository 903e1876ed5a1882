"""The one autograd.Function of the loss: which gradient is computed, and when.

* A scalar loss (``mean``, ``sum``) computes its gradients in the forward, while it has the logits.
  The first backward takes them, scaled by the upstream gradient; a later one
  (``retain_graph=True``) recomputes them.
* The backward computes them in three cases: each row has its own loss (``none``), whose upstream
  gradients are known only then; the engine's ``gradient_in_forward`` is False (float16, so that a
  loss scale enters before the rounding, and logits in a trace); the upstream gradients are a batch.

hard, soft and stats are what :class:`fused_kd.engines.Engine` defines.
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

#: Number of tensors of a side; the first three inputs of the Function are the student's.
_STUDENT = 3
#: Number of inputs of the Function: the tensors of Inputs, the settings, the wanted gradients.
_INPUTS = 13


def differentiable_loss(
    settings: Settings,
    student: Tensors,
    teacher: Tensors,
    token_ids: Tensor | None,  # (N, K)
    labels: Tensor | None,  # (N,)
    weights: Weights,
    temperature: Tensor,  # 0-d CPU float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and the hard and the soft term of every row.

    With ``settings.inplace`` the student's logits are overwritten by their gradient: here, or in
    the backward for float16. The arguments must have been checked.

    Returns:
        The loss, differentiable by the student's tensors: 0-d, or (N,) for reduction "none". Then
        H and S = c(T)·D, (N,) each, unweighted and detached; 0 for a term that is off.

    Raises:
        ValueError: The memory_budget in `settings` does not hold one row.
    """
    has_gradient = torch.is_grad_enabled()
    states, weight, bias = student
    assert states is not None
    wanted = (
        has_gradient and states.requires_grad,
        has_gradient and weight is not None and weight.requires_grad,
        has_gradient and bias is not None and bias.requires_grad,
    )
    inputs = Inputs(student, teacher, token_ids, labels, weights.hard, weights.soft, temperature)
    result = Loss.apply(*inputs.flat(), settings, wanted)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor, Tensor], result)


class Loss(torch.autograd.Function):
    """The loss of any pair of sides: the only differentiable operation of the package.

    The module's docstring states when the gradients are computed.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, hard and soft; compute the gradients too, unless the backward must.

        Args:
            ctx: the context that autograd passes to the backward.
            arguments: the tensors of ``Inputs.flat()``, the Settings, and for each of the student's
                three tensors whether its gradient is wanted.
        """
        *tensors, settings, wanted = arguments
        inputs, engine = Inputs.of(tensors), engine_of(settings)
        forward_gradients: tuple[Tensor | None, ...] = ()
        stats: Tensor | None
        if any(wanted) and not settings.per_row and engine.gradient_in_forward(settings, inputs):
            hard, soft, stats, forward_gradients = engine.losses_and_gradients(
                settings, inputs, wanted
            )
            if settings.inplace:
                increment_version(tensors[0])
        else:
            hard, soft, stats = engine.losses(settings, inputs)
        ctx.settings, ctx.wanted, ctx.hand_over = settings, wanted, None
        if torch.compiler.is_compiling():
            save_tensors(ctx, *tensors, stats, *forward_gradients)
        else:
            ctx.hand_over = HandOver(forward_gradients)
            save_tensors(ctx, *tensors, stats)
        loss = _weighted(hard, soft, inputs.w_hard, inputs.w_soft)
        ctx.mark_non_differentiable(hard, soft)
        ctx.set_materialize_grads(False)
        return loss if settings.per_row else loss.sum(), hard, soft

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """Return a gradient or None for each input: from the forward, or computed now.

        Raises:
            RuntimeError: As _take_gradients, _saved and refuse_double_backward.
        """
        scale, settings = upstream[0], ctx.settings
        if scale is None:
            return (None,) * _INPUTS
        forward_gradients = _take_gradients(ctx, scale)
        tensors, stats, saved = _saved(ctx)
        student = tensors[:_STUDENT]
        tensors[:_STUDENT] = [None if x is None else x.detach() for x in student]
        inputs, engine = Inputs.of(tensors), engine_of(settings)
        if forward_gradients is None:
            forward_gradients = saved
        with torch.no_grad():
            if forward_gradients:
                gradients = engine.rescaled(settings, inputs, stats, forward_gradients, scale)
            else:
                inputs = inputs._replace(
                    w_hard=_scaled_weights(inputs.w_hard, scale),
                    w_soft=_scaled_weights(inputs.w_soft, scale),
                )
                gradients = engine.gradients(settings, inputs, stats, ctx.wanted)
            if settings.inplace:
                increment_version(tensors[0])
        refused = (None if g is None else refuse_double_backward(g, *student) for g in gradients)
        return (*refused, *(None,) * (_INPUTS - _STUDENT))


# ------------------------------------------------------------------- gradients of the forward


class HandOver:
    """A holder of the forward's gradients, until the first backward takes them.

    Two threads may run the backward of one graph, and operators release the GIL. ``list.pop`` is
    atomic, so exactly one of them gets the gradients. The object drops its reference then: kept
    here, the buffers would live as long as the graph.

    Args:
        gradients: the tuple to hold; empty if the forward computed none.
    """

    def __init__(self, gradients: Any) -> None:
        self._once = [gradients]  # a list for its atomic pop()

    def take(self) -> tuple[bool, Any]:
        """Return (True, gradients) on the first call, (False, ()) on all later ones."""
        try:
            return True, self._once.pop()
        except IndexError:
            return False, ()


def _take_gradients(ctx: Any, scale: Tensor) -> Any:
    """Return the forward's gradients, once.

    () if there are none, an earlier backward took them, or the upstream gradient `scale` is a
    batch; None in a trace, in which they are among the saved tensors.

    Raises:
        RuntimeError: With ``inplace=True``, a second backward or a batch of upstream gradients.
    """
    if ctx.hand_over is None:
        return None
    batched = is_batched(scale)
    if ctx.settings.inplace and batched:
        raise RuntimeError(
            "inplace=True has memory for one gradient; got a batch of upstream gradients "
            "(is_grads_batched=True): pass inplace=False to kd_loss"
        )
    is_first, forward_gradients = (False, ()) if batched else ctx.hand_over.take()
    if ctx.settings.inplace and not is_first:
        raise RuntimeError(
            "a second backward after inplace=True: the student's logits were overwritten by the "
            "gradient of the first; pass inplace=False to kd_loss"
        )
    return forward_gradients


def is_batched(gradient: Tensor) -> bool:
    """Return True for a batch, made by ``is_grads_batched=True`` or vmap; False in a trace."""
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
    """Return w_hard·hard + w_soft·soft of every row, (N,); a None weight leaves its term out.

    Two of them give 0.
    """
    if w_hard is None:
        return torch.zeros_like(soft) if w_soft is None else w_soft * soft
    return w_hard * hard if w_soft is None else torch.addcmul(w_hard * hard, w_soft, soft)


def _scaled_weights(w: Tensor | None, upstream: Tensor) -> Tensor | None:
    """Return w·upstream, 0 for a weight of 0 even if upstream is not finite; None stays None."""
    return None if w is None else torch.where(w != 0, w * upstream, 0.0)


# ------------------------------------------------------------------------------ saved tensors


def save_tensors(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward, None included, in an order that :func:`_saved` restores.

    ``ctx.save_for_backward`` refuses tensors made under ``torch.inference_mode``: these are stored
    in ``ctx.inference_tensors``, by position. If one is written to later, no error is raised.
    """
    ctx.inference_tensors = inference_tensors = {}
    if not torch.compiler.is_compiling():
        inference_tensors = {
            i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()
        }
    if inference_tensors:
        ctx.inference_tensors = inference_tensors
        tensors = tuple(None if i in inference_tensors else t for i, t in enumerate(tensors))
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> tuple[list[Any], Any, tuple[Any, ...]]:
    """Return the tensors of Inputs, the stats, and in a trace the forward's gradients (else ()).

    Raises:
        RuntimeError: A saved tensor was written to (the message names `inplace` if that is set), or
            freed by an earlier backward without ``retain_graph=True``.
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
    for i, tensor in ctx.inference_tensors.items():
        saved[i] = tensor
    count = _INPUTS - 2
    return saved[:count], saved[count], tuple(saved[count + 1 :])


# --------------------------------------------------------------------------- double backward

_TWICE = (
    "kd_loss cannot be differentiated twice (create_graph=True, gradient penalties, Hessians): use "
    "fused_kd.testing.eager_kd_loss, plain torch, where you need that"
)


class _NoSecondDerivative(torch.autograd.Function):
    """The identity of a gradient, which raises when it is differentiated.

    It takes the differentiable inputs of the loss, so that autograd reaches it regardless of what
    the gradient depends on: ``once_differentiable`` alone was seen to drop the term silently.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        """Return a view of the gradient; `inputs` are not read."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        """Raise RuntimeError: there is no second derivative."""
        raise RuntimeError(_TWICE)


def refuse_double_backward(gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return `gradient` such that differentiating it by any of `inputs` raises RuntimeError.

    In a trace, and without ``create_graph=True``, it is returned unchanged.

    Raises:
        RuntimeError: The gradient is a batch, and ``create_graph=True``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradient
    if is_batched(gradient):  # whose graph would not contain _NoSecondDerivative
        raise RuntimeError(_TWICE)
    result = _NoSecondDerivative.apply(gradient, *inputs)  # type: ignore[no-untyped-call]
    return cast(Tensor, result)
