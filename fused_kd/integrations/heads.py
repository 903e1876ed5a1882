"""The lm_heads of Hugging Face language models: left out and probed.

A model's ``forward`` ends with ``logits = f(lm_head(hidden))``. At the linear level the loss
multiplies by the head itself, chunk by chunk, so the model is asked for ``f(hidden)``: its head
passes on what it is given. For a plain head ``f`` is the identity; for a scaled one (Cohere,
Granite) it is a factor c, and c·h·W = c·(h·W), so the scale is kept. Anything else, a soft-cap
(Gemma-2) above all, does not commute with the product, and :func:`check_head` refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

#: The head's output in the probe reaches from minus to plus this: far beyond any soft-cap.
PROBE = 1e4
#: Largest relative deviation from a pure factor; beyond what bfloat16 rounds twice.
TOLERANCE = 0.01
#: Of a label that does not count.
IGNORED = -100


def shifted(labels: Tensor | None) -> Tensor:  # (B, S) -> (B, S)
    """Return labels as a causal language model is trained on: the next token's, none for the last.

    The labels are shifted, never the logits: a slice of the logits costs a second gradient.

    Raises:
        ValueError: The batch has no labels.
    """
    return nn.functional.pad(_present(labels)[..., 1:], (0, 1), value=IGNORED)


def aligned(labels: Tensor | None, shift: bool) -> Tensor:
    """Return labels that belong to the logits at the same place: shifted, or as they are.

    Raises:
        ValueError: The batch has no labels.
    """
    return shifted(labels) if shift else _present(labels)


def _present(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError(
            "labels are absent from the batch: they say which tokens count, also where only the "
            "teacher is learned from; a collator such as "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes them"
        )
    return labels


def head_of(model: nn.Module) -> nn.Linear:
    """The model's lm_head.

    Raises:
        TypeError: it has none, or one that does more than multiply by its weight and add its bias
            (an adapter, a quantised layer).
    """
    head = output_of(model)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = type(head)  # with its module: quantised layers are called Linear too
        found = "none" if head is None else f"a {kind.__module__}.{kind.__qualname__}"
        raise TypeError(
            f"{type(model).__name__}: the linear level needs an lm_head that is a plain nn.Linear; "
            f"found {found}: use the logits level, KDLoss"
        )
    for module in {head, model.get_output_embeddings()}:  # type: ignore[operator]  # PEFT wraps it
        _check_untouched(module, type(model).__name__)
    return head


def output_of(model: nn.Module) -> Any:
    """Return the module that makes the model's logits, of any kind; None if it names none.

    PEFT's modules_to_save keeps a trained copy of a module for each adapter: the active one's.
    """
    find = getattr(model, "get_output_embeddings", None)
    output: Any = find() if find is not None else None
    if type(output).__name__ != "ModulesToSaveWrapper":
        return output
    copies = {} if output.disable_adapters else dict(output.modules_to_save.items())
    return next((copies[x] for x in output.active_adapters if x in copies), output.original_module)


def is_left_out(model: nn.Module) -> bool:
    """Return whether leave_out_head() is in force in the model, or in what it is a copy of."""
    forward = getattr(output_of(model), "forward", None)
    return getattr(forward, "func", None) is _pass_or_forward


def leave_out_head(model: nn.Module) -> Callable[[], None]:
    """Make the lm_head pass its input on while it trains; return what undoes it.

    The head's weight stays in the graph, without gradient from here: or DistributedDataParallel,
    looking for unused parameters from the model's outputs, would not wait for the loss's. A deep
    copy of the model does the same with the copy's head. Not to be called twice, which
    :func:`.models.check_models` sees to: the two could be undone in one order only.
    """
    head = head_of(model)
    # Not a closure, which a deep copy of the model would share with it.
    return _set_forward(head, partial(_pass_or_forward, head, head.forward))


def passes_on(head: nn.Module) -> bool:
    """Return whether a head changed by leave_out_head() passes its input on: while it trains.

    In training mode without gradients it does not, since generate() needs logits.
    """
    return head.training and torch.is_grad_enabled()


def _pass_or_forward(
    head: nn.Linear, forward: Callable[[Tensor], Tensor], hidden: Tensor
) -> Tensor:
    return _passed(head, hidden) if passes_on(head) else forward(hidden)


def _passed(head: nn.Linear, hidden: Tensor) -> Tensor:
    passed: Tensor = _Pass.apply(hidden, head.weight, head.bias)
    return passed


def _set_forward(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Returns what puts back what was there: the class's, or that of a hook (as accelerate's)."""
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
    """Within, ``model(...).logits`` are the hidden states that its head is to be applied to."""
    head = head_of(model)
    undo = _set_forward(head, lambda hidden: _passed(head, hidden))  # a new partial would recompile
    try:
        yield
    finally:
        undo()


