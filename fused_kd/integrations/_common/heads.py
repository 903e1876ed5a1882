"""The lm_heads of Hugging Face language models: find, bypass and probe them.

A model's ``forward`` ends with ``logits = f(lm_head(hidden))``. A loss that takes a
:class:`fused_kd.Head` multiplies by the lm_head itself, chunk by chunk, so the model has to return
``f(hidden)``: its lm_head returns its input. For a plain one ``f`` is the identity. For a scaled
one (Cohere, Granite) it is a factor c, which the model has then multiplied into the hidden states:
c·(h·W + b) = (c·h)·W + c·b. Any other ``f``, above all a soft-cap (Gemma-2), does not commute with
the product, and :func:`scale_of` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...sides import Head

#: The probe's logits range from minus to plus this: far beyond any soft-cap.
PROBE = 1e4
#: Largest relative deviation from a pure factor: more than two roundings to bfloat16 cause.
TOLERANCE = 0.01


def head_of(model: nn.Module) -> nn.Linear:
    """Return the model's lm_head.

    Raises:
        TypeError: The model names no lm_head, as a DistributedDataParallel does not; or the lm_head
            does more than multiply by a weight and add a bias (an adapter, a quantised layer), has
            a hook on its output or gradient, or an assigned forward.
    """
    head = output_of(model)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = type(head)  # with its module: quantised layers are called Linear too
        what = "none" if head is None else f"a {kind.__module__}.{kind.__qualname__}"
        raise TypeError(
            f"the lm_head of {type(model).__name__} must be a plain nn.Linear for a Head; got "
            f"{what}: use the model's logits (heads=False)"
        )
    for module in {head, model.get_output_embeddings()}:  # type: ignore[operator]  # PEFT wraps it
        _check_untouched(module, type(model).__name__)
    return head


def output_of(model: nn.Module) -> Any:
    """Return the module that computes the logits, of any class; None if the model names none.

    PEFT's modules_to_save keeps a trained copy of a module for each adapter: the copy of the active
    adapter is returned.
    """
    find = getattr(model, "get_output_embeddings", None)
    output: Any = find() if find is not None else None
    if type(output).__name__ != "ModulesToSaveWrapper":
        return output
    copies = {} if output.disable_adapters else dict(output.modules_to_save.items())
    return next((copies[x] for x in output.active_adapters if x in copies), output.original_module)


def is_bypassed(model: nn.Module) -> bool:
    """Return whether bypass_head() changed the model's lm_head, or the one that it is a copy of."""
    forward = getattr(output_of(model), "forward", None)
    return getattr(forward, "func", None) is _pass_or_forward


def bypass_head(model: nn.Module) -> Callable[[], None]:
    """Make the lm_head return its input if :func:`passes_on`; return a function to undo this once.

    The head's weight and bias stay in the graph, but get no gradient from there. Otherwise
    DistributedDataParallel, which searches for unused parameters from the model's outputs, would
    ignore the gradient that the loss adds to them. A deep copy of the model bypasses the copy's
    head. Must not be called twice, since the two could be undone in one order only:
    :func:`.models.check_models` refuses the second. Raises as :func:`head_of`.
    """
    head = head_of(model)
    # Not a closure, which a deep copy of the model would share with it.
    return _set_forward(head, partial(_pass_or_forward, head, head.forward))


def passes_on(head: nn.Module) -> bool:
    """Return True in training mode with gradients, when a bypassed head returns its input.

    It does not check that bypass_head() changed the head. Without gradients it is False, since
    generate() needs logits.
    """
    return head.training and torch.is_grad_enabled()


def _pass_or_forward(
    head: nn.Linear, forward: Callable[[Tensor], Tensor], hidden: Tensor
) -> Tensor:
    """Return the head's input if :func:`passes_on`, else what `forward` returns."""
    return _passed(head, hidden) if passes_on(head) else forward(hidden)