def check_head(model: nn.Module) -> None:
    """Refuses a model whose logits are not a multiple of its head's output.

    Raises:
        TypeError, ValueError: as :func:`scale_of`; it scales the sum of product and bias.
    """
    scale = scale_of(model)
    if head_of(model).bias is not None and abs(scale - 1.0) > TOLERANCE:
        raise ValueError(
            f"{type(model).__name__} multiplies its logits, bias included, by {scale:.4g}: the "
            "linear level cannot; use the logits level, KDLoss"
        )


def scale_of(model: nn.Module) -> float:
    """What a model multiplies its head's output by, measured by one tiny forward.

    Raises:
        TypeError: as :func:`head_of`.
        ValueError: the model caps, cuts or otherwise changes its logits.
    """
    head = head_of(model)
    modes = [(module, module.training) for module in model.modules()]
    # float32 whatever the head's dtype: a scaled float16 would overflow.
    ramp = torch.linspace(-PROBE, PROBE, head.out_features, device=head.weight.device)
    ramp = torch.stack([torch.zeros_like(ramp), ramp])[None]  # (1, 2, V)
    undo = _set_forward(head, lambda hidden: ramp)
    try:
        model.eval()
        ids = torch.zeros(1, 2, dtype=torch.int64, device=ramp.device)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            given = model(input_ids=ids).logits
    finally:
        for module, was_training in modes:
            module.training = was_training
        undo()
    return _scale(type(model).__name__, ramp.double(), given.double())


def _scale(name: str, ramp: Tensor, given: Tensor) -> float:
    """The factor between two tensors, if there is one."""
    if ramp.shape == given.shape:
        scale = (given * ramp).sum() / ramp.square().sum()
        deviation = (given - scale * ramp).norm(dim=-1)  # nothing may be added to the zeros
        if (deviation <= TOLERANCE * given.norm(dim=-1)).all():
            return scale.item()
    raise ValueError(
        f"{name} changes its logits after the lm_head by more than a factor (soft-capping, as "
        "in Gemma-2, does): the linear level would drop that; use the logits level, KDLoss"
    )


def _check_untouched(head: nn.Module, name: str) -> None:
    """Refuse a head whose output something outside it reads or changes.

    The head of a training model gives hidden states here, so that would work on those. The probe
    of :func:`scale_of` does not see what comes later, or only in training. Hooks before the
    forward, and parametrizations of the weight, act as always.
    """
    forward = vars(head).get("forward")
    source = getattr(forward, "func", forward)
    found = None
    if head._forward_hooks:
        found = "register_forward_hook"
    elif head._backward_pre_hooks:
        found = "register_full_backward_pre_hook"
    elif forward is not None and source.__module__ != __name__ and not hasattr(head, "_hf_hook"):
        found = "a forward method of its own"  # accelerate's, with _hf_hook, only moves tensors
    if found is not None:
        raise TypeError(
            f"{name}: the linear level needs an lm_head whose output nothing else reads or "
            f"changes; found {found} on it: remove that, or use the logits level, KDLoss"
        )


class _Pass(torch.autograd.Function):
    """The first input; the others are in the graph, and get no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient, None, None