def _passed(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return a view of the head's input, with the head's parameters in its graph."""
    passed: Tensor = _Pass.apply(hidden, head.weight, head.bias)
    return passed


def _set_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replace a module's forward; return a function that restores the previous one.

    The previous one is the class's method, or an instance attribute (accelerate's hooks set one).
    """
    before = vars(head).get("forward")
    vars(head)["forward"] = forward

    def undo() -> None:
        if before is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = before

    return undo


@contextmanager
def headless(model: nn.Module) -> Iterator[None]:
    """Make ``model(...).logits`` the hidden states that the lm_head would get, in either mode.

    If the model scales its logits, the states are multiplied by that scale, but the lm_head's bias
    is not (see :func:`side_of`). A soft-cap would act on the states: such a model is not refused
    here, but by :func:`scale_of`. Raises as :func:`head_of`.
    """
    head = head_of(model)
    undo = _set_forward(head, lambda hidden: _passed(head, hidden))  # a new partial would recompile
    try:
        yield
    finally:
        undo()


@contextmanager
def not_bypassed(model: nn.Module) -> Iterator[None]:
    """Undo :func:`bypass_head` for a while, if it changed the model's lm_head."""
    if not is_bypassed(model):
        yield
        return
    head = output_of(model)
    undo = _set_forward(head, vars(head)["forward"].args[1])  # of _pass_or_forward
    try:
        yield
    finally:
        undo()


def side_of(model: nn.Module, hidden: Tensor, scale: float) -> Head:
    """Return the Head of a model that returned ``f(hidden)`` instead of its logits.

    Its weight, and its bias unless scaled, are the lm_head's own parameters.

    Args:
        model: a model that was called while its lm_head was bypassed.
        hidden: the returned states (..., H), already multiplied by `scale`.
        scale: the result of :func:`scale_of`, by which the bias is multiplied here.

    Raises:
        TypeError: As :func:`head_of`.
    """
    head = head_of(model)
    is_scaled = abs(scale - 1.0) > TOLERANCE
    bias = head.bias * scale if head.bias is not None and is_scaled else head.bias
    return Head(hidden, head.weight, bias)


def scale_of(model: nn.Module) -> float:
    """Return the factor between a model's logits and its head's output, 1.0 for most models.

    It is measured by one forward of two tokens in evaluation mode, with ``input_ids`` alone; errors
    of the model in it are not caught. Modes are restored.

    Raises:
        TypeError: As :func:`head_of`.
        ValueError: The model caps, cuts or otherwise changes its logits.
    """
    head = head_of(model)
    modes = [(module, module.training) for module in model.modules()]
    # float32 regardless of the head's dtype: a scaled float16 would overflow.
    ramp = torch.linspace(-PROBE, PROBE, head.out_features, device=head.weight.device)
    ramp = torch.stack([torch.zeros_like(ramp), ramp])[None]  # (1, 2, V)
    undo = _set_forward(head, lambda hidden: ramp)
    try:
        model.eval()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=ramp.device)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids).logits
    finally:
        for module, was_training in modes:
            module.training = was_training
        undo()
    return _scale(type(model).__name__, ramp.double(), logits.double())


def _scale(name: str, ramp: Tensor, logits: Tensor) -> float:
    """Return the factor c of logits = c·ramp; the message calls the model `name`.

    Raises:
        ValueError: There is no such factor.
    """
    if ramp.shape == logits.shape:
        scale = (logits * ramp).sum() / ramp.square().sum()
        deviation = (logits - scale * ramp).norm(dim=-1)  # nothing may be added to the zeros
        if (deviation <= TOLERANCE * logits.norm(dim=-1)).all():
            return scale.item()
    raise ValueError(
        f"the logits of {name} must be the lm_head's output times a factor for a Head; got other "
        "logits (soft-capping, as in Gemma-2, makes such): use the model's logits (heads=False)"
    )


def _check_untouched(head: nn.Module, name: str) -> None:
    """Refuse a head whose output or gradient is read or changed by other code; `name` is the model.

    A bypassed head returns hidden states, so a hook would get these, or their gradient. The probe
    of :func:`scale_of` does not detect hooks that are added later or act in training only. Hooks
    before the forward, and parametrizations of the weight, act as always.

    Raises:
        TypeError: The head has a hook on its output or gradient, or an assigned forward.
    """
    forward = vars(head).get("forward")
    source = getattr(forward, "func", forward)
    cause = None
    if head._forward_hooks:
        cause = "register_forward_hook"
    elif head._backward_pre_hooks:
        cause = "register_full_backward_pre_hook"
    elif head._backward_hooks:
        cause = "register_full_backward_hook"
    elif forward is not None and source.__module__ != __name__ and not hasattr(head, "_hf_hook"):
        cause = "an assigned forward method"  # accelerate's, with _hf_hook, only moves tensors
    if cause is not None:
        raise TypeError(
            f"the lm_head of {name} must have neither a hook on its output or gradient nor an "
            f"assigned forward for a Head; got {cause}: remove it from the lm_head, or use the "
            "model's logits (heads=False)"
        )


class _Pass(torch.autograd.Function):
    """The identity of the first input; weight and bias are in the graph, but get no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return a view of the hidden states."""
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient by the hidden states, and None for weight and bias."""
        return gradient, None, None
